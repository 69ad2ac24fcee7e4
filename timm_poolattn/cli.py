"""`poolattn`: each command calls a function of the package that a notebook can call too."""

import click

from . import __version__


@click.group(context_settings=dict(help_option_names=['-h', '--help']))
@click.version_option(__version__)
def main() -> None:
    """Pooling-based attention for timm: list, predict, validate, train, release."""


@main.command(context_settings=dict(ignore_unknown_options=True, allow_extra_args=True))
@click.option('--timm-script', type=click.Path(), help="timm's train.py. Default: $TIMM_TRAIN_SCRIPT, or found.")
@click.option('--allow-unpinned-script', is_flag=True, help='Run a downloaded train.py without a pinned SHA-256.')
@click.option('--resident/--no-resident', default=True, help="Hold the data on the device, or use timm's loader.")
@click.option('--crop-padding', type=click.IntRange(0), help="Of the random crop. Default: an eighth of the side.")
@click.option('--penalty-weight', type=float, default=0.1, show_default=True, help='eta of the SPEM penalty.')
@click.argument('timm_args', nargs=-1, type=click.UNPROCESSED)
def train(timm_args, timm_script, allow_unpinned_script, **options) -> None:
    """Train with timm's own train.py, which takes every other argument: --model, --data-dir, --config, ..."""
    from .training import train

    train(timm_args, timm_script=timm_script, allow_unpinned=allow_unpinned_script, **options)


if __name__ == '__main__':
    main()
