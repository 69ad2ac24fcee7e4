"""Pooling-based attention for timm. Importing the package registers its models with timm's factory."""

import os
import sys

from .version import __version__ as __version__

__all__ = [
    'CBAM',
    'SAAM',
    'SGE',
    'SPEM',
    'SRM',
    'Association',
    'CifarInceptionV4',
    'CifarResNet',
    'CifarVgg',
    'FaResNet',
    'Focus',
    'FocusAssociation',
    'GatedResNet',
    'create_gate',
    'insert',
    'remove',
    'set_skip_threshold',
]


# Importing registers the models, which takes torch and timm and so seconds. `poolattn list` and every `--help` need
# neither, but the command's script imports this package before any line of its own: its arguments alone tell.
# `__getattr__` hands out the names all the same.
_script, *_arguments = sys.argv or ['']
if os.path.basename(_script) not in ('poolattn', 'poolattn.exe') or (
    _arguments and _arguments[0] != 'list' and not {'-h', '--help'} & {*_arguments}
):
    from .layers import CBAM, SAAM, SGE, SPEM, SRM, Association, Focus, FocusAssociation, create_gate
    from .models import (
        CifarInceptionV4,
        CifarResNet,
        CifarVgg,
        FaResNet,
        GatedResNet,
        insert,
        remove,
        set_skip_threshold,
    )


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from . import layers, models

    return getattr(layers if hasattr(layers, name) else models, name)
