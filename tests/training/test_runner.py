"""`poolattn train` through timm's real train.py, on real image files, in processes of its own."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from timm_poolattn.training import read_curve
from timm_poolattn.training import train as run_train
from timm_poolattn.utils import UserError

ROOT = Path(__file__).parents[2]


def train(train_script, output, *args, code=0, env=None):
    command = [sys.executable, str(ROOT / 'train_scripts' / 'train.py'), '--timm-script', str(train_script)]
    command += [
        '--output',
        str(output),
        '--experiment',
        'run',
        '--workers',
        '0',
        '--log-interval',
        '1',
        *map(str, args),
    ]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), **(env or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=output)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def summary(output):
    with open(output / 'run' / 'summary.csv', newline='') as f:
        return list(csv.DictReader(f))


COMMON = ['--num-classes', 2, '--batch-size', 8, '--epochs', 2, '--warmup-epochs', 0, '--opt', 'momentum', '--lr', 0.05]


def test_spem_learns_and_logs_its_penalty(train_script, image_folder, tmp_path):
    (tmp_path / 'smoothless.yaml').write_text('smoothing: 0.0')
    config = ['--config', tmp_path / 'smoothless.yaml']
    args = [*config, '--model', 'resnet20_spem', '--data-dir', image_folder, *COMMON]
    done = train(train_script, tmp_path, *args, '--sched', 'constant', '--weight-decay', 0)
    rows = summary(tmp_path)
    # gamma starts at 0, so that in the first steps hardly anything but the penalty moves p
    p, velocity, penalties = 0.5, 0.0, []
    for _ in range(4):
        velocity = 0.9 * velocity + 0.1 * 2 * p
        p -= 0.05 * velocity
        penalties.append(9 * 2 * p**2)
    assert [float(r['train_penalty']) for r in rows] == pytest.approx(penalties[1::2], rel=1e-2)
    assert float(rows[-1]['train_mean_lambda']) == pytest.approx(0.5, abs=0.05)
    assert 'PenaltyClassificationTask: criterion=CrossEntropyLoss' in done.stderr
    assert 'random crop with padding 4' in done.stderr
    assert done.stdout.splitlines()[-1].startswith('trained resnet20_spem in ')
    run = json.loads((tmp_path / 'run' / 'run.json').read_text())
    assert run['arguments']['model'] == 'resnet20_spem' and 'data_dir' not in run['arguments']
    assert run['recipe'] == 'smoothless' and run['arguments']['smoothing'] == 0
    assert run['options']['penalty_weight'] == 0.1 and run['seed'] == 42 and run['versions']['torch']
    assert str(tmp_path) not in json.dumps(run)


def test_a_resumed_run_is_recorded(train_script, image_folder, tmp_path, caplog):
    """What is not as before is said too: a run goes on with what its command says."""
    args = ['--model', 'resnet20_saam', '--data-dir', image_folder, *COMMON[:-2], '--output', tmp_path]
    run = lambda *more: run_train([*map(str, [*args, '--experiment', 'run', *more])], timm_script=train_script)  # noqa: E731
    folder = run('--epochs', 1)
    assert 'not as before' not in caplog.text
    run('--resume', folder / 'last.pth.tar', '--smoothing', 0)
    assert '--resume: not as before: epochs 1 -> 2, smoothing not given -> 0.0' in caplog.text
    assert [row['epoch'] for row in read_curve(folder)] == [0, 1]
    record = json.loads((folder / 'run.json').read_text())
    assert record['arguments']['epochs'] == 2 and record['resumed'][0]['arguments']['epochs'] == 1 and record['ended']
    run('--resume', folder / 'last.pth.tar', '--smoothing', 0, '--drop', 0.1)  # no epoch is left
    assert json.loads((folder / 'run.json').read_text()) == record
    other_rate = ['--resume', folder / 'last.pth.tar', '--smoothing', 0, '--epochs', 3, '--lr', 0.012]
    with pytest.raises(UserError, match=r'--lr is 0\.012, and \S+ is of [\d.]+; give it as before, or'):
        run(*other_rate, '--data-dir', 'nowhere')  # said before any image is read
    for option, value, said in (
        ('--batch-size', 4, r'lr is [\d.]+ \(of --lr, or --lr-base and the batch size\)'),
        ('--weight-decay', 0.3, 'weight_decay is 0.3'),
        ('--momentum', 0.5, 'momentum is 0.5'),
        ('--opt', 'adamw', '--opt is adamw'),
        ('--layer-decay', 0.5, r'the optimizer has \d+ groups of parameters'),
    ):
        with pytest.raises(UserError, match=f'{said}, and .*; give'):
            run('--resume', folder / 'last.pth.tar', '--smoothing', 0, '--epochs', 3, option, value)
    assert json.loads((folder / 'run.json').read_text()) == record and len(read_curve(folder)) == 2
    run(*other_rate, '--no-resume-opt', '--min-lr', 0.012)
    assert read_curve(folder)[-1]['lr'] == pytest.approx(0.012)


def test_images_that_memory_does_not_hold(train_script, image_folder, tmp_path, monkeypatch):
    """numpy's error, and torch's."""
    args = ['--model', 'resnet20', '--data-dir', image_folder, *COMMON, '--output', tmp_path]
    for allocate in (np.empty, torch.empty):
        monkeypatch.setattr('timm_poolattn.training.runner.load_images', lambda *_, f=allocate, **__: f(2**50))
        with pytest.raises(UserError, match='cpu has not the memory; give less, or --no-resident, which reads images'):
            run_train([*map(str, args)], timm_script=train_script)


def test_mistakes_end_in_one_line(train_script, tmp_path):
    args = ['--model', 'resnet20_saam', '--data-dir', tmp_path / 'nowhere', *COMMON]
    done = train(train_script, tmp_path, *args, code=2)
    assert done.stderr.splitlines()[-1].endswith('nowhere: no such folder or tar file')
    assert 'Traceback' not in done.stderr


def test_stock_timm_trains_our_models(train_script, image_folder, tmp_path):
    """python train.py --device-modules timm_poolattn: no wrapper of ours."""
    script = tmp_path / 'train.py'  # by itself: python would take a timm beside it for the installed one
    script.write_bytes(train_script.read_bytes())
    command = [sys.executable, str(script), '--device-modules', 'timm_poolattn', '--model', 'resnet20_saam']
    command += ['--data-dir', str(image_folder), '--val-split', 'test', '--device', 'cpu']
    command += ['--input-size', '3', '32', '32']
    command += ['--output', str(tmp_path), '--experiment', 'run', '--workers', '0', *map(str, COMMON), '--epochs', '1']
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(summary(tmp_path)) == 1


def test_summary_of_a_resumed_run(tmp_path):
    """timm appends a second header, and an epoch whose checkpoint was not yet written comes again."""
    lines = ['epoch,eval_top1', '0,50.0', '1,60.0', 'epoch,eval_top1', '1,61.0', '2,70.0']
    (tmp_path / 'summary.csv').write_text('\n'.join(lines) + '\n')
    rows = read_curve(tmp_path)
    assert rows == [dict(epoch=e, eval_top1=t) for e, t in ((0, 50.0), (1, 61.0), (2, 70.0))]
