from . import cifar_resnext  # noqa: F401  registers, and has no class of its own
from ._base import set_skip_threshold
from ._cfg import DATASETS, hub_configs_dir, released
from ._hub import HUB_ORG, HubError, data_sha256, hub_errors, hub_org, redact
from .cifar_inception_v4 import CifarInceptionV4
from .cifar_resnet import CifarResNet
from .cifar_vgg import CifarVgg
from .gated_resnet import FaResNet, GatedResNet

#: Modules of models, as timm.list_models(module=...) names them.
FAMILIES = ('cifar_inception_v4', 'cifar_resnet', 'cifar_resnext', 'cifar_vgg', 'gated_resnet')

__all__ = [
    'DATASETS',
    'FAMILIES',
    'HUB_ORG',
    'CifarInceptionV4',
    'CifarResNet',
    'CifarVgg',
    'FaResNet',
    'GatedResNet',
    'HubError',
    'data_sha256',
    'hub_configs_dir',
    'hub_errors',
    'hub_org',
    'redact',
    'released',
    'set_skip_threshold',
]
