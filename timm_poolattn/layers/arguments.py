import torch
from timm.layers import _assert  # private: asserts under FX too, as in timm's layers and models

from ..utils import UserError


def check_channels(x: torch.Tensor, channels: int, name: str) -> None:
    """Name both numbers where x (B, C, H, W) has not the `channels` that the module `name` was built for.

    For gates whose own parameters would be broadcast to the input; others have a layer that refuses it. The number is
    the parameters', not the one given at construction, which is another once a tool has pruned channels. An assertion
    as timm's own layers use it, so that FX can trace and TorchScript compile it.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102  nested, so that TorchScript leaves it out
        if torch.jit.is_tracing():  # which keeps no check, and warns of each
            return
    _assert(x.shape[1] == channels, f'{name} was built for {channels} channels, its input has {x.shape[1]}')


def check_rd_ratio(channels: int, rd_ratio: float, name: str) -> None:
    """Refuse a ratio of hidden channels that leaves less than one of `channels`."""
    if round(channels * rd_ratio, 6) < 1:  # 49 * (1 / 49) is a little less
        raise UserError(f'{name}: rd_ratio={rd_ratio:.4g} leaves no hidden channel of {channels}; 1/{channels} does')
