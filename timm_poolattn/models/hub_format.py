"""A model as timm, transformers and the Hub read it: a folder of config.json and model.safetensors."""

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from timm.models import save_for_hf
from torch import nn

from ..utils import UserError, replacing
from .cifar_inception_v4 import CifarInceptionV4
from .cifar_resnet import CifarResNet
from .insertion import has_inserted_gates


def save_model(
    model: nn.Module, folder: str | Path, label_names: Sequence[str], data_config: dict[str, Any] | None = None
) -> None:
    """Write `model` to `folder` by timm's save_for_hf, so that its config.json says all that it is rebuilt from.

    Args:
        label_names: the classes, in order.
        data_config: what differs from the model's own of `input_size`, `mean`, `std`, `crop_pct`, `interpolation`.

    Raises:
        UserError: the model has gates of `insert`, or was created with an argument, that no config.json can say.
    """
    if has_inserted_gates(model):
        raise UserError(
            'inserted gates cannot be said in a config.json: save the state_dict, and insert anew to load it'
        )
    # the stem follows the image size of the name's own tag, which a fine-tuned model need not have
    args = dict(stem_stride=model.conv1.stride[0]) if isinstance(model, CifarResNet) else {}
    with TemporaryDirectory() as temp:  # timm writes the weights before it refuses what config.json cannot say
        try:
            save_for_hf(
                # safetensors takes contiguous weights alone
                copy.deepcopy(model).to(memory_format=torch.contiguous_format),
                temp,
                model_config=dict(label_names=list(label_names)),
                model_args=args,
                data_config=data_config,
                safe_serialization=True,
            )
        except ValueError as e:
            said = str(e).partition(';')[0]
            raise UserError(f"{said}: create the model with it as text, as in act_layer='silu'") from e
        _tidy(Path(temp, 'config.json'), takes_any_size=isinstance(model, CifarInceptionV4))
        for file in ('model.safetensors', 'config.json'):
            with replacing(Path(folder, file)) as target:
                shutil.copyfile(Path(temp, file), target)


def _tidy(path: Path, takes_any_size: bool) -> None:
    """Mend what timm says twice in a config.json.

    transformers stumbles over the second `num_classes`. The second `label_names` are those of the model's own tag,
    where it has as many classes. A model that takes images of any size has features of the size that it was given.
    """
    config = json.loads(path.read_text())
    if takes_any_size:
        config['model_args']['img_size'] = config['pretrained_cfg']['input_size'][1:]
    config.get('model_args', {}).pop('num_classes', None)
    if 'label_names' in config['pretrained_cfg']:
        config['pretrained_cfg']['label_names'] = config['label_names']
    path.write_text(json.dumps(config, indent=2) + '\n')
