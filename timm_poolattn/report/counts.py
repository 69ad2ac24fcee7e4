"""Parameters and multiply-adds of all our models and of the papers' rows, which take minutes to count, as a file.

`python -m timm_poolattn.report.counts` writes it again.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from ..papers import model_args, table_rows
from ..utils import progress, write_text

_FILE = Path(__file__).with_name('counts.json')


def _key(args: dict[str, Any]) -> str:
    return args['model_name'] if len(args) == 1 else json.dumps(args, sort_keys=True)


@cache
def packaged_counts() -> dict[str, dict[str, Any]]:
    """Return `count_model` of what is `countable`, by its key; our names first, by family and in order."""
    return json.loads(_FILE.read_text())


def count_model(**args) -> dict[str, Any]:
    """Count what timm.create_model(**args) builds: `parameters`, `multiply_adds`, its `family` and `gate`, or None."""
    import timm  # which takes seconds, and whoever reads the file needs none of it

    from ..models import multiply_adds

    model = timm.create_model(**args, device='meta').to_empty(device='cpu')  # no initialisation
    parameters = sum(p.numel() for p in model.parameters())
    family = timm.models.model_entrypoint(args['model_name'].partition('.')[0]).__module__.rpartition('.')[2]
    return dict(family=family, gate=model.gate, parameters=parameters, multiply_adds=multiply_adds(model))


def look_up_count(**args) -> dict[str, Any]:
    """Do as `count_model`, from the file where it has them."""
    return packaged_counts().get(_key(args)) or count_model(**args)


def countable() -> dict[str, dict[str, Any]]:
    """Return arguments of timm.create_model by their key in the file: for each name of ours, and the papers' rows."""
    import timm

    from ..models import FAMILIES

    names = [dict(model_name=name) for family in FAMILIES for name in timm.list_models(module=family)]
    return {_key(args): args for args in [*names, *map(model_args, table_rows())]}


def write_counts() -> None:
    """Count everything that is `countable` into the file, a line each."""
    models = progress(countable().items(), desc='counting', unit='model')
    lines = [f'{json.dumps(key)}: {json.dumps(count_model(**args))}' for key, args in models]
    write_text(_FILE, '{\n' + ',\n'.join(lines) + '\n}\n')


if __name__ == '__main__':
    write_counts()
