"""Around the circle: the accuracy of train, of the release, of verify, of validate and of timm's own validate.py.

They are one number, whatever the model was trained with: each of them rebuilds the model and brings images to its size.
"""

import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from io import BytesIO
from pathlib import Path, PurePosixPath

import pytest
from click.testing import CliRunner
from PIL import Image

from timm_poolattn.cli import main
from timm_poolattn.hub import release, verify
from timm_poolattn.training import finetune, read_run, train

CLASSES = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']


@pytest.fixture
def make_data(cifar10_mini, tmp_path):
    """CIFAR-10, sixteen training and twelve test images of each class, changed as asked, in folders by class."""

    def make(classes=CLASSES, mode='RGB', size=32) -> Path:
        root, counts = tmp_path / 'data', Counter()
        with tarfile.open(cifar10_mini) as tar:
            for member in tar:
                split, name, file = ('', '', *PurePosixPath(member.name).parts)[-3:]
                counts[split, name] += 1
                if name in classes and counts[split, name] <= (16 if split == 'train' else 12):
                    (root / split / name).mkdir(parents=True, exist_ok=True)
                    image = Image.open(BytesIO(tar.extractfile(member).read())).convert(mode)
                    image.resize((size, size), Image.Resampling.BICUBIC).save(root / split / name / file)
        return root

    return make


def accuracies(folder: Path, data: Path, script: Path, tmp_path: Path) -> dict[str, float]:
    """Of a release folder, by all who say one."""
    said = dict(release=json.loads((folder / 'results.json').read_text())['test']['top1'])
    checks = verify(folder, data_dir=data)
    assert all(check.ok for check in checks), checks
    accuracy = next(check for check in checks if check.name == 'accuracy')
    said['verify'] = float(re.search(r'([\d.]+)%', accuracy.detail)[1])
    name = f'local-dir:{folder}'
    result = CliRunner().invoke(main, ['validate', '--model', name, '--data-dir', str(data), '--json'])
    assert result.exit_code == 0, result.output
    said['validate'] = json.loads(result.stdout)['top1']
    shutil.copy(script.with_name('validate.py'), tmp_path)  # away from its checkout, whose timm may be another
    command = [sys.executable, '-m', 'timm_poolattn', 'run', tmp_path / 'validate.py', '--model', name, '--pretrained']
    in_chans = json.loads((folder / 'config.json').read_text())['pretrained_cfg']['input_size'][0]
    command += ['--in-chans', str(in_chans), '--data-dir', data, '--split', 'test', '--device', 'cpu', '--workers', '0']
    done = subprocess.run([*command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said['timm'] = json.loads(done.stdout[done.stdout.index('{') :])['top1']
    return said


SLOW = pytest.mark.slow
CASES = [
    pytest.param({}, ['--gp', 'max'], id='max pooling'),
    pytest.param({}, ['--model-ema', '--model-ema-decay', '0.5', '--gp', 'avgmax'], id='average', marks=SLOW),
    pytest.param(dict(mode='L'), ['--input-size', '1', '32', '32'], id='grey', marks=SLOW),
    pytest.param(dict(size=40), ['--aa', 'rand-m1', '--workers', '0'], id="timm's loader", marks=SLOW),
    pytest.param(dict(size=48), ['--img-size', '48'], id='larger', marks=SLOW),
    pytest.param(dict(size=64), [], id='brought to size', marks=SLOW),
    pytest.param(dict(size=45), ['--crop-pct', '0.875'], id='margin', marks=SLOW),
    pytest.param(dict(classes=CLASSES[2:6]), ['--num-classes', '4'], id='fewer classes', marks=SLOW),
    pytest.param({}, ['--model-kwargs', 'stem_stride=2', '--drop', '0.1'], id='model arguments', marks=SLOW),
]


@pytest.mark.parametrize('data, options', CASES)
def test_train_and_release(make_data, train_script, tmp_path, data, options):
    data = make_data(**data)
    argv = ['--model', 'resnet20_saam.cifar10', '--pretrained', '--epochs', '1', '-b', '32', '--lr', '0.005']
    argv += ['--opt', 'momentum', '--warmup-epochs', '0', '--data-dir', str(data)]
    run = train([*argv, '--output', str(tmp_path / 'runs'), *options], timm_script=train_script)
    folder = release(run, 'photos', out=tmp_path / 'out')
    top1 = read_run(run).curve[-1]['eval_top1']
    assert 20 < top1 < 100
    said = accuracies(folder, data, train_script, tmp_path)
    assert said == {who: pytest.approx(top1, abs=0.01) for who in said}  # `verify` prints two digits


@pytest.mark.slow
def test_finetune_and_release(make_data, train_script, tmp_path):
    """A fine-tuned run is released under a tag of its own, its best epoch or its last."""
    data = make_data(classes=['bird', 'cat', 'dog'], size=50)
    argv = ['--epochs', '2', '--output', str(tmp_path / 'runs'), '--val-split', 'test', '--gp', 'max']
    tuned = finetune(data, argv, timm_script=train_script)
    run = read_run(tuned.model_dir.parent)
    assert tuned.top1 == pytest.approx(max(row['eval_top1'] for row in run.curve))
    for checkpoint, top1 in (('best', tuned.top1), ('last', run.curve[-1]['eval_top1'])):
        folder = release(run.folder, 'photos', checkpoint=checkpoint, out=tmp_path / checkpoint)
        said = accuracies(folder, data, train_script, tmp_path)
        assert said == {who: pytest.approx(top1, abs=0.01) for who in said}
