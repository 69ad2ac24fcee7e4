"""VGG-19 of the FA paper, for small images.

Five blocks of 3x3 convs with bias, one BN a block (before its last activation), max pooling, and one linear layer.

Paper: `Very Deep Convolutional Networks for Large-Scale Image Recognition` - https://arxiv.org/abs/1409.1556
"""

from typing import Any

import torch
from timm.layers import LayerType, get_act_layer, get_norm_layer
from timm.models import build_model_with_cfg, checkpoint
from torch import nn

from ..layers import FA_GATES, FocusAssociation, fa_weight, fa_weight_unskipped
from ._registry import read_default_cfgs, register_models
from ._stage import StagedNet, Stages, append_k, small_gates

__all__ = ['CifarVgg']

_WIDTHS = (64, 128, 256, 512, 512)
_CONVS = (2, 2, 4, 4, 4)


class VggBlock(nn.Module):
    """Convs, max pooling, and a gate; with FA its weight k, focused on the block's input (before `shortcut`).

    The first block is the benchmark and has neither `shortcut` nor `fa`.
    """

    def __init__(
        self,
        in_chs: int,
        width: int,
        convs: int,
        gate: nn.Module | None,
        fa: FocusAssociation | None,
        act_layer: type[nn.Module],
        norm_layer: type[nn.Module],
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(convs):
            layers.append(nn.Conv2d(in_chs if i == 0 else width, width, 3, padding=1, **dd))
            if i == convs - 1:
                layers.append(norm_layer(width, **dd))
            layers.append(act_layer(inplace=True))
        # an odd side is rounded up, as the shortcut's stride does
        self.body = nn.Sequential(*layers, nn.MaxPool2d(2, ceil_mode=True), gate or nn.Identity())
        # matches X_i to U_i
        self.shortcut = nn.Conv2d(in_chs, width, 1, stride=2, **dd) if fa is not None else nn.Identity()
        self.fa = fa
        self.earlier = 0 if fa is None else fa.index - 1  # gated blocks before this one
        self.grad_checkpointing = False
        self.skip_threshold = 0.0
        self.skip_per_sample = True

    def forward(self, x: torch.Tensor, stage_ks: list[torch.Tensor] | None = None) -> torch.Tensor:
        if self.fa is not None:
            assert stage_ks is not None, 'FA: a gated block needs the k of the blocks before it'
            k = self.fa(x, stage_ks[: self.earlier])  # a copy, as in `Stage`
            append_k(stage_ks, k, self.earlier)
            if self.skip_threshold > 0 and not self.training:
                return self._run_unskipped(x, k)
        if self.grad_checkpointing and not torch.jit.is_scripting():  # noqa: SIM108  TorchScript takes no such ternary
            u = checkpoint(self.body, x)
        else:
            u = self.body(x)
        return u if self.fa is None else fa_weight(self.shortcut(x), u, k)

    @torch.jit.unused  # a scripted model raises here
    def _run_unskipped(self, x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        run = lambda index: self.body(x[index])  # noqa: E731
        return fa_weight_unskipped(self.shortcut(x), k, run, self.skip_threshold, self.skip_per_sample)


class CifarVgg(StagedNet):
    """VGG-19 with an SE gate after each block, FA over its blocks, or both.

    Args:
        gate: 'se', 'fa', 'fase' or None.
        gate_kwargs: keyword arguments of the SE gate. Its ratio is 1/4 by default.
        num_classes: 0 for no classifier.
        in_chans: channels of the images.
        global_pool: 'max' matters where images are larger than 32x32.
        drop_rate: dropout before the classifier.
        act_layer: of every conv.
        norm_layer: one a block.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        UserError: an unknown gate, or `gate_kwargs` without a gate to take them.
    """

    stem_pattern = r'^stem'

    def __init__(
        self,
        gate: str | None = None,
        gate_kwargs: dict[str, Any] | None = None,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = 'max',
        drop_rate: float = 0.0,
        act_layer: LayerType = nn.ReLU,
        norm_layer: LayerType = nn.BatchNorm2d,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        make_se, make_fa = small_gates('CifarVgg', gate, gate_kwargs, 1 / 4, **dd)
        super().__init__()
        self.in_chans = in_chans
        self.gate = gate
        act_layer, norm_layer = get_act_layer(act_layer), get_norm_layer(norm_layer)

        self.feature_info = []
        blocks = []
        in_chs = in_chans
        for i, (width, convs) in enumerate(zip(_WIDTHS, _CONVS, strict=True)):
            blocks.append(
                VggBlock(
                    in_chs,
                    width,
                    convs,
                    gate=make_se(width),
                    fa=make_fa(in_chs, i),
                    act_layer=act_layer,
                    norm_layer=norm_layer,
                    **dd,
                )
            )
            in_chs = width
            module = f'stages.{i - 1}' if i else 'stem'
            self.feature_info.append(dict(num_chs=width, reduction=2 ** (i + 1), module=module))
        self.stem = blocks[0]  # the benchmark block
        self.stages = Stages(blocks[1:])
        self._set_head(num_classes, global_pool, drop_rate, **dd)
        for m in self.modules():
            if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3):
                nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')
                nn.init.zeros_(m.bias)

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(x)


def create_cifar_vgg(variant: str, pretrained: bool = False, **kwargs) -> CifarVgg:
    """Build a registered variant."""
    return build_model_with_cfg(
        CifarVgg,
        variant,
        pretrained,
        feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), feature_cls='getter'),
        **kwargs,
    )


_MODEL_ARGS = {
    f'vgg19_{gate}' if gate else 'cifar_vgg19': dict(gate=gate)  # timm owns the name vgg19
    for gate in (None, 'se', *FA_GATES)
}

default_cfgs = read_default_cfgs(
    _MODEL_ARGS, pool_size=lambda side: side // 32, first_conv='stem.body.0', classifier='head.fc'
)

register_models(__name__, create_cifar_vgg, _MODEL_ARGS)
