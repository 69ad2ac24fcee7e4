#!/usr/bin/env python3
"""Insert gates into a trained plain network and fine-tune it, beside the plain network fine-tuned alike.

    python train_scripts/insert_gates.py --data-dir cifar10/ --model resnet20.cifar10 --epochs 3 [ARGUMENTS OF TRAIN.PY]

Each --gate starts without effect (`identity_init`), so every run starts at the plain network's accuracy. The
accuracy is that of the last epoch. A run from these weights with a results file is done; the others go on from their
last checkpoint, so after any interruption the same command does the rest. `python -m
timm_poolattn.report.readme_tables` makes the table of timm_poolattn/models/README.md from the files.
"""

import json
from itertools import product
from pathlib import Path

import click
import timm
import torch
from timm.models import register_model
from torch import nn

import timm_poolattn
from timm_poolattn.bench.backbones import plain_args
from timm_poolattn.layers import GATES
from timm_poolattn.report.results import INSERTIONS_DIR, released_results
from timm_poolattn.training import read_run, train
from timm_poolattn.utils import UserError, look_up, write_text

KINDS = (*GATES, 'fa')
TAKEN = ('--model-kwargs', '--num-classes', '--output', '--experiment', '--resume', '--recipe', '--config')
LEARNING_RATE = 0.003  # a tenth of the recipe's: the network is trained already


@register_model
def inserted(pretrained: bool = False, base: str = '', gate: str = '', **kwargs) -> nn.Module:
    """Build `base` with its weights, and insert `gate`, if it names one."""
    model = timm.create_model(base, pretrained=True, **kwargs)
    return timm_poolattn.insert(model, gate) if gate else model


def first_weights(model: str) -> dict[str, float | str]:
    """Return what tells a release of `model` from an earlier or later one."""
    release = released_results()[model]
    return dict(top1=release['test']['top1'], data_sha256=release['weights']['data_sha256'])


def run_name(model: str, gate: str, seed: int, epochs: int) -> str:
    """Name a run's folder and its results file: other first weights are another run."""
    return f'{model}-{first_weights(model)["data_sha256"][:8]}-{gate or "plain"}-{epochs}-{seed}'


def fine_tune(model: str, gate: str, seed: int, epochs: int, data_dir: str, runs: Path, train_args: list[str]) -> dict:
    """Train one; returns what its results file holds."""
    name = run_name(model, gate, seed, epochs)
    kwargs = [f"base='{model}'", *([f"gate='{gate}'"] if gate else [])]
    argv = ['--lr', str(LEARNING_RATE), *train_args, '--model', 'inserted', '--model-kwargs', *kwargs]
    argv += ['--epochs', str(epochs), '--seed', str(seed), '--data-dir', data_dir, '--val-split', 'test']
    argv += ['--output', str(runs), '--experiment', name, '--resume', 'auto']
    run = read_run(train(argv, recipe='cpu', crop_padding=2))  # the padding of the released networks' own training
    torch.compiler.reset()  # the next network is another one, not one more shape of this one
    result = dict(
        model=model,
        gate=gate,
        epochs=int(run.curve[-1]['epoch']) + 1,  # not every epoch has a row: --val-interval
        before=first_weights(model),
        parameters=sum(p.numel() for p in run.untrained_model().parameters()),
        top1=run.curve[-1]['eval_top1'],
        train_args=train_args,
        curve=run.curve,
    )
    return {**result, **{k: v for k, v in run.record.items() if k != 'classes'}}


@click.command(context_settings=dict(ignore_unknown_options=True))
@click.option('--data-dir', required=True, help='A folder with train/ and test/, by class.')
@click.option('--model', required=True, help='A released plain network: resnet20.cifar10.')
@click.option('--epochs', required=True, type=click.IntRange(1))
@click.option('--gate', 'gates', multiple=True, default=KINDS, help=f'Default: each of {", ".join(KINDS)}.')
@click.option('--seed', 'seeds', type=int, multiple=True, default=(42, 43), show_default=True)
@click.option('--runs', default='runs', show_default=True, type=click.Path(path_type=Path), help='Their folder.')
@click.argument('train_args', nargs=-1, type=click.UNPROCESSED)
def main(data_dir: str, model: str, epochs: int, gates: tuple, seeds: tuple, runs: Path, train_args: tuple) -> None:
    """Fine-tune MODEL plain and with each of the gates, for each seed.

    TRAIN_ARGS are arguments of timm's train.py, for every run. See the head of this file.
    """
    new = before = 0
    try:
        look_up('trained model', model, released_results())
        if plain_args(model)['model_name'] != model:
            raise UserError(f'{model} has a gate already; give a plain network, such as resnet20.cifar10')
        if taken := [arg for arg in train_args if arg.partition('=')[0] in TAKEN]:
            raise UserError(f'{taken[0]}: set here for each run, or by the network; leave it out')
        for gate in gates:
            look_up('gate', gate, KINDS)
        for seed, gate in product(seeds, ('', *gates)):
            path = INSERTIONS_DIR / f'{run_name(model, gate, seed, epochs)}.json'
            if path.is_file():
                if (others := json.loads(path.read_text())['train_args']) != list(train_args):
                    raise UserError(f'{path}: trained with {others}, not {list(train_args)}; move it away')
                before += 1
                continue
            result = fine_tune(model, gate, seed, epochs, data_dir, runs, list(train_args))
            write_text(path, json.dumps(result, indent=2) + '\n')
            click.echo(f'{model} {gate or "plain"} seed {seed}: {result["top1"]:.2f}% -> {path}')
            new += 1
    except UserError as e:
        raise click.ClickException(str(e)) from e
    except KeyboardInterrupt:
        raise click.ClickException('interrupted; the same command goes on from the last checkpoint') from None
    click.echo(f'{new} runs, {before} done before -> {INSERTIONS_DIR}')


if __name__ == '__main__':
    main()
