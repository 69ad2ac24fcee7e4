import json
import math
import os
import subprocess
import sys

import click
import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image

from timm_poolattn.cli import main
from timm_poolattn.cli.options import echo_json
from timm_poolattn.report.model_list import list_models
from timm_poolattn.utils import released


def run(*args, code=0):
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result


#: As the script that an installed package has: `list` loads no torch then.
COMMAND = [sys.executable, '-c', 'import sys; sys.argv[0] = "poolattn"; from timm_poolattn.cli import main; main()']


def fails(*args):
    """The one line that a user's mistake ends in."""
    result = run(*args, code=2)
    assert result.output.startswith('Error: ') and result.output.count('\n') == 1, result.output
    return result.output


@pytest.fixture
def trained(tmp_path):
    """A model folder in timm's format (local-dir:...) that takes cats for dark, dogs for bright."""
    from timm.models import save_for_hf

    model = timm.create_model('resnet20_saam', num_classes=2)
    save_for_hf(model, tmp_path / 'model', model_config=dict(label_names=['cat', 'dog']), safe_serialization=True)
    return f'local-dir:{tmp_path / "model"}'


class TestList:
    def test_filter(self):
        rows = json.loads(run('list', 'resnet20_*a*m*', '--json').stdout)
        assert [r['model'] for r in rows] == ['resnet20_cbam', 'resnet20_saam', 'resnet20_saam2', 'resnet20_saam4']
        assert [r['gate'] for r in rows] == ['cbam', 'saam', 'saam2', 'saam4']
        assert rows[1]['parameters'] == 281051

    def test_table(self):
        lines = run('list', 'resnet20_saam').output.splitlines()
        assert lines[0].split() == ['model', 'family', 'gate', 'parameters', 'Mmult-adds', 'top-1', '(%)']
        assert lines[1].split()[:5] == ['resnet20_saam', 'cifar_resnet', 'saam', '281,051', '41.18']

    def test_multiply_adds(self):
        """What a module adds is what the SAAM paper's FLOPs column says: 0.01 SE, 0.11 SAAM, 0.21 CBAM (in 10^6)."""
        rows = {r['gate']: r['multiply_adds'] for r in list_models('resnet20*')}
        added = {gate: (rows[gate] - rows[None]) / 1e6 for gate in ('se', 'saam', 'cbam')}
        assert added == pytest.approx(dict(se=0.01, saam=0.11, cbam=0.21), abs=0.01)

    def test_multiply_adds_of_a_plain_network(self):
        """The stem, 3 stages of 3 blocks of 2 convs, 2 projections (SAAM's 3, stage 1 too), and the classifier."""
        at = {16: 32 * 32, 32: 16 * 16, 64: 8 * 8}
        convs = sum(9 * (c // (2 if i == 0 and c > 16 else 1)) * c * at[c] for c in at for i in range(6))
        shortcuts = 16 * 16 * at[16] + 16 * 32 * at[32] + 32 * 64 * at[64]
        assert list_models('resnet20')[0]['multiply_adds'] == 27 * 16 * at[16] + convs + shortcuts + 640

    def test_gates_and_families(self):
        rows = {r['model']: (r['family'], r['gate']) for r in list_models('*v*19*') + list_models('inception*fa')}
        assert rows['inception_v4_fa'] == ('cifar_inception_v4', 'fa')
        assert rows['cifar_vgg19'] == ('cifar_vgg', None)

    def test_no_match(self):
        assert "no model matches 'alexnet'; try `poolattn list '*alexnet*'`" in fails('list', 'alexnet')
        assert "no model matches '*nosuch*'; try `poolattn list`" in fails('list', '*nosuch*')
        assert "no trained model matches 'resnet326'; try `poolattn list`" in fails('list', 'resnet326', '--trained')

    def test_trained(self):
        rows = json.loads(run('list', '--trained', '--json').stdout)
        assert {f'{row["model"]}.{tag}' for row in rows for tag in row['weights']} == set(released())

    def test_a_tag(self):
        (row,) = json.loads(run('list', 'resnet20_saam.cifar10', '--json').stdout)
        assert row['model'] == 'resnet20_saam'

    def test_marks_downloads(self, monkeypatch):
        weights, top1 = dict(cifar10='packaged', cifar100='download'), dict(cifar10=91.0, cifar100=64.5)
        row = dict(model='a', family='b', gate=None, parameters=1, multiply_adds=2, top1=top1, weights=weights)
        monkeypatch.setattr('timm_poolattn.report.model_list.list_models', lambda *args, **kwargs: [row])
        assert run('list').stdout.endswith('  cifar10 91.00  cifar100 64.50 (download)\n')

    def test_rows_follow_the_registry(self):
        assert {r['gate'] for r in list_models('*fa*', trained=True)} == {'fa'}  # and not the tag ci-fa-r10
        assert [r['model'] for r in list_models('*20*.cifar100', trained=True)]
        assert [r['model'] for r in list_models('*20*')] == timm.list_models('*20*', module='cifar_resnet')


class TestPredict:
    @pytest.mark.parametrize(
        'mode, size, suffix',
        [('RGB', (32, 32), 'png'), ('L', (500, 20), 'png'), ('P', (3, 90), 'gif'), ('RGBA', (1, 1), 'png')]
        + [('CMYK', (64, 48), 'jpg'), ('1', (40, 40), 'bmp'), ('I;16', (33, 35), 'png'), ('LA', (9, 9), 'png')],
    )
    def test_any_size_and_mode(self, trained, tmp_path, mode, size, suffix):
        path = tmp_path / f'image.{suffix}'
        Image.new(mode, size).save(path)
        (result,) = json.loads(run('predict', path, '--model', trained, '--json').stdout)
        assert result['image'] == str(path)
        assert sorted(p['label'] for p in result['predictions']) == ['cat', 'dog']
        assert sum(p['probability'] for p in result['predictions']) == pytest.approx(1)
        assert result['predictions'][0]['probability'] >= 0.5

    def test_prints_classes(self, trained, image_folder):
        images = [image_folder / 'test' / 'cat' / f'{i}.png' for i in range(2)]
        lines = run('predict', *images, '--model', trained, '--topk', 1).output.splitlines()
        assert lines[0] == str(images[0]) and lines[1].split()[1] in ('cat', 'dog') and len(lines) == 4

    def test_is_the_models_softmax(self, trained, image_folder):
        path = image_folder / 'test' / 'cat' / '0.png'
        model = timm.create_model(trained, pretrained=True).eval()
        pixels = torch.tensor(np.asarray(Image.open(path))).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ('mean', 'std'))
        expected = model(((pixels - mean) / std)[None]).softmax(1).max().item()
        (result,) = json.loads(run('predict', path, '--model', trained, '--json').stdout)
        assert result['predictions'][0]['probability'] == pytest.approx(expected, rel=1e-4)

    def test_mistakes(self, trained, tmp_path):
        (tmp_path / 'text.jpg').write_text('no image')
        (tmp_path / 'folder.jpg').mkdir()
        assert 'nowhere.png: no such file' in fails('predict', 'nowhere.png', '--model', trained)
        assert 'cannot be decoded as an image' in fails('predict', tmp_path / 'text.jpg', '--model', trained)
        assert 'not a file' in fails('predict', tmp_path / 'folder.jpg', '--model', trained)
        assert 'nearest: resnet20_saam' in fails('predict', 'a.png', '--model', 'resnet20_sam')
        assert 'unknown model' in fails('predict', 'a.png', '--model', 'resnet20_saam.cifar1000')
        assert 'resnet326_srm has no weights yet' in fails('predict', 'a.png', '--model', 'resnet326_srm')
        assert 'no image given' in fails('predict')
        (row,) = json.loads(run('predict', 'nowhere.png', '--model', trained, '--json', code=2).stdout)
        assert 'no such file' in row['error']
        assert 'no-such-folder' in fails('predict', 'a.png', '--model', 'local-dir:no-such-folder')

    def test_no_traceback_in_a_real_process(self):
        done = subprocess.run([*COMMAND, 'list', 'resnet20_sam'], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith('Error: no model matches') and not done.stdout
        assert len(done.stderr.splitlines()) == 1


class TestValidate:
    def test_accuracy(self, trained, image_folder):
        result = json.loads(run('validate', '--model', trained, '--data-dir', image_folder, '--json').stdout)
        model = timm.create_model(trained, pretrained=True).eval()
        hits = 0
        mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ('mean', 'std'))
        for target, name in enumerate(('cat', 'dog')):
            for path in (image_folder / 'test' / name).iterdir():
                pixels = torch.tensor(np.asarray(Image.open(path))).permute(2, 0, 1).float() / 255
                hits += int(model(((pixels - mean) / std)[None]).argmax() == target)
        assert result['top1'] == 100 * hits / 8 and result['top5'] == 100 and result['images'] == 8

    def test_classes_are_matched_by_name(self, trained, image_folder):
        (image_folder / 'test' / 'cat').rename(image_folder / 'cat')
        only_dogs = json.loads(run('validate', '--model', trained, '--data-dir', image_folder, '--json').stdout)
        (image_folder / 'test' / 'dog').rename(image_folder / 'test' / 'cat')
        as_cats = json.loads(run('validate', '--model', trained, '--data-dir', image_folder, '--json').stdout)
        assert only_dogs['top1'] + as_cats['top1'] == 100

    def test_mistakes(self, trained, image_folder):
        assert 'no split' in fails('validate', '--model', trained, '--data-dir', image_folder, '--split', 'x')
        hold_out = ['validate', '--model', trained, '--hold-out', '--data-dir']
        assert 'only of a folder of classes' in fails(*hold_out, image_folder)
        assert 'only of a folder of classes' in fails(*hold_out, image_folder / 'test', '--split', 'train')
        (image_folder / 'test' / 'dog').rename(image_folder / 'test' / 'horse')
        assert 'not trained on the classes horse' in fails('validate', '--model', trained, '--data-dir', image_folder)


def test_train_without_script(monkeypatch, tmp_path):
    (tmp_path / 'work').mkdir()
    monkeypatch.chdir(tmp_path / 'work')
    monkeypatch.setenv('TIMM_TRAIN_SCRIPT', 'nowhere.py')
    assert 'Three ways to get it' in fails('train', '--model', 'resnet20_saam')


def test_bench_import():
    result = json.loads(run('bench', 'import', '--runs', 1, '--json').stdout)
    assert result.keys() == {'timm_ms', 'timm_poolattn_ms', 'ratio'} and all(v > 0 for v in result.values())


def test_bench_gates():
    args = ('--model', 'resnet20', '--gate', 'spem', '--dtype', 'float32', '--batch-size', 2, '--repeats', 1)
    args = (*args, '--device', 'cpu', '--layout', 'contiguous')
    rows = json.loads(run('bench', 'gates', *args, '--json').stdout)['rows']
    assert len(rows) == 9
    table = run('bench', 'gates', *args).stdout
    assert table.splitlines()[0].startswith('machine ') and len(table.splitlines()) == 2 + len(rows)
    assert "unknown gate 'foo'" in fails('bench', 'gates', '--gate', 'foo')


def test_bench_models(tmp_path):
    args = ('--model', 'resnet20_spem', '--layout', 'channels_last', '--batch-size', 2, '--repeats', 1)
    plain, spem = json.loads(run('bench', 'models', *args, '--device', 'cpu', '--json').stdout)['rows']
    assert (plain['model'], spem['model'], spem['layout']) == ('resnet20', 'resnet20_spem', 'channels_last')
    failure = fails('bench', 'models', '--model', 'resnet164_spem', '--repeats', 1, '--spem-authors', tmp_path)
    assert '--spem-authors takes a checkout' in failure


def test_bench_skip(image_folder, tmp_path, trained):
    from timm.models import save_for_hf

    model = timm.create_model('resnet20_fa', num_classes=2)
    labels = dict(label_names=['cat', 'dog'])
    save_for_hf(model, tmp_path / 'fa', model_config=labels, safe_serialization=True)
    name = f'local-dir:{tmp_path / "fa"}'
    rows = json.loads(run('bench', 'skip', '--model', name, '--data-dir', image_folder, '--json').stdout)
    assert [r['threshold'] for r in rows][:2] == [0.0, 0.1]
    assert rows[0]['blocks_run'] == 1 and rows[0]['speedup'] == 1
    assert rows[-1]['blocks_run'] == pytest.approx(1 / 9)  # an untrained k lies far below 0.9: all but block 0 go
    validated = json.loads(run('validate', '--model', name, '--data-dir', image_folder, '--json').stdout)
    assert rows[0]['top1'] == validated['top1']
    assert 'no FA gates' in fails('bench', 'skip', '--model', trained, '--data-dir', image_folder)


def commands(group=main, path=()):
    for name, command in group.commands.items():
        yield (*path, name), command
        yield from commands(command, (*path, name)) if isinstance(command, click.Group) else ()


def test_commands():
    top = {path[0] for path, _ in commands()}
    users = {'list', 'predict', 'validate', 'export', 'train', 'finetune', 'warm-start', 'explain', 'run', 'report'}
    assert top == users | {'demo', 'hub', 'plot', 'bench'}


@pytest.mark.parametrize('path, command', [pytest.param(*c, id=' '.join(c[0])) for c in commands()])
def test_help(path, command):
    assert run(*path, '--help').output.startswith(f'Usage: main {" ".join(path)} ')
    assert command.get_short_help_str().endswith('.') and '...' not in command.get_short_help_str()  # not cut


@pytest.mark.parametrize(
    'old, new',
    [(name, f'poolattn hub {name}') for name in ('release', 'verify', 'publish')]
    + [(name, f'poolattn plot {name}') for name in ('curves', 'lambda', 'ablation')]
    + [('cards', 'python -m timm_poolattn.hub'), ('readme', 'python -m timm_poolattn.report.readme_tables')]
    + [('validate.py', 'poolattn run validate.py')],
)
def test_commands_of_old(old, new):
    assert f'is `{new}` since 0.2.0' in fails(old, 'any', '--argument')


def test_misspelt():
    assert "unknown command 'valdate'; nearest: validate" in fails('valdate')
    assert "No such command 'gtes'" in fails('bench', 'gtes')
    assert "No such option '--modl'" in fails('predict', '--modl', 'x')


def test_json_has_no_nan(capsys):
    echo_json(dict(a=[math.nan, 1.5, (math.inf,)], b={'c': -math.inf}))
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == dict(a=[None, 1.5, [None]], b={'c': None})


def test_interrupted(monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr('timm_poolattn.report.model_list.list_models', interrupt)
    assert run('list', code=130).output == 'interrupted\n'


def test_broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, 'w') as out:
        done = subprocess.run([*COMMAND, 'list'], stdout=out, stderr=subprocess.PIPE, text=True)
    assert done.stderr == '' and done.returncode == 1
