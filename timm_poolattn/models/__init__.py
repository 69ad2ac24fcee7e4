from . import cifar_resnext  # noqa: F401  registers, and has no class of its own
from ._pretrained import HubError, data_sha256, hub_errors, hub_org, redact
from ._registry import FAMILIES, check_model_name, no_weights, release_args
from ._stage import set_skip_threshold
from .cifar_inception_v4 import CifarInceptionV4
from .cifar_resnet import CifarResNet
from .cifar_vgg import CifarVgg
from .counting import multiply_adds
from .gated_resnet import FaResNet, GatedResNet
from .hub_format import save_model
from .insertion import insert, remove
from .paper_rows import architecture, paper_top1

__all__ = [
    'FAMILIES',
    'CifarInceptionV4',
    'CifarResNet',
    'CifarVgg',
    'FaResNet',
    'GatedResNet',
    'HubError',
    'architecture',
    'check_model_name',
    'data_sha256',
    'hub_errors',
    'hub_org',
    'insert',
    'multiply_adds',
    'no_weights',
    'paper_top1',
    'redact',
    'release_args',
    'remove',
    'save_model',
    'set_skip_threshold',
]
