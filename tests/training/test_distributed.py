"""torchrun with gloo: two processes of timm's real train.py against one with twice the batch."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .recorded_run import record

ROOT = Path(__file__).parents[2]
PER_EPOCH = 5  # updates


def run(folder, processes, data, train_script, *options):
    """Train in this process, or in two by torchrun; returns what `record` wrote of each rank, and the summary."""
    folder.mkdir()
    argv = ['--data-dir', data, '--output', folder, '--experiment', 'run', '--workers', 0, '--epochs', 2, *options]
    argv += ['--opt', 'momentum', '--lr', 0.05, '--warmup-epochs', 0, '--batch-size', 8 // processes]
    argv = [str(arg) for arg in argv]
    if processes == 1:
        record(folder, argv, train_script)
    else:
        command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes)]
        command += [str(Path(__file__).with_name('recorded_run.py')), str(folder), *argv, str(train_script)]
        env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count('trained resnet20_') == 1
    ranks = range(processes)
    with open(folder / 'run' / 'summary.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    seen, losses = zip(*(json.loads((folder / f'seen-{r}.json').read_text()) for r in ranks), strict=True)
    return seen, losses, [load_file(folder / f'weights-{r}.safetensors') for r in ranks], rows


def test_two_processes_are_one_with_twice_the_batch(train_script, cifar10_few, tmp_path):
    """The same samples, losses and weights, with norms over each image: the statistics of a batch are a rank's own."""
    options = ['--model', 'resnet20_spem.cifar10', '--model-kwargs', 'norm_layer=groupnorm1', '--reprob', 0.5]
    options += ['--remode', 'const']  # noise is drawn on each rank's device
    (one,), (one_losses,), (one_weights,), one_rows = run(tmp_path / 'one', 1, cifar10_few, train_script, *options)
    two, two_losses, two_weights, two_rows = run(tmp_path / 'two', 2, cifar10_few, train_script, *options)
    assert len(one) == len(two[0]) == len(two[1]) == 2 * PER_EPOCH
    for epoch in (slice(PER_EPOCH), slice(PER_EPOCH, None)):
        union = [i for rank in two for batch in rank[epoch] for i in batch]
        assert len(union) == len({*union}) == 40
    for batch, *shares in zip(one, *two, strict=True):
        assert sorted(batch) == sorted(i for share in shares for i in share)
    assert all(weight.equal(two_weights[1][name]) for name, weight in two_weights[0].items())
    torch.testing.assert_close(torch.tensor(two_losses).mean(0), torch.tensor(one_losses), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(two_weights[0], one_weights, rtol=1e-3, atol=1e-4)
    for key in ('train_loss', 'eval_loss', 'eval_top1', 'train_penalty'):
        expected, found = ([float(row[key]) for row in rows] for rows in (one_rows, two_rows))
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_batch_norm(train_script, cifar10_few, tmp_path):
    """With batch norm each rank has its own batches' statistics; both end with the same weights and running means."""
    two, _, (first, second), _ = run(tmp_path / 'two', 2, cifar10_few, train_script, '--model', 'resnet20_saam.cifar10')
    assert len({i for rank in two for batch in rank[:PER_EPOCH] for i in batch}) == 40
    assert first['bn1.running_mean'].abs().sum() > 0
    assert all(weight.equal(second[name]) for name, weight in first.items())
