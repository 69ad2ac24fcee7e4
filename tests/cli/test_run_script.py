"""poolattn run SCRIPT.py: scripts of timm's, and others, with our models registered."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .test_cli import fails

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys, timm, beside
assert __name__ == '__main__'
print(json.dumps([sys.argv[1:], timm.is_model('resnet20_saam'), beside.VALUE]))
if '--fail' in sys.argv:
    sys.exit(3)
"""


def run(*args, cwd, code=0):
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-m', 'timm_poolattn', 'run', *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture
def timm_script(train_script):
    """A script of timm's by name, from where its train.py is."""

    def find(name):
        path = train_script.parent / name
        if not path.is_file():
            pytest.skip(f"no {name} beside timm's train.py")
        return path

    return find


def test_any_script(tmp_path):
    (tmp_path / 'scripts').mkdir()
    (tmp_path / 'scripts' / 'script.py').write_text(SCRIPT)
    (tmp_path / 'scripts' / 'beside.py').write_text('VALUE = 7\n')
    done = run('scripts/script.py', '--model', 'a', '-h', '--fail', cwd=tmp_path, code=3)
    assert json.loads(done.stdout) == [['--model', 'a', '-h', '--fail'], True, 7]


def test_mistakes_end_in_one_line():
    for args, message in (('nowhere.py',), 'nowhere.py: no such file'), ((), "Missing argument 'SCRIPT'"):
        assert fails('run', *args).startswith(f'Error: {message}')


def test_timms_validate(timm_script, image_folder, tmp_path):
    args = ['--model', 'resnet20_saam', '--num-classes', 2, '--device', 'cpu', '-j', 0, '-b', 4, '--input-size']
    run(timm_script('validate.py'), '--data-dir', image_folder, '--split', 'test', *args, 3, 32, 32, '--results-file',
        'r.csv', cwd=tmp_path)  # fmt: skip
    (row,) = csv.DictReader((tmp_path / 'r.csv').open())
    assert row['model'] == 'resnet20_saam' and row['param_count'] == '0.28'  # 281,051 in millions
    assert float(row['top5']) == 100


@pytest.mark.slow
def test_timms_inference(timm_script, image_folder, tmp_path):
    pytest.importorskip('pandas', reason="timm's inference.py writes its results with pandas")
    args = ['--model', 'resnet20_saam.cifar10', '--pretrained', '--device', 'cpu', '-j', 0, '-b', 4, '--topk', 1]
    run(
        timm_script('inference.py'),
        '--data-dir',
        image_folder / 'test' / 'cat',
        '--results-dir',
        'out',
        *args,
        cwd=tmp_path,
    )
    (file,) = (tmp_path / 'out').iterdir()
    assert len(list(csv.DictReader(file.open()))) == 4


@pytest.mark.slow
def test_timms_benchmark(timm_script, tmp_path):
    args = ['--model', 'resnet20_saam', '--device', 'cpu', '-b', 4, '--bench', 'inference', '--num-warm-iter', 1]
    done = run(timm_script('benchmark.py'), *args, '--num-bench-iter', 5, cwd=tmp_path)
    result = json.loads(done.stdout.partition('--result\n')[2])
    assert result['model'] == 'resnet20_saam' and result['param_count'] == 0.28
