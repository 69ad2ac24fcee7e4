from ._cfg import DATASETS, hub_configs_dir, released
from .cifar_resnet import CifarResNet

#: Modules of models, as timm.list_models(module=...) names them.
FAMILIES = ('cifar_resnet',)

__all__ = ['DATASETS', 'FAMILIES', 'CifarResNet', 'hub_configs_dir', 'released']
