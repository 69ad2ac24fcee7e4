"""Pooling-based attention for timm. Importing the package registers its models with timm's factory."""

from .layers import CBAM, SAAM, SGE, SPEM, SRM, Association, Focus, FocusAssociation, create_gate
from .models import CifarInceptionV4, CifarResNet, CifarVgg, FaResNet, GatedResNet, insert, remove, set_skip_threshold
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
