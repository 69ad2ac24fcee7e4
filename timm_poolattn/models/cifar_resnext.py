"""ResNeXt-29 (8x16d) of the FA paper, for small images: `CifarResNet` with ResNeXt blocks.

Paper: `Aggregated Residual Transformations for Deep Neural Networks` - https://arxiv.org/abs/1611.05431
"""

from ..layers import FA_GATES
from ._registry import read_default_cfgs, register_models
from .cifar_resnet import create_cifar_resnet

__all__ = []

_MODEL_ARGS = {
    f'resnext29_{gate}' if gate else 'resnext29': dict(depth=29, block='resnext', gate=gate)
    for gate in (None, 'se', *FA_GATES)
}

default_cfgs = read_default_cfgs(_MODEL_ARGS, pool_size=lambda _: 8, first_conv='conv1', classifier='head.fc')

register_models(__name__, create_cifar_resnet, _MODEL_ARGS)
