"""Training: train, finetune, warm-start; and any other script of timm's."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import click

from ..utils import MissingFileError, UserError

#: timm's train.py takes every option that is none of ours.
_TIMM_ARGS = dict(ignore_unknown_options=True, allow_extra_args=True, allow_interspersed_args=True)


def train_options(command: Callable) -> Callable:
    """Add what `train` and `finetune` share: options of ours, and any argument of timm's train.py."""
    for option in (
        click.option(
            '--timm-script', type=click.Path(), help="timm's train.py. Default: $TIMM_TRAIN_SCRIPT, or found."
        ),
        click.option(
            '--allow-unpinned-script',
            'allow_unpinned',
            is_flag=True,
            help='Run a downloaded train.py without a pinned SHA-256.',
        ),
        click.option(
            '--resident/--no-resident', default=True, help="Hold the data on the device, or use timm's loader."
        ),
        click.option(
            '--crop-padding', type=click.IntRange(0), help='Of the random crop. Default: an eighth of the side.'
        ),
        click.option('--penalty-weight', type=float, default=0.1, show_default=True, help='eta of the SPEM penalty.'),
        click.argument('timm_args', nargs=-1, type=click.UNPROCESSED),
    ):
        command = option(command)
    return command


@click.command(context_settings=_TIMM_ARGS)
@click.option('--recipe', help='A name in train_scripts/recipes; every other argument overrides its values.')
@click.option(
    '--teacher',
    'teachers',
    multiple=True,
    help='A trained model, whose class probabilities are the targets. Of several, their mean.',
)
@train_options
def train(timm_args, **options) -> None:
    """Train a model with timm's own train.py.

    It takes every other argument: --model, --data-dir, --config and so on.
    """
    from ..training import train

    train(timm_args, **options)


@click.command(context_settings=_TIMM_ARGS)
@click.argument('data_dir', type=click.Path())
@train_options
def finetune(data_dir, timm_args, **options) -> None:
    """Fine-tune a model to your own images.

    DATA_DIR is a folder or tar of images of any size, by class.

    Every other argument is one of timm's train.py, and overrides the recipe `finetune`: --model, --epochs, --output
    and so on.
    """
    from ..training import finetune

    if data_dir.startswith('-'):
        raise UserError(f'{data_dir}: DATA_DIR comes first, and the arguments of train.py after it')
    result = finetune(data_dir, timm_args, **options)
    click.echo(result.table())
    picture = result.figure or "not drawn: pip install 'timm_poolattn[explain]'"
    click.echo(f'confusion matrix: {picture}')
    click.echo(
        f'top-1 {result.top1:.2f}% with the best epoch, {result.epoch}; to use it:'
        f' poolattn predict IMAGES --model local-dir:{result.model_dir}'
    )


@click.command('warm-start')
@click.argument('source')
@click.argument('name')
@click.option('-o', '--out', required=True, type=click.Path(dir_okay=False), help='A .safetensors file.')
def warm_start(source: str, name: str, out: str) -> None:
    """Write first weights from a trained model.

    SOURCE is a trained name, or a .safetensors file. The model NAME may be deeper, have another gate, or other
    classes; give the file to `poolattn train --initial-checkpoint`.
    """
    from ..training import warm_start

    count = warm_start(name, source, out)
    click.echo(f'{count["copied"]} tensors of {name} from {source}, {count["new"]} new -> {out}')


@click.command(context_settings=dict(ignore_unknown_options=True, allow_interspersed_args=False))
@click.argument('script', type=click.Path())
@click.argument('args', nargs=-1, type=click.UNPROCESSED)
def run(script: str, args) -> None:
    """Run another script of timm's.

    SCRIPT, such as validate.py or benchmark.py, runs unchanged, with our models registered.
    """
    if not Path(script).is_file():
        raise MissingFileError(
            f"{script}: no such file; a checkout of huggingface/pytorch-image-models has timm's scripts"
        )
    from .. import models  # noqa: F401  registers them

    sys.argv = [script, *args]
    sys.path.insert(0, str(Path(script).resolve().parent))  # where python looks first for what a script imports
    runpy.run_path(script, run_name='__main__')


COMMANDS = (train, finetune, warm_start, run)
