"""What commands share: options, and how to print."""

import json
import math
from typing import Any

import click

from ..utils import look_up_device

json_option = click.option('--json', 'as_json', is_flag=True, help='Print JSON.')
#: Looked up before the command begins.
device_option = click.option(
    '--device',
    callback=lambda ctx, param, name: str(look_up_device(name)),
    help='Default: cuda where there is one, else cpu.',
)
data_dir_option = click.option(
    '--data-dir', required=True, type=click.Path(), help="A folder or tar by class, or --dataset's root."
)
dataset_option = click.option(
    '--dataset', default='', help='torch/cifar10 or torch/cifar100. Default: a folder or a tar.'
)
split_option = click.option('--split', default='test', show_default=True, help='Of the data.')


def echo_json(value: Any) -> None:
    """Print `value` as JSON, which has no NaN and no infinity: null stands for them."""
    click.echo(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
