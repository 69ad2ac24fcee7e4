"""What the READMEs tell a reader to type: commands that exist, and the first one's run."""

import pickle
import re
import shlex
from pathlib import Path

import click
import numpy as np
import pytest
import timm
import torch
import torchvision
from click.testing import CliRunner
from PIL import Image

from timm_poolattn import insert
from timm_poolattn.cli import main
from timm_poolattn.cli.training import train
from timm_poolattn.layers import GATES
from timm_poolattn.training.arguments import check_arguments, parse_arguments
from timm_poolattn.training.timm_script import load_train_script

ROOT = Path(__file__).parents[1]
READMES = [ROOT / name for name in ('README.md', 'train_scripts/README.md', 'hub_configs/README.md',
                                    'timm_poolattn/bench/README.md', 'CONTRIBUTING.md')]  # fmt: skip


def blocks(path, language):
    return re.findall(rf'^```{language}\n(.*?)^```$', path.read_text(encoding='utf-8'), re.DOTALL | re.MULTILINE)


def commands(path):
    """Arguments of each `poolattn ...` in the bash blocks of a README."""
    for block in blocks(path, 'bash'):
        for line in block.replace('\\\n', ' ').splitlines():
            line = line.replace('train_scripts/train.py', 'poolattn train')
            words = shlex.split(line, comments=True)
            for word in (word for word in words if ' poolattn ' in word):  # the script of an `sh -c`
                words = shlex.split(word)
            while 'poolattn' in words:
                words = words[words.index('poolattn') + 1 :]
                ends = [i for i, word in enumerate(words) if word in ('&&', '>', '|')]
                yield words[: min(ends, default=len(words))]


COMMANDS = [(path, args) for path in READMES for args in commands(path)]


@pytest.mark.parametrize('path, args', [pytest.param(*c, id=f'{c[0].parent.name}: {" ".join(c[1])}') for c in COMMANDS])
def test_every_command_parses(path, args, request, tmp_path, monkeypatch):
    """Arguments of timm's train.py by its own parser."""
    command = main
    while isinstance(command, click.Group):
        name, *args = args
        command = command.commands[name]
    context = command.make_context(name, args)
    if command is train:
        train_script = request.getfixturevalue('train_script')
        monkeypatch.chdir(tmp_path)
        (tmp_path / 'start.safetensors').touch()
        argv = ['0.1' if arg == 'LR' else arg for arg in context.params['timm_args']]
        parsed = parse_arguments(load_train_script(train_script), argv, context.params['recipe'])
        check_arguments(parsed.args)


@pytest.fixture
def place(tmp_path, monkeypatch, image_folder, cifar10_few):
    """A folder that has what the README speaks of."""
    image_folder.joinpath('train').rename(tmp_path / 'photos')
    (tmp_path / 'cifar10').symlink_to(cifar10_few)
    (tmp_path / 'hub_configs').symlink_to(ROOT / 'hub_configs')
    Image.new('RGB', (300, 200), 'orange').save(tmp_path / 'photo.jpg')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(args):
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, f'{args}: {result.output}'
    return result.stdout


def test_commands_of_the_readme(place, train_script, monkeypatch):
    monkeypatch.setenv('TIMM_TRAIN_SCRIPT', str(train_script))
    done = [args for args in commands(ROOT / 'README.md') if args[0] not in ('report', 'demo')]
    assert [args[0] for args in done] == ['predict', 'list', 'predict', 'validate', 'explain', 'export', 'finetune',
                                          'predict']  # fmt: skip
    for args in done:
        out = run(args)
        if args[0] == 'predict':
            assert '%' in out
    assert (place / 'figures').is_dir() and (place / 'model.pt2').is_file()


def test_python_of_the_readme(place):
    (own,) = blocks(ROOT / 'README.md', 'python')
    space = {}
    exec(own, space)
    assert isinstance(space['model'], timm.models.ConvNeXt) and space['features'][-1].shape[1] == 64


def test_names_of_the_readme():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    bullet = re.search(r'^- `resnet` .*?(?=^- )', text, re.DOTALL | re.MULTILINE)[0]
    depths = re.findall(r'\d\d+', bullet)
    _, *gates = re.findall(r'`(\w+)`', bullet)
    names = [f'resnet{depth}{gate}' for depth in depths for gate in ('', *(f'_{gate}' for gate in gates))]
    assert sorted(names) == sorted(timm.list_models(module='cifar_resnet'))


@pytest.mark.compat
def test_transformers_of_hub_configs(place):
    pytest.importorskip('transformers')
    (code,) = blocks(ROOT / 'hub_configs' / 'README.md', 'python')
    exec(code, {})


def test_cifar_as_a_folder(tmp_path, monkeypatch):
    """The snippet, on files of torchvision's format with five images each."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / 'data' / 'cifar-10-batches-py'
    folder.mkdir(parents=True)
    names = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']
    (folder / 'batches.meta').write_bytes(pickle.dumps(dict(label_names=names)))
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3072), dtype=np.uint8)
    for name in ('data_batch_1', 'test_batch'):
        (folder / name).write_bytes(pickle.dumps(dict(data=pixels, labels=[3, 3, 1, 0, 9])))
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, 'train_list', [['data_batch_1', None]])
    monkeypatch.setattr(cifar, 'test_list', [['test_batch', None]])
    monkeypatch.setattr(cifar, 'meta', dict(cifar.meta, md5=None))
    (code,) = blocks(ROOT / 'train_scripts' / 'README.md', 'python')
    exec(code, {})
    files = sorted(p.relative_to(tmp_path / 'cifar10').as_posix() for p in (tmp_path / 'cifar10').rglob('*.png'))
    assert files[5:] == ['train/airplane/00003.png', 'train/automobile/00002.png', 'train/cat/00000.png',
                         'train/cat/00001.png', 'train/truck/00004.png']  # fmt: skip
    with Image.open(tmp_path / 'cifar10' / files[0]) as image:
        assert (np.asarray(image) == pixels[3].reshape(3, 32, 32).transpose(1, 2, 0)).all()


def test_toy_gate_of_contributing(monkeypatch):
    (diff,) = blocks(ROOT / 'CONTRIBUTING.md', 'diff')
    module = diff[diff.index('@@') : diff.index('--- a/')]
    space = {}
    exec('\n'.join(line[1:] for line in module.splitlines() if line.startswith('+')), space)
    monkeypatch.setitem(GATES, 'scale', space['Scale'])
    model = timm.create_model('resnet18')
    insert(model, 'scale')
    assert sum(isinstance(m, space['Scale']) for m in model.modules()) == 8
    model = timm.create_model('resnet20', gate='scale')
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    gates = [m for m in model.modules() if isinstance(m, space['Scale'])]
    assert len(gates) == 9 and all(gate.weight.grad.any() for gate in gates)
