"""timm's ResNet-50 and ResNeXt-50 for ImageNet with SPEM, SAAM or FA. They take the plain backbones' weights.

Channel gates sit where timm's SE does: on the output of a block's last batch norm, before the shortcut is added, as
the papers have it.
"""

import re
from functools import partial
from typing import Any, Final

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_device_dtype
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models._features import feature_take_indices  # private: nothing public reads `indices`
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from ..layers import FA_GATES, GATES, FocusAssociation, create_gate
from ..utils import UserError, look_up
from ._registry import register_models
from ._stage import Stage, no_ks, set_skip_threshold, split_gate

__all__ = ['FaResNet', 'GatedResNet']


class GatedResNet(ResNet):
    """timm's ResNet of bottleneck blocks with a channel gate in every block.

    timm's `init_weights` draws the gates' convolutions as it does those of timm's own SE.

    Args:
        layers: blocks of each stage.
        gate: one of `timm_poolattn.layers.GATES`, or None.
        gate_kwargs: keyword arguments of its constructor.
        identity_init: let the gates start without effect, so that a plain backbone's weights give its outputs; see
            `timm_poolattn.layers.IdentityInit`. The papers' gates do not.
        **kwargs: of timm.models.resnet.ResNet.

    Raises:
        UserError: an unknown gate, `gate_kwargs` without a gate to take them, or an `attn_layer` beside the gate.
    """

    block: type[Bottleneck] = Bottleneck
    gates: tuple[str, ...] = tuple(GATES)

    def __init__(
        self,
        layers: tuple[int, ...],
        gate: str | None = None,
        gate_kwargs: dict[str, Any] | None = None,
        identity_init: bool = False,
        block_args: dict[str, Any] | None = None,
        **kwargs,
    ) -> None:
        channel_gate, _ = split_gate(type(self).__name__, gate, gate_kwargs, self.gates)
        create = partial(create_gate, channel_gate, identity_init=identity_init, **(gate_kwargs or {}))
        if channel_gate and 'attn_layer' in (block_args or {}):
            raise UserError(f'block_args: its attn_layer lies where gate={gate!r} does; leave out one of them')
        block_args = {**(block_args or {}), **(dict(attn_layer=create) if channel_gate else {})}
        super().__init__(self.block, layers, block_args=block_args, **kwargs)
        self.gate = gate


class FaBottleneck(Bottleneck):
    """timm's, given the shortcut already matched in shape: see `Stage`."""

    needs_shortcut: Final[bool] = False  #: set by a `Stage` where the input itself is no shortcut

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        if shortcut is None:
            assert not self.needs_shortcut, 'the first block of a stage takes the shortcut too: forward(x, shortcut)'
            shortcut = x
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(x)))))
        x = self.bn3(self.conv3(x))
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        return self.act3(x + shortcut)


class FaResNet(GatedResNet):
    """timm's ResNet of bottleneck blocks with FA over blocks and stages; arguments as in `GatedResNet`.

    Args:
        gate: 'fa', or 'fase' (FA over blocks with SE in them).
    """

    block = FaBottleneck
    gates = tuple(FA_GATES)

    def __init__(self, layers: tuple[int, ...], gate: str = 'fa', identity_init: bool = False, **kwargs) -> None:
        look_up('gate', str(gate), self.gates, 'for FaResNet')
        super().__init__(layers, gate, identity_init=identity_init, **kwargs)
        fa = partial(FocusAssociation, identity_init=identity_init, **get_device_dtype(self))
        for s, info in enumerate(self.feature_info[1:]):
            blocks = list(getattr(self, info['module']))
            shortcut, blocks[0].downsample = blocks[0].downsample, None
            for i, block in enumerate(blocks):
                block.fa = fa(info['num_chs'], i) if i else None
            setattr(self, info['module'], Stage(blocks, shortcut, fa(info['num_chs'], s) if s else None))

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = [(r'^layer(\d+)\.blocks\.(\d+)', None), (r'^layer(\d+)', (0,))]
        return {**super().group_matcher(coarse), **({} if coarse else dict(blocks=blocks))}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def set_skip_threshold(self, threshold: float, per_sample: bool = True) -> None:
        """See `timm_poolattn.set_skip_threshold`."""
        set_skip_threshold(self, threshold, per_sample)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Do as timm's, whose call of a stage has no place for the k of earlier stages."""
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        take_indices, max_index = feature_take_indices(5, indices)
        x = self.act1(self.bn1(self.conv1(x)))
        intermediates = [x] if 0 in take_indices else []
        x = self.maxpool(x)
        stage_ks = no_ks()
        for i in range(1, max_index + 1 if stop_early else 5):
            x = getattr(self, f'layer{i}')(x, stage_ks)
            if i in take_indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take_indices = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        for i in range(max(take_indices) + 1, 5):
            setattr(self, f'layer{i}', Stage([]))  # which timm's forward would call without the k
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        stage_ks = no_ks()
        x = self.layer1(x, stage_ks)
        x = self.layer2(x, stage_ks)
        x = self.layer3(x, stage_ks)
        return self.layer4(x, stage_ks)


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Complete a plain backbone's checkpoint (timm's, torchvision's) with the model's own gates."""
    if isinstance(model, FaResNet) and not any('.blocks.' in name for name in state_dict):
        state_dict = {re.sub(r'^(layer\d)\.', r'\1.blocks.', name): weight for name, weight in state_dict.items()}
        state_dict = {name.replace('.blocks.0.downsample.', '.shortcut.'): w for name, w in state_dict.items()}
    kinds = [kind for kind in ('.se.', '.fa.') if not any(kind in name for name in state_dict)]
    gates = {n: weight for n, weight in model.state_dict().items() if any(kind in n for kind in kinds)}
    return {**state_dict, **gates}


def create_gated_resnet(variant: str, pretrained: bool = False, **kwargs) -> GatedResNet:
    """Build a registered variant."""
    has_fa = kwargs['gate'] in FA_GATES
    return build_model_with_cfg(
        FaResNet if has_fa else GatedResNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(feature_cls='getter') if has_fa else None,
        **kwargs,
    )


_LAYERS = (3, 4, 6, 3)
_BACKBONES = {
    'resnet50': dict(layers=_LAYERS),
    'resnext50_32x4d': dict(layers=_LAYERS, cardinality=32, base_width=4),
}
_MODEL_ARGS = {
    f'{backbone}_{gate}': dict(gate=gate, **args)
    for backbone, args in _BACKBONES.items()
    for gate in ('spem', 'saam', 'fa')
}

default_cfgs = generate_default_cfgs(
    {
        f'{name}.untrained': dict(
            num_classes=1000,
            input_size=(3, 224, 224),
            pool_size=(7, 7),
            crop_pct=0.95,
            interpolation='bicubic',
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            first_conv='conv1',
            classifier='fc',
        )
        for name in _MODEL_ARGS
    }
)

register_models(__name__, create_gated_resnet, _MODEL_ARGS)
