"""What a run survives, by timm's real train.py in real processes: kills, Ctrl-C, divergence, a full disk."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from timm_poolattn.training import RunStopped, read_curve, train
from timm_poolattn.training.recovery import Guard, newest_checkpoint

from .test_options import checkpoint, run_train

ROOT = Path(__file__).parents[2]
UPDATE = re.compile(r'Train: (\d+) \[ *(\d+)/')


@pytest.fixture
def one_thread():
    """Bitwise repeats need a fixed number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start(train_script, data, output, *options, **kwargs):
    command = [sys.executable, ROOT / 'train_scripts' / 'train.py', '--timm-script', train_script, '--data-dir', data]
    command += ['--output', output, '--experiment', 'run', '--model', 'resnet20_spem.cifar10', '--log-interval', 1]
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=data)
    return subprocess.Popen(list(map(str, [*command, *options])), **pipes, **kwargs)


def signal_after(process, epoch, update, number):
    """Send the signal once the log shows that update of that epoch; returns (exit code, output)."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        found = UPDATE.search(line)
        if found and (int(found[1]), int(found[2])) == (epoch, update):
            process.send_signal(number)
            break
    rest, _ = process.communicate()
    return process.returncode, ''.join(lines) + rest


@pytest.mark.parametrize('updates', [(2,), *(pytest.param(u, marks=pytest.mark.slow) for u in ((0, 4), (2, 1)))])
def test_killed_runs_resume_to_the_same_weights(train_script, cifar10_few, tmp_path, one_thread, updates):
    """SIGKILL in one epoch, or in two: weights, their average and the optimizer's state are bitwise the same."""
    epochs = 2 + len(updates)
    options = ['-b', 8, '--epochs', epochs, '--warmup-epochs', 1, '--lr', 0.05, '--opt', 'momentum']
    options += ['--sched-on-updates', '--mixup', 0.2, '--cutmix', 1.0, '--reprob', 0.5, '--remode', 'pixel']
    options += ['--drop', 0.2, '--drop-path', 0.2, '--model-ema', '--model-ema-decay', 0.9]
    killed, whole = tmp_path / 'killed', tmp_path / 'whole'
    for i, update in enumerate(updates):
        resume = ['--resume', killed / 'run' / 'last.pth.tar'] if i else []
        process = start(train_script, cifar10_few, killed, *options, *resume)
        code, log = signal_after(process, epoch=1 + i, update=update, number=signal.SIGKILL)
        assert code == -signal.SIGKILL, log
    run_train(train_script, cifar10_few, killed, *options, '--resume', killed / 'run' / 'last.pth.tar')
    run_train(train_script, cifar10_few, whole, *options)
    one, other = checkpoint(whole / 'run'), checkpoint(killed / 'run')
    for key in ('state_dict', 'state_dict_ema'):
        assert one[key].keys() == other[key].keys()
        assert all(weight.equal(other[key][name]) for name, weight in one[key].items()), f'killed at {updates}'
    for index, state in one['optimizer']['state'].items():
        assert state['momentum_buffer'].equal(other['optimizer']['state'][index]['momentum_buffer'])
    assert [row['epoch'] for row in read_curve(killed / 'run')] == [*range(epochs)]


@pytest.mark.usefixtures('cifar10_mini')  # released weights know real images alone
def test_the_best_epoch_outlives_a_resume(train_script, cifar10_few, tmp_path):
    # the first epoch's rate is 0, that of the others spoils the weights
    options = ['--pretrained', '--checkpoint-hist', 2, '--lr', 1, '--warmup-lr', 0, '--warmup-epochs', 1]
    run = run_train(train_script, cifar10_few, tmp_path, *options)
    for epochs in (2, 3):
        run_train(train_script, cifar10_few, tmp_path, *options, '--epochs', epochs, '--resume', 'auto')
    first, *others = (row['eval_top1'] for row in read_curve(run))
    assert len(others) == 2 and first > max(others)
    best = checkpoint(run, 'model_best')
    assert (best['epoch'], best['metric']) == (0, first)
    names = {path.name for path in run.glob('checkpoint-*')}
    assert 'checkpoint-0.pth.tar' in names and len(names) == 2
    run_train(train_script, cifar10_few, tmp_path, *options, '--epochs', 2, '--resume', run / 'checkpoint-0.pth.tar')
    record = json.loads((run / 'run.json').read_text())
    assert [part['after_epochs'] for part in record['resumed']] == [1, 2, 1]


def test_repeats_on_any_worker_count(train_script, cifar10_few, tmp_path, one_thread):
    for name, count in (('a', 0), ('b', 2)):
        run_train(train_script, cifar10_few, tmp_path / name, '--workers', count, '--reprob', 1, '--mixup', 0.2)
    one, other = (checkpoint(tmp_path / name / 'run')['state_dict'] for name in 'ab')
    assert all(weight.equal(other[name]) for name, weight in one.items())


def test_truncated_checkpoint(train_script, cifar10_few, tmp_path):
    run = run_train(train_script, cifar10_few, tmp_path, '--epochs', 2)
    last = run / 'last.pth.tar'
    whole = last.read_bytes()
    resume = lambda path: run_train(train_script, cifar10_few, tmp_path, '--resume', path)  # noqa: E731
    last.unlink()  # of its own, for timm links it to checkpoint-1
    os.utime(run / 'checkpoint-0.pth.tar')  # a copy of the folder may have any times
    shutil.copy(run / 'checkpoint-0.pth.tar', run / 'checkpoint-7 (1).pth.tar')
    for damaged in (whole[: len(whole) // 2], b'', whole[:300_000] + b'?' + whole[300_001:]):
        last.write_bytes(damaged)
        with pytest.raises(ValueError, match=r'last.pth.tar is damaged: .* newest whole one is .*checkpoint-1.pth.tar'):
            resume(last)
    (run / 'checkpoint-1.pth.tar').write_bytes(whole[:1000])  # model_best may be the same file
    with pytest.raises(ValueError, match=r'checkpoint-1.pth.tar is damaged.*checkpoint-0.pth.tar'):
        resume(run / 'checkpoint-1.pth.tar')
    for path in run.glob('*.pth.tar'):
        path.write_bytes(b'')
    with pytest.raises(ValueError, match='no other in its folder is whole'):
        resume(last)
    with pytest.raises(FileNotFoundError, match=r'--resume: no file .*nowhere.pth.tar'):
        resume(run / 'nowhere.pth.tar')


@pytest.mark.parametrize('accumulate', [1, 2])
def test_diverging_loss(train_script, cifar10_few, tmp_path, accumulate):
    """lr is 0 in the first epoch, and too high from the second one on; nothing of the second one is kept."""
    options = ['-b', 8, '--epochs', 3, '--lr', 1e30, '--warmup-lr', 0, '--warmup-epochs', 1]
    with pytest.raises(RunStopped) as stopped:
        run_train(train_script, cifar10_few, tmp_path, *options, '--grad-accum-steps', accumulate)
    message = str(stopped.value)
    assert re.match(r'the loss is (nan|inf) in epoch 1, update \d of the epoch, at learning rate 7.5e\+29', message)
    assert message.endswith(f'--output {tmp_path} --experiment run --resume {tmp_path}/run/last.pth.tar')
    assert checkpoint(tmp_path / 'run')['epoch'] == 0
    assert all(w.isfinite().all() for w in checkpoint(tmp_path / 'run')['state_dict'].values())


def test_no_resume_is_offered_that_would_be_refused(train_script, cifar10_few, tmp_path):
    options = ['-b', 8, '--epochs', 3, '--lr', 1e30, '--warmup-lr', 0, '--warmup-epochs', 1, '--sched', 'plateau']
    with pytest.raises(RunStopped, match=r'lower --lr, or clip with --clip-grad 1\.$'):
        run_train(train_script, cifar10_few, tmp_path, *options)
    assert (tmp_path / 'run' / 'last.pth.tar').is_file()


NOT_SAVED = (
    r'epoch 1 could not be saved in \S+, whose disk has ([\d.]+) GB free \(.*\); free some, or name another --output\.'
    r' To go on from .* --resume (.*)'
)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB: one checkpoint of resnet20_spem and half of another."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', folder], capture_output=True).returncode:
        pytest.skip('mounting a small file system needs root')
    yield folder
    subprocess.run(['umount', '-l', folder], check=True)


def test_full_disk(train_script, cifar10_few, small_disk):
    with pytest.raises(RunStopped) as stopped:
        run_train(train_script, cifar10_few, small_disk, '--epochs', 2)
    free, resume = re.fullmatch(NOT_SAVED, str(stopped.value)).groups()
    assert float(free) < 0.004 and resume == f'{small_disk}/run/last.pth.tar'
    assert checkpoint(small_disk / 'run')['epoch'] == 0 and not list((small_disk / 'run').glob('*tmp*'))


def test_a_checkpoint_is_on_the_disk(train_script, cifar10_few, tmp_path, monkeypatch):
    """What a power cut after an epoch leaves: the checkpoint itself, not only its name."""
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, 'fsync', lambda handle: synced.append(os.fstat(handle).st_ino) or fsync(handle))
    run = run_train(train_script, cifar10_few, tmp_path, '-b', 40, '--warmup-epochs', 0)
    assert {run.stat().st_ino, (run / 'last.pth.tar').stat().st_ino} <= {*synced}


def test_a_checkpoint_that_cannot_be_written(train_script, cifar10_few, tmp_path):
    """A limit on the size of files, in a process of its own: one line, the checkpoint before it is kept."""
    options = ['-b', 16, '--warmup-epochs', 0, '--opt', 'momentum', '--lr', 0.05]
    first = run_train(train_script, cifar10_few, tmp_path, *options)
    last = first / 'last.pth.tar'
    before = last.read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))  # noqa: E731
    process = start(train_script, cifar10_few, tmp_path, *options, '--epochs', 2, '--resume', last, preexec_fn=limit)
    log, _ = process.communicate()
    assert process.returncode == 2 and 'Traceback' not in log, log
    assert re.fullmatch(f'Error: {NOT_SAVED}', log.splitlines()[-1])
    assert last.read_bytes() == before and not list(first.glob('*tmp*'))


def test_an_interrupt_waits_for_the_end_of_a_save(tmp_path):
    """timm removes the best checkpoint before it links the new one. A second does too, and a third is obeyed."""

    def save(*args, **kwargs):
        for _ in range(presses):
            os.kill(os.getpid(), signal.SIGINT)
        (tmp_path / 'last.pth.tar').write_bytes(b'')

    guard = Guard(seed=0, on_save=lambda: saved.append(guard.interrupts))
    guard.saver, saved = Namespace(checkpoint_dir=tmp_path, curr_recovery_file='a file'), []
    guard.saver.save_recovery = guard._named(save)
    for count, written in ((1, [1]), (2, [1, 2]), (3, [1, 2])):
        guard.interrupts, presses = 0, count
        with guard.watching(), pytest.raises(KeyboardInterrupt):
            guard._named(save)(0)
        assert saved == written and not guard.saving
    guard.interrupts, guard.update, presses = 1, 1, 1  # while it saves what the first interrupted
    with guard.watching():
        assert 'Saved a file' in guard.save_interrupted()


class TestInterrupt:
    OPTIONS = ('-b', 4, '--epochs', 3, '--warmup-epochs', 0, '--lr', 0.05, '--opt', 'momentum')

    def test_saves_and_says_how_to_resume(self, train_script, cifar10_few, tmp_path, one_thread):
        process = start(train_script, cifar10_few, tmp_path, *self.OPTIONS)
        code, log = signal_after(process, epoch=1, update=3, number=signal.SIGINT)
        assert code == 130 and 'Traceback' not in log, log
        last = log.splitlines()[-1]
        recovery, whole = tmp_path / 'run' / 'recovery-1', tmp_path / 'run' / 'last.pth.tar'
        found = re.fullmatch(
            rf'interrupted in epoch 1 after (\d+) updates. Saved ({recovery}-\d+.pth.tar), to go on with epoch 2.'
            rf' To go on from the last whole epoch, as if nothing had happened: the same command with --output'
            rf' {tmp_path} --experiment run --resume {whole}',
            last,
        )
        assert found and 4 <= int(found[1]) <= 10, last
        assert checkpoint(tmp_path / 'run')['epoch'] == 0
        assert json.loads((tmp_path / 'run' / 'run.json').read_text())['seed'] == 42
        shutil.copytree(tmp_path / 'run', tmp_path / 'other' / 'run')
        # both ways go on to the end
        run_train(train_script, cifar10_few, tmp_path, *self.OPTIONS, '--resume', whole)
        assert [row['epoch'] for row in read_curve(tmp_path / 'run')] == [0, 1, 2]
        recovered = tmp_path / 'other' / 'run' / Path(found[2]).name
        run_train(train_script, cifar10_few, tmp_path / 'other', *self.OPTIONS, '--resume', recovered)
        assert [row['epoch'] for row in read_curve(tmp_path / 'other' / 'run')] == [0, 2]

    def test_before_the_first_whole_epoch(self, train_script, cifar10_few, tmp_path, one_thread):
        process = start(train_script, cifar10_few, tmp_path, *self.OPTIONS)
        _, log = signal_after(process, epoch=0, update=3, number=signal.SIGINT)
        said = (
            r'.* to go on with epoch 1. That is: the same command with --output (\S+) --experiment run --resume (\S+)'
        )
        output, recovery = re.fullmatch(said, log.splitlines()[-1]).groups()
        run_train(train_script, cifar10_few, Path(output), *self.OPTIONS, '--resume', recovery)
        assert [row['epoch'] for row in read_curve(tmp_path / 'run')] == [1, 2]

    @pytest.mark.slow
    def test_in_the_first_epoch(self, train_script, cifar10_few, tmp_path):
        process = start(train_script, cifar10_few, tmp_path, *self.OPTIONS)
        code, log = signal_after(process, epoch=0, update=2, number=signal.SIGINT)
        assert code == 130
        assert re.search(r'interrupted in epoch 0 after \d+ updates. Saved .*, to go on with epoch 1.$', log.strip())
        assert newest_checkpoint(tmp_path / 'run') is None


@pytest.mark.slow
def test_two_processes_decode_at_once(train_script, cifar10_few, tmp_path):
    """Both runs decode the same data set into one cache, which is whole afterwards."""
    options = ['-b', 16, '--epochs', 1, '--warmup-epochs', 0]
    processes = [start(train_script, cifar10_few, tmp_path / name, *options) for name in 'ab']
    for process in processes:
        log, _ = process.communicate()
        assert process.returncode == 0, log
    one, other = (checkpoint(tmp_path / name / 'run')['state_dict'] for name in 'ab')
    assert all(weight.equal(other[name]) for name, weight in one.items())
    cache = list((tmp_path / 'cache').iterdir())
    assert sorted(p.name.rsplit('-', 2)[1] for p in cache) == ['train', 'validation']
    times = [p.stat().st_mtime_ns for p in cache]
    train(['--data-dir', str(cifar10_few), '--output', str(tmp_path / 'c'), '--experiment', 'run', '--epochs', '1',
           '--model', 'resnet20', '-b', '40'], timm_script=train_script)  # fmt: skip
    assert [p.stat().st_mtime_ns for p in cache] == times  # read, not decoded again
