"""CIFAR ResNets of the SPEM, SAAM and FA papers, with every gate the papers compare.

Three backbones share the names: 3x3 stem, stages of widths 16, 32, 64 with strides 1, 2, 2, global pooling and one
linear layer in all of them; what differs is in `FLAVOURS`, and which blocks a depth has.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from timm.layers import (
    DropPath,
    LayerType,
    calculate_drop_path_rates,
    create_attn,
    get_act_layer,
    get_norm_layer,
)
from timm.layers.cbam import CbamModule
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..layers import FA_GATES, GATES, FocusAssociation
from ..utils import UserError, look_up
from ._registry import read_default_cfgs, register_models
from ._stage import Stage, StagedNet, Stages, split_gate

__all__ = ['CifarResNet']


@dataclass(frozen=True)
class Flavour:
    """What a paper's CIFAR ResNet has of its own.

    Attributes:
        shortcut_kernel: of the projecting conv + BN shortcut, in the first block of a stage.
        project_first: project that of stage 1 too, even if no shape changes.
        gates: the paper's own form of a baseline, in place of that in `GATES`.
    """

    shortcut_kernel: int
    project_first: bool
    gates: dict[str, Callable[..., nn.Module]]


FLAVOURS = {
    'saam': Flavour(1, True, dict(se=partial(GATES['se'], rd_ratio=1 / 4, bias=False))),
    'fa': Flavour(3, False, dict(se=partial(GATES['se'], rd_ratio=1 / 8))),  # the better of 1/4 and 1/8, row by row
    'spem': Flavour(1, False, dict(cbam=CbamModule)),
    'resnext': Flavour(1, False, dict(se=partial(GATES['se'], rd_ratio=1 / 8))),  # the FA paper's
}
#: Gates whose parameters the SAAM paper's training does not decay: "all parameters except the attention modules".
_UNDECAYED_GATES = ('se', 'se2', 'cbam', 'saam', 'saam2', 'saam4')


class _Block(nn.Module):
    needs_shortcut: Final[bool] = False  #: set by a `Stage` where the input itself is no shortcut

    def reparameterize(self) -> None:
        """Fold the BNs into the convs before them, for inference: `timm.utils.reparameterize_model` calls it.

        A conv whose weight is made from others (pruned, parametrised, adapted) keeps its BN, as does a BN without
        statistics.
        """
        for i in range(1, self.depth + 1):
            conv, norm = getattr(self, f'conv{i}'), getattr(self, f'bn{i}')
            has_weight = type(conv) is nn.Conv2d and 'weight' in dict(conv.named_parameters(recurse=False))
            if has_weight and type(norm) is nn.BatchNorm2d and norm.running_mean is not None:
                statistics = norm.running_mean, norm.running_var, norm.eps
                conv.weight, conv.bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, *statistics, norm.weight, norm.bias
                )
                setattr(self, f'bn{i}', nn.Identity())


class BasicBlock(_Block):
    """Two 3x3 convs. forward(x, shortcut) takes the shortcut already matched in shape: see `Stage`."""

    expansion = 1
    depth = 2  # weighted layers
    stem_width = 16
    widths = (16, 32, 64)

    def __init__(
        self,
        in_chs: int,
        width: int,
        stride: int = 1,
        gate: nn.Module | None = None,
        fa: FocusAssociation | None = None,
        drop_path: float = 0.0,
        act_layer: type[nn.Module] = nn.ReLU,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv1 = nn.Conv2d(in_chs, width, 3, stride=stride, padding=1, bias=False, **dd)
        self.bn1 = norm_layer(width, **dd)
        self.act1 = act_layer(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False, **dd)
        self.bn2 = norm_layer(width, **dd)
        self.gate = gate or nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.act2 = act_layer(inplace=True)
        self.fa = fa

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        if shortcut is None:
            assert not self.needs_shortcut, 'the first block of a stage takes the shortcut too: forward(x, shortcut)'
            shortcut = x
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.act2(self.drop_path(self.gate(x)) + shortcut)

    def zero_init_last(self) -> None:
        """Start as the identity."""
        nn.init.zeros_(self.bn2.weight)


class Bottleneck(_Block):
    """1x1, 3x3 and 1x1 convs, post-activation. forward(x, shortcut) as in `BasicBlock`."""

    expansion = 4
    depth = 3
    stem_width = 16
    widths = (16, 32, 64)
    groups = 1

    def __init__(
        self,
        in_chs: int,
        width: int,
        stride: int = 1,
        gate: nn.Module | None = None,
        fa: FocusAssociation | None = None,
        drop_path: float = 0.0,
        act_layer: type[nn.Module] = nn.ReLU,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        out_chs = width * self.expansion
        self.conv1 = nn.Conv2d(in_chs, width, 1, bias=False, **dd)
        self.bn1 = norm_layer(width, **dd)
        self.act1 = act_layer(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=self.groups, bias=False, **dd)
        self.bn2 = norm_layer(width, **dd)
        self.act2 = act_layer(inplace=True)
        self.conv3 = nn.Conv2d(width, out_chs, 1, bias=False, **dd)
        self.bn3 = norm_layer(out_chs, **dd)
        self.gate = gate or nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.act3 = act_layer(inplace=True)
        self.fa = fa

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        if shortcut is None:
            assert not self.needs_shortcut, 'the first block of a stage takes the shortcut too: forward(x, shortcut)'
            shortcut = x
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return self.act3(self.drop_path(self.gate(x)) + shortcut)

    def zero_init_last(self) -> None:
        """Start as the identity."""
        nn.init.zeros_(self.bn3.weight)


class ResNeXtBottleneck(Bottleneck):
    """Bottleneck with a grouped 3x3 conv: cardinality 8, 16 channels a group in stage 1, doubling by stage."""

    expansion = 2
    stem_width = 64
    widths = (128, 256, 512)
    groups = 8


BLOCKS = {'basic': BasicBlock, 'bottleneck': Bottleneck, 'resnext': ResNeXtBottleneck}


class CifarResNet(StagedNet):
    """CIFAR ResNet with a gate in each block, or FA over blocks and stages.

    Args:
        depth: 6n+2 with basic blocks, 9n+2 with bottlenecks and ResNeXt blocks.
        block: 'basic', 'bottleneck' or 'resnext'.
        gate: one of `timm_poolattn.layers.GATES`, 'fa', 'fase' (FA over blocks with SE in them), or None. It sits on
            the last BN's output, before the shortcut is added.
        flavour: whose backbone, a key of `FLAVOURS`. None is 'spem' with bottlenecks, 'resnext' with ResNeXt blocks,
            with basic blocks 'fa' where there is FA and else 'saam'.
        gate_kwargs: keyword arguments of the gate (of the SE in it, for 'fase'), over the flavour's own form of it.
        num_classes: 0 for no classifier.
        in_chans: channels of the images.
        global_pool: timm's pooling names, '' for none.
        stem_stride: 2 for 64x64 images.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly over depth.
        act_layer: of every block.
        norm_layer: behind every conv.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        UserError: a depth that the block does not allow (it names the nearest), an unknown block, gate or flavour, or
            `gate_kwargs` without a gate to take them.
    """

    stem_pattern = r'^conv1|bn1'
    stem_feature = False

    def __init__(
        self,
        depth: int = 20,
        block: str = 'basic',
        gate: str | None = None,
        flavour: str | None = None,
        gate_kwargs: dict[str, Any] | None = None,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = 'avg',
        stem_stride: int = 1,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: LayerType = nn.ReLU,
        norm_layer: LayerType = nn.BatchNorm2d,
        device=None,
        dtype=None,
    ) -> None:
        look_up('block', block, BLOCKS)
        channel_gate, has_fa = split_gate('CifarResNet', gate, gate_kwargs, (*GATES, *FA_GATES))
        flavour = flavour or {'bottleneck': 'spem', 'resnext': 'resnext'}.get(block, 'fa' if has_fa else 'saam')
        block_cls, backbone = BLOCKS[block], FLAVOURS[look_up('flavour', flavour, FLAVOURS)]
        per_n = 3 * block_cls.depth
        n, rest = divmod(depth - 2, per_n)
        if rest or n < 1:
            below = max(n, 1) * per_n + 2
            raise UserError(
                f'CifarResNet: depth={depth} must be {per_n}n+2 with {block} blocks;'
                f' nearest are {below} and {below + per_n}'
            )
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.in_chans = in_chans
        self.gate = gate
        self.flavour = flavour
        act_layer, norm_layer = get_act_layer(act_layer), get_norm_layer(norm_layer)

        self.conv1 = nn.Conv2d(in_chans, block_cls.stem_width, 3, stride=stem_stride, padding=1, bias=False, **dd)
        self.bn1 = norm_layer(block_cls.stem_width, **dd)
        self.act1 = act_layer(inplace=True)
        self.feature_info = []

        gate_layer = {**GATES, **backbone.gates}[channel_gate] if channel_gate else None
        gate_kwargs = {**(gate_kwargs or {}), **dd}
        in_chs, reduction = block_cls.stem_width, stem_stride
        stages = []
        drop_path_rates = calculate_drop_path_rates(drop_path_rate, [n] * 3, stagewise=True)
        for s, (width, stride) in enumerate(zip(block_cls.widths, (1, 2, 2), strict=True)):
            out_chs = width * block_cls.expansion
            reduction *= stride
            shortcut = None
            if in_chs != out_chs or stride != 1 or backbone.project_first:
                k = backbone.shortcut_kernel
                shortcut = nn.Sequential(
                    nn.Conv2d(in_chs, out_chs, k, stride=stride, padding=k // 2, bias=False, **dd),
                    norm_layer(out_chs, **dd),
                )
            blocks = []
            for i in range(n):
                blocks.append(
                    block_cls(
                        in_chs,
                        width,
                        stride=stride if i == 0 else 1,
                        gate=create_attn(gate_layer, out_chs, **gate_kwargs),
                        fa=FocusAssociation(out_chs, i, **dd) if has_fa and i else None,
                        drop_path=drop_path_rates[s][i],
                        act_layer=act_layer,
                        norm_layer=norm_layer,
                        **dd,
                    )
                )
                in_chs = out_chs
            stages.append(Stage(blocks, shortcut, FocusAssociation(out_chs, s, **dd) if has_fa and s else None))
            self.feature_info.append(dict(num_chs=out_chs, reduction=reduction, module=f'stages.{s}'))
        self.stages = Stages(stages)

        self._set_head(num_classes, global_pool, drop_rate, **dd)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise the backbone's convolutions as He et al. (fan out); gates keep their own."""
        # `insert` puts its gates where drop_path was
        blocks = [m for m in self.modules() if isinstance(m, _Block)]
        gates = {m for b in blocks for part in (b.gate, b.drop_path) for m in part.modules()}
        for m in self.modules():
            if isinstance(m, nn.Conv2d) and m not in gates:
                nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return names of the parameters that the SAAM paper does not decay: those of its gates."""
        if self.flavour != 'saam' or self.gate not in _UNDECAYED_GATES:
            return set()
        return {name for name, _ in self.named_parameters() if '.gate.' in name}

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        return self.act1(self.bn1(self.conv1(x)))


#: The SPEM authors' parameter names (their gate lies in the block itself), ours beside them.
_SPEM_AUTHORS = {'w1': 'gamma_exc', 'b1': 'beta_exc', 'w2': 'gamma_rew', 'b2': 'beta_rew', 'p': 'p'}


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Rename a torchvision-style CIFAR ResNet checkpoint (`layer1.0.conv1`, `fc`), the SPEM authors' among them."""
    state_dict = state_dict.get('state_dict', state_dict)
    state_dict = {name.removeprefix('module.'): weight for name, weight in state_dict.items()}
    if 'layer1.0.conv1.weight' not in state_dict:
        return state_dict
    out = {}
    for name, weight in state_dict.items():
        name = re.sub(r'^layer(\d)\.', lambda m: f'stages.{int(m[1]) - 1}.blocks.', name)
        name = re.sub(r'^fc\.', 'head.fc.', name).replace('.blocks.0.downsample.', '.shortcut.')
        prefix, _, leaf = name.rpartition('.')
        if leaf in _SPEM_AUTHORS:
            name, weight = f'{prefix}.gate.{_SPEM_AUTHORS[leaf]}', weight.flatten()
        out[name] = weight
    return out


def create_cifar_resnet(variant: str, pretrained: bool = False, **kwargs) -> CifarResNet:
    """Build a registered variant; 64x64 inputs get a stem of stride 2."""
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    kwargs.setdefault('stem_stride', 2 if cfg.input_size[-1] == 64 else 1)
    return build_model_with_cfg(
        CifarResNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2), feature_cls='getter'),
        **kwargs,
    )


_DEPTHS = {20: 'basic', 32: 'basic', 44: 'basic', 56: 'basic', 110: 'basic'}
_DEPTHS |= {83: 'bottleneck', 164: 'bottleneck', 245: 'bottleneck', 326: 'bottleneck'}
_MODEL_ARGS = {
    f'resnet{depth}_{gate}' if gate else f'resnet{depth}': dict(depth=depth, block=block, gate=gate)
    for depth, block in _DEPTHS.items()
    for gate in (None, *GATES, *FA_GATES)
}

default_cfgs = read_default_cfgs(_MODEL_ARGS, pool_size=lambda _: 8, first_conv='conv1', classifier='head.fc')

register_models(__name__, create_cifar_resnet, _MODEL_ARGS)
