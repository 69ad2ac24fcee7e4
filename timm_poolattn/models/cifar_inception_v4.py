"""Inception-v4 of the FA paper, for small images: timm's blocks with other paddings and kernels.

Valid padding becomes same, the 7-kernels of Inception-B and Reduction-B become 5 (the stem keeps its own), and images
smaller than 96x96 are zero-padded to that.

Paper: `Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning`
- https://arxiv.org/abs/1602.07261
"""

from functools import partial
from typing import Any

import torch
from timm.layers import ConvNormAct, to_2tuple
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from timm.models.inception_v4 import (
    InceptionA,
    InceptionB,
    InceptionC,
    Mixed3a,
    Mixed4a,
    Mixed5a,
    ReductionA,
    ReductionB,
)
from torch import fx, nn
from torch.nn import functional as F

from ..layers import FA_GATES, FocusAssociation
from ._registry import read_default_cfgs, register_models
from ._stage import Stage, StagedNet, Stages, small_gates

__all__ = ['CifarInceptionV4']

_STAGES = ((InceptionA, 4, 384), (InceptionB, 7, 1024), (InceptionC, 3, 1536))


@fx.wrap  # its control flow depends on the shape
def pad_to_size(x: torch.Tensor, size: int) -> torch.Tensor:
    """Zero-pad smaller images (B, C, H, W) to size x size."""
    h, w = max(size - x.shape[2], 0), max(size - x.shape[3], 0)
    return F.pad(x, [w // 2, w - w // 2, h // 2, h - h // 2])


def _conv(in_chs: int, out_chs: int, kernel_size, stride: int = 1, padding=None, seven: int = 7, **dd) -> nn.Module:
    """Build timm's ConvNormAct with same padding, whatever `padding` is asked for, and `seven` for kernels of 7."""
    kernel_size = tuple(seven if k == 7 else k for k in to_2tuple(kernel_size))
    return ConvNormAct(
        in_chs,
        out_chs,
        kernel_size,
        stride=stride,
        padding=tuple(k // 2 for k in kernel_size),
        norm_kwargs=dict(eps=1e-3),
        act_kwargs=dict(inplace=True),
        **dd,
    )


class InceptionBlock(nn.Module):
    """One of timm's Inception blocks and a gate behind it. It has no shortcut: `Stage` passes one to the first."""

    def __init__(self, body: nn.Module, gate: nn.Module | None, fa: FocusAssociation | None) -> None:
        super().__init__()
        self.body = body
        self.gate = gate or nn.Identity()
        self.fa = fa

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        return self.gate(self.body(x))


class CifarInceptionV4(StagedNet):
    """Inception-v4 with an SE gate after each block, FA over blocks and stages, or both.

    Args:
        gate: 'se', 'fa', 'fase' or None.
        gate_kwargs: keyword arguments of the SE gate. Its ratio is 1/8 by default.
        num_classes: 0 for no classifier.
        in_chans: channels of the images.
        global_pool: timm's pooling names, '' for none.
        drop_rate: dropout before the classifier.
        img_size: side of the images, or (height, width) as timm's config.json has it; `feature_info` refers to it, and
            the forward takes any.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        UserError: an unknown gate, or `gate_kwargs` without a gate to take them.
    """

    stem_pattern = r'^stem'
    stem_feature = False

    def __init__(
        self,
        gate: str | None = None,
        gate_kwargs: dict[str, Any] | None = None,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        img_size: int | tuple[int, int] = 32,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        make_se, make_fa = small_gates('CifarInceptionV4', gate, gate_kwargs, 1 / 8, **dd)
        super().__init__()
        self.in_chans = in_chans
        self.gate = gate

        self.least_side = 96  # smaller images are padded to it
        self.stem = nn.Sequential(
            _conv(in_chans, 32, kernel_size=3, stride=2, **dd),
            _conv(32, 32, kernel_size=3, **dd),
            _conv(32, 64, kernel_size=3, **dd),
            Mixed3a(_conv, **dd),
            Mixed4a(_conv, **dd),
            Mixed5a(_conv, **dd),
        )
        side = to_2tuple(img_size)[0]
        reduction = 8 * side / max(side, self.least_side)  # of the image before it is padded
        self.feature_info = []
        small_conv = partial(_conv, seven=5)
        stages = []
        for s, (block, count, width) in enumerate(_STAGES):
            blocks = [
                InceptionBlock(
                    block(small_conv, **dd),
                    gate=make_se(width),
                    fa=make_fa(width, i),
                )
                for i in range(count)
            ]
            reduction_block = (None, ReductionA, ReductionB)[s]
            stages.append(
                Stage(
                    blocks,
                    fa=make_fa(width, s),
                    reduction=reduction_block(small_conv, **dd) if reduction_block else None,
                )
            )
            self.feature_info.append(dict(num_chs=width, reduction=reduction * 2**s, module=f'stages.{s}'))
        self.stages = Stages(stages)
        for m in self.modules():
            if isinstance(m, nn.MaxPool2d):
                m.padding = 1  # same, where timm's blocks have valid
        self._set_head(num_classes, global_pool, drop_rate, **dd)

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(pad_to_size(x, self.least_side))


def create_cifar_inception_v4(variant: str, pretrained: bool = False, **kwargs) -> CifarInceptionV4:
    """Build a registered variant."""
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    kwargs.setdefault('img_size', cfg.input_size[-1])
    return build_model_with_cfg(
        CifarInceptionV4,
        variant,
        pretrained,
        feature_cfg=dict(out_indices=(0, 1, 2), feature_cls='getter'),
        **kwargs,
    )


_MODEL_ARGS = {
    f'inception_v4_{gate}' if gate else 'cifar_inception_v4': dict(gate=gate)  # timm owns the name inception_v4
    for gate in (None, 'se', *FA_GATES)
}

default_cfgs = read_default_cfgs(_MODEL_ARGS, pool_size=lambda _: 3, first_conv='stem.0.conv', classifier='head.fc')

register_models(__name__, create_cifar_inception_v4, _MODEL_ARGS)
