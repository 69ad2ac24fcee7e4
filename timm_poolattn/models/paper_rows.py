"""Which row of the papers' tables is of which network."""

import json
from functools import cache
from typing import Any

import timm

from ..papers import model_args, row_top1, table_rows


def architecture(args: dict[str, Any]) -> str:
    """Return what tells apart the networks that timm.create_model(**args) builds, whatever their names.

    Defaults that one place spells out and another does not are the same.
    """
    return _architecture(json.dumps(args, sort_keys=True))


@cache
def _architecture(args: str) -> str:
    return repr(timm.create_model(**json.loads(args), device='meta'))


def paper_top1(arch: str, dataset: str) -> float | None:
    """Return the top-1 accuracy in % that the papers print for the network of this name, if any."""
    args = dict(model_name=f'{arch}.{dataset}')
    for row in table_rows():
        of_row = model_args(row)
        if of_row['model_name'] != args['model_name'] or 'variant' in row or row_top1(row) is None:
            continue
        if architecture(of_row) == architecture(args):
            return row_top1(row)
    return None
