#!/usr/bin/env python3
"""Train a manifest of models into release folders, on machines that may be taken away at any moment.

    python train_scripts/zoo.py --data-root DATA                  # what train_scripts/zoo.yaml lists, in its order
    python train_scripts/zoo.py --data-root DATA --time-budget 8  # stop after 8 hours, checkpointed
    python train_scripts/zoo.py --data-root DATA --plan           # only print what is left and how long it takes

A manifest is a YAML list; an entry stands for every combination of its models, data sets and seeds:

    - models: [resnet20_saam, resnet20_fa]
      data: [cifar10, cifar100]           # DATA/cifar10 and so on: folders by class
      recipe: saam-{data}                 # a recipe of `poolattn train`
      epochs: 60                          # default: the recipe's
      seeds: [42]                         # default: [42]
      warm_start: '{model}.cifar10'       # source of `poolattn warm-start`; default: none
      args: [--lr, '0.012']               # more arguments of `poolattn train`; default: none

A run with a results file is done. The others are trained by `poolattn train`, several at once, each resumed from its
latest whole checkpoint, and laid out by `poolattn hub release`. Where a model has a release folder already, the better
of the two by last-epoch accuracy is in hub_configs, and the other leaves its results file. After any interruption the
same command goes on where the last one stopped; several may work on one --runs folder.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count, product
from pathlib import Path
from statistics import median
from typing import Any

import click
import timm
import torch
import yaml

import timm_poolattn  # noqa: F401  registers the models
from timm_poolattn.data.listing import list_split
from timm_poolattn.models import check_model_name
from timm_poolattn.report.results import RESULTS_DIR, load_results
from timm_poolattn.training import read_curve, recipes
from timm_poolattn.utils import UserError, hub_configs_dir, look_up, progress, replacing, write_text

HERE = Path(__file__).parent
KEYS = ('models', 'data', 'recipe', 'epochs', 'seeds', 'warm_start', 'args')  # of an entry
#: Arguments of train.py that the zoo sets itself.
TAKEN = ('--recipe', '--config', '--model', '--epochs', '--seed', '--data-dir', '--data', '--dataset', '--val-split')
TAKEN += ('--device', '--output', '--experiment', '--resume', '--initial-checkpoint')


@dataclass(frozen=True)
class Run:
    """One training of the manifest, in `folder` of the runs."""

    model: str
    data: str
    recipe: str
    epochs: int
    seed: int
    warm_start: str | None
    args: tuple[str, ...]
    folder: Path

    @property
    def epochs_done(self) -> int:
        curve = read_curve(self.folder)  # without a row for epochs that --val-interval leaves out
        return int(curve[-1]['epoch']) + 1 if curve and (self.folder / 'last.pth.tar').is_file() else 0

    def has_ended(self) -> bool:
        """Return True if train.py came to its end, which a curve does not say: its last checkpoint may be missing."""
        with suppress(OSError, ValueError):
            ended = json.loads((self.folder / 'run.json').read_text()).get('ended', False)
            return ended and (self.folder / 'last.pth.tar').is_file()
        return False

    def is_done(self) -> bool:
        """Return True if a results file, of a release or not, is this run's."""
        mine = (self.model, self.data, self.recipe, self.seed, self.epochs)
        return any(
            # what was asked for: --cooldown-epochs make a run longer
            (r['model'], r['tag'], r.get('recipe'), r['seed'], r['arguments'].get('epochs', r['epochs'])) == mine
            for r in load_results()
        )

    def commands(self, data_root: Path, device: str) -> Iterator[list[str]]:
        """Yield what is left to do, each to be run when the one before it has succeeded."""
        poolattn = [sys.executable, '-m', 'timm_poolattn']
        name, start = f'{self.model}.{self.data}', self.folder / 'warm-start.safetensors'
        begin = ['--resume', 'auto']
        if self.warm_start:
            if not start.is_file():
                yield [*poolattn, 'warm-start', self.warm_start, name, '-o', str(start)]
            begin += ['--initial-checkpoint', str(start)]  # which --resume overrides, and the run's record names
        data = ['--data-dir', str(data_root / self.data)]
        train = ['--model', name, '--epochs', str(self.epochs), '--seed', str(self.seed)]
        train += ['--val-split', 'test', '--device', device]
        output = ['--output', str(self.folder.parent), '--experiment', self.folder.name]
        if not self.has_ended():
            yield [*poolattn, 'train', '--recipe', self.recipe, *train, *data, *output, *begin, *self.args]
        out = ['--out', str(self.folder / 'release'), '--replace']  # which `keep_better` moves
        yield [*poolattn, 'hub', 'release', str(self.folder), '--tag', self.data, *data, *out]


def read_manifest(path: Path, runs: Path) -> list[Run]:
    """Return the manifest's runs in its order, but for those that are done.

    Raises:
        UserError: an entry that is not as the head of this file has it, or two entries for one run.
    """
    todo: dict[Path, Run] = {}
    try:
        entries = yaml.safe_load(path.read_text()) or []
    except yaml.YAMLError as e:
        raise UserError(f'{path}: no YAML: {" ".join(str(e).split())}') from e
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f'{path}: a manifest is a list of entries, each with {", ".join(KEYS[:3])}')
    for entry in entries:
        _check_entry(entry, path)
        for model, data, seed in product(entry['models'], entry['data'], entry.get('seeds', [42])):
            recipe = entry['recipe'].replace('{data}', data)
            look_up('recipe', recipe, recipes(), f'named in {path}')
            check_model_name(f'{model}.{data}')
            epochs = entry.get('epochs', yaml.safe_load(recipes()[recipe].read_text())['epochs'])
            warm_start = (entry.get('warm_start') or '').replace('{model}', model) or None
            folder = runs / f'{model}.{data}-{recipe}-{epochs}-{seed}'
            if folder in todo:
                raise UserError(f'{path}: {folder.name} is there twice; runs differ by recipe, epochs or seed')
            args = tuple(map(str, entry.get('args', ())))
            todo[folder] = Run(model, data, recipe, epochs, seed, warm_start, args, folder)
    return [run for run in todo.values() if not run.is_done()]


def _check_entry(entry: dict[str, Any], path: Path) -> None:
    for key in entry:
        look_up('key', key, KEYS, f'of an entry of {path}')
    if missing := [key for key in KEYS[:3] if key not in entry]:
        raise UserError(f'{path}: an entry lacks {", ".join(missing)}: {entry}')
    for key in ('models', 'data', 'seeds', 'args'):
        if not isinstance(entry.get(key, []), list):
            raise UserError(f'{path}: {key} is {entry[key]!r}, and must be a list: [{entry[key]}]')
    if not isinstance(entry['recipe'], str):
        raise UserError(f'{path}: recipe is {entry["recipe"]!r}, and must be a name')
    for number in (*([entry['epochs']] if 'epochs' in entry else []), *entry.get('seeds', [])):
        if type(number) is not int or number < 0:
            raise UserError(f'{path}: {number!r} is no whole number, as epochs and seeds must be')
    if taken := [arg for arg in map(str, entry.get('args', ())) if arg.partition('=')[0] in TAKEN]:
        raise UserError(f'{path}: {taken[0]} in args: the zoo sets it itself; epochs and seeds are keys of an entry')


def seconds_per_image(model: str, device: str, batch_size: int = 128, steps: int = 3) -> tuple[float, int]:
    """Measure training in a few steps, and the device memory that it takes in bytes (0 on a CPU)."""
    net = timm.create_model(model).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    input = torch.randn(batch_size, *net.default_cfg['input_size'], device=device)
    input = input.contiguous(memory_format=torch.channels_last)
    on_gpu = device == 'cuda'
    times = []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(1 + steps):
        start = time.perf_counter()
        net(input).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[1:]) / batch_size, torch.cuda.max_memory_reserved() if on_gpu else 0


def make_plan(todo: list[Run], data_root: Path, device: str, jobs: int | None) -> tuple[list[float], int]:
    """Return seconds that each run still takes if it had the device to itself, and how many run at once."""
    torch.set_num_threads(1)  # a run on the CPU has one
    measured = {
        model: seconds_per_image(model, device)
        for model in progress(dict.fromkeys(run.model for run in todo), desc='measuring', unit='model')
    }
    images = {data: len(list_split(data_root / data, 'train').images) for data in {run.data for run in todo}}
    seconds = [(r.epochs - r.epochs_done) * images[r.data] * measured[r.model][0] for r in todo]
    if jobs is None:
        jobs = os.cpu_count()
        if device == 'cuda':
            memory = torch.cuda.get_device_properties(0).total_memory
            # four small networks fill a large GPU; more only wait for one another
            jobs = torch.cuda.device_count() * max(1, min(4, int(0.8 * memory / max(m for _, m in measured.values()))))
    return seconds, jobs


class Job:
    """A run in progress: its processes one after the other, and the lock that keeps others off its folder."""

    def __init__(self, run: Run, data_root: Path, device: str, slot: int) -> None:
        self.run = run
        run.folder.mkdir(parents=True, exist_ok=True)
        self.lock = (run.folder / '.lock').open('w')
        fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: another process trains it
        self.log = (run.folder / 'log.txt').open('a')
        self.commands = run.commands(data_root, device)
        self.slot = slot
        self.env = dict(os.environ)
        if device == 'cuda':
            given = self.env.get('CUDA_VISIBLE_DEVICES')
            ids = given.split(',') if given else list(map(str, range(torch.cuda.device_count())))
            self.env['CUDA_VISIBLE_DEVICES'] = ids[slot % len(ids)]
        else:
            self.env.setdefault('OMP_NUM_THREADS', '1')
        self.process = self._next()

    def _next(self) -> subprocess.Popen | None:
        command = next(self.commands, None)
        if command is None:
            return None
        # the children hold the lock too: should this process be killed, its orphans keep the folder until they end
        fds = (self.lock.fileno(),)
        streams = dict(stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT)
        return subprocess.Popen(command, env=self.env, pass_fds=fds, start_new_session=True, **streams)

    def poll(self) -> int | None:
        """Return None while it goes on, else the exit code."""
        code = self.process.poll()
        if code != 0:
            return code
        self.process = self._next()
        return None if self.process else 0

    def stop(self) -> None:
        """Let train.py end as Ctrl-C ends it; its last checkpoint is whole."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGINT)
        self.process.wait()

    def close(self) -> None:
        self.log.close()
        self.lock.close()


def keep_better(new: Path, hub_configs: Path) -> Path:
    """Move a release folder to `hub_configs` unless a better one is there; the worse leaves its results file."""
    here = hub_configs / new.name
    results = {path: json.loads((path / 'results.json').read_text()) for path in (new, here) if path.exists()}
    top1 = {path: r.get('last_epoch_top1') or r['test']['top1'] for path, r in results.items()}
    worst_first = sorted(results, key=top1.get)
    for worse in worst_first[:-1]:
        text = (worse / 'results.json').read_text()
        stem = '{model}.{tag}-{recipe}-{epochs}-{seed}'.format(**{'recipe': 'unnamed', **results[worse]})
        names = (RESULTS_DIR / f'{stem}{number}.json' for number in chain([''], (f'-{i}' for i in count(2))))
        left = next(path for path in names if not path.is_file() or path.read_text() == text)
        write_text(left, text)
    if worst_first[-1] == here:
        return left
    with replacing(here) as staged:  # the runs may lie on another disk
        shutil.copytree(new, staged)
    return here


def train_all(todo: list[Run], data_root: Path, device: str, jobs: int, deadline: float) -> tuple[int, list[str]]:
    """Train and release until nothing is left or the deadline has come; returns how many, and what failed."""
    waiting, running, failed, finished = list(todo), [], [], 0
    bar = progress(total=sum(run.epochs for run in todo), unit='epoch', smoothing=0)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                slot = min(set(range(jobs)) - {job.slot for job in running})
                run = waiting.pop(0)
                with suppress(BlockingIOError):
                    if not run.is_done():  # by another process since
                        running.append(Job(run, data_root, device, slot))
            for job in list(running):
                code = job.poll()
                if code is None:
                    continue
                running.remove(job)
                job.close()
                if code:
                    failed.append(f'{job.run.folder.name}: exit code {code}, see {job.run.folder / "log.txt"}')
                    bar.write(failed[-1])
                    continue
                release = job.run.folder / 'release' / f'{job.run.model}.{job.run.data}'
                bar.write(f'{job.run.folder.name} -> {keep_better(release, hub_configs_dir())}')
                finished += 1
            bar.n = sum(run.epochs_done for run in todo)
            bar.set_description(', '.join(job.run.model for job in running))
            if time.monotonic() > deadline:
                break
            time.sleep(1)
    finally:
        for job in running:
            job.stop()
            job.close()
        bar.close()
    return finished, failed


@click.command()
@click.option('--data-root', required=True, type=click.Path(path_type=Path, exists=True), help='Holds cifar10/, ...')
@click.option('--manifest', type=click.Path(path_type=Path, exists=True), default=HERE / 'zoo.yaml')
@click.option('--runs', type=click.Path(path_type=Path), default='runs', show_default=True, help='Their folder.')
@click.option('--time-budget', type=float, default=float('inf'), help='Hours. Default: until all is done.')
@click.option('--jobs', type=click.IntRange(1), help='Runs at once. Default: one a core, or as many as fit the GPUs.')
@click.option('--plan', is_flag=True, help='Print the plan and stop.')
def main(data_root: Path, manifest: Path, runs: Path, time_budget: float, jobs: int | None, plan: bool) -> None:
    """Train what a manifest lists and no results file has, into release folders. See the head of this file."""
    deadline = time.monotonic() + 3600 * time_budget
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('terminated; the same command goes on'))  # runs the finally
    try:
        _train(read_manifest(manifest, runs), data_root, jobs, plan, deadline)
    except UserError as e:
        raise click.ClickException(str(e)) from e


def _train(todo: list[Run], data_root: Path, jobs: int | None, plan: bool, deadline: float) -> None:
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    for data in sorted({run.data for run in todo if not (data_root / run.data).is_dir()}):
        click.echo(f'left out: {sum(run.data == data for run in todo)} runs on {data}, which {data_root} does not hold')
    todo = [run for run in todo if (data_root / run.data).is_dir()]
    if not todo:
        click.echo('nothing to train; what has a results file of its model, data, recipe, epochs and seed is done')
        return
    seconds, jobs = make_plan(todo, data_root, device, jobs)
    for run, s in zip(todo, seconds, strict=True):
        click.echo(f'{run.folder.name:<45} epochs {run.epochs_done:>3} of {run.epochs:<3}  about {s / 3600:7.2f} h')
    total = f'{sum(seconds) / 3600:.1f} h of work'
    click.echo(f'{len(todo)} runs, {total} if each had the {device} to itself; {jobs} at once')
    if plan:
        return
    finished, failed = train_all(todo, data_root, device, jobs, deadline)
    click.echo(f'finished {finished} of {len(todo)} runs, {len(failed)} failed; the same command does the rest')
    sys.exit(bool(failed))


if __name__ == '__main__':
    main()
