"""Global max and min pooling, Eq. 1 of the SPEM paper: by one form where gradients are recorded, by amax and amin else.

Autograd's formula for amax compares the whole map with its maximum and counts the ties, in several passes. For it
the positions of the extremes are found first, by an operator that has no gradient, and the values are gathered there:
the gradient goes to those positions alone, by torch's own formulas in every mode of autodiff. Compiled, where channels
do not come last, the passes of amax's formula fuse and the operator is the slower one, so amax and amin stay.

What it gains, as the time of a training step over that of the plain network, of resnet164_spem with channels last on
two cores with avx512_bf16, with it and with amax and amin: 1.35 and 1.50 compiled in bfloat16, 1.21 and 1.19 compiled
in float32, 1.75 and 2.34 eager in bfloat16, 1.36 and 2.05 eager in float32 (`poolattn bench models`, by the tables in
bench/README.md). No GPU was measured.
"""

import os

import torch
from torch.nn import functional as F

_use_fused = os.environ.get('TIMM_POOLATTN_FUSED_POOL', '1') != '0'


def use_fused_pool() -> bool:
    """Return True if the extremes are gathered where gradients are recorded; see `set_fused_pool`."""
    return _use_fused


def set_fused_pool(enable: bool = True) -> None:
    """Gather the extremes where gradients are recorded (the start value), or use amax and amin as all else does.

    In the manner of timm's `set_fused_attn`. TIMM_POOLATTN_FUSED_POOL=0 in the environment starts with False.
    """
    global _use_fused
    _use_fused = enable


def max_min_pool(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest and smallest value of each map: x (B, C, H, W) -> f_max, f_min, (B, C) each.

    Where several positions hold the extreme, amax and amin share its gradient evenly among them. The gathered form
    gives it to one of them, as max pooling does. Both are subgradients, with the same sum. Which form it is depends on
    the mode: see `_gathers`.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102  nested, so that TorchScript leaves it out
        if _gathers(x):
            return _gathered(x)
    return x.amax((2, 3)), x.amin((2, 3))


def _gathers(x: torch.Tensor) -> bool:
    """Return True where gradients are recorded, but compiled only where channels come last.

    What torch.export and TorchScript capture keeps to torch's own operators, amax and amin, and so does what is no
    plain tensor: an fx.Proxy, a DTensor.
    """
    if not _use_fused or type(x) is not torch.Tensor or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False
    if torch.compiler.is_compiling() and x.stride(1) != 1:
        return False
    return torch.is_grad_enabled() and x.requires_grad


def _gathered(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    index = torch.ops.timm_poolattn.extreme_positions(x.detach())
    if x.stride(1) == 1:  # channels last: the gradient gets the layout of x's others, which it is added to
        return x.permute(0, 2, 3, 1).flatten(1, 2).gather(1, index.mT).unbind(1)
    return x.flatten(2).gather(2, index).unbind(2)


@torch.library.custom_op('timm_poolattn::extreme_positions', mutates_args=())
def extreme_positions(x: torch.Tensor) -> torch.Tensor:
    """Find the positions in H*W of the largest and smallest value of each map: x (B, C, H, W) -> int64, (B, C, 2)."""
    b, c, h, w = x.shape
    if not x.is_cpu or (x.stride(1) != 1 and x.dtype in (torch.float32, torch.float64)):
        flat = x.flatten(2)
        return torch.stack([flat.argmax(2), flat.argmin(2)], dim=2)
    # on CPU argmax has no vector instructions, and max pooling has them where channels come last; contiguous maps of
    # float32 and float64 cost more to rearrange than that saves
    x = x.contiguous(memory_format=torch.channels_last)
    found = [F.max_pool2d(y, (h, w), return_indices=True)[1] for y in (x, -x)]
    return torch.stack(found, dim=4).view(b, c, 2)


@extreme_positions.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:2], 2, dtype=torch.long)


@extreme_positions.register_vmap
def _(info, in_dims: tuple[int], x: torch.Tensor) -> tuple[torch.Tensor, int]:
    x = x.movedim(in_dims[0], 0)
    return extreme_positions(x.flatten(0, 1)).unflatten(0, x.shape[:2]), 0
