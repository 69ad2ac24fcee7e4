"""SAAM: score-based aggregated attention.

Paper: `Score-based Aggregation for Attention Modules in Image Classification Tasks` (Lee, Chung; equation numbers are
its own)
"""

import torch
from timm.layers import make_divisible
from torch import nn
from torch.nn import functional as F

from ..utils import UserError
from .arguments import check_rd_ratio


class SAAM(nn.Module):
    """Channel attention whose pooling weights positions by a learned score map, Eq. 4-10.

    Scores beyond 65,504 on either side count as that, which Eq. 7 does not have: see `score_map`.

    Shape: (B, C, H, W) -> (B, C, H, W), any B and any H, W >= 1.

    Args:
        channels: C, the channels of the input.
        rd_ratio: hidden channels of g over C. The paper's t = 4 is 1/4.
        rd_channels: hidden channels of g, in place of `rd_ratio`.
        rd_divisor: what the hidden channels are rounded to a multiple of.
        paths: K, the number of score maps. They share g, whose outputs are summed before the sigmoid as CBAM does
            (inferred: the paper does not say).
        kernel_size: of the score convolution, odd.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Parameters are 2 C^2 rd_ratio + K kernel_size^2: no layer has a bias.

    Raises:
        UserError: an even `kernel_size`, one below 1, `paths` or `rd_channels` below 1, or an `rd_ratio` that leaves no
            channel.
        RuntimeError: the input has another number of channels.
    """

    def __init__(
        self,
        channels: int,
        *,
        rd_ratio: float = 1 / 4,
        rd_channels: int | None = None,
        rd_divisor: int = 1,
        paths: int = 1,
        kernel_size: int = 5,
        device=None,
        dtype=None,
    ) -> None:
        if kernel_size < 1 or kernel_size % 2 != 1:
            raise UserError(f'SAAM: kernel_size={kernel_size} must be odd and at least 1: V has the size of its input')
        if paths < 1:
            raise UserError(f'SAAM: paths={paths} must be at least 1')
        if rd_channels is None:
            check_rd_ratio(channels, rd_ratio, 'SAAM')
            rd_channels = make_divisible(channels * rd_ratio, rd_divisor, round_limit=0.0)
        if rd_channels < 1:
            raise UserError(f'SAAM: rd_channels={rd_channels} must be at least 1')
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv = nn.Conv2d(1, paths, kernel_size, padding=kernel_size // 2, bias=False, **dd)
        self.fc1 = nn.Linear(channels, rd_channels, bias=False, **dd)
        self.fc2 = nn.Linear(rd_channels, channels, bias=False, **dd)

    def score_map(self, x: torch.Tensor) -> torch.Tensor:
        """Return V of Eq. 7, shape (B, K, H, W): for each sample and path non-negative, with sum 1 over H, W."""
        u = self.conv(_as_channels_last(x.mean(1, keepdim=True)))  # Eq. 5, 6
        # float16's range: a score that overflows would turn the softmax into NaN. Of a wider dtype's scores beyond it
        # those on one side become equal. (OpenVINO converts no torch.nan_to_num, FX traces no torch.finfo.)
        u = u.clamp(-65504.0, 65504.0)
        # not reshape, which FX quantises to 8 bits with the softmax, nor view_as, which few converters know
        return u.flatten(2).softmax(dim=-1).unflatten(2, x.shape[2:])  # Eq. 7

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v = self.score_map(x).to(x.dtype)
        s = v.flatten(2) @ x.flatten(2).transpose(1, 2)  # Eq. 4: (B, K, C); torch's older ONNX exporter has no mT
        g = self.fc2(F.relu(self.fc1(s)).sum(1))  # Eq. 9; fc2 is linear, so the sum over paths may come before it
        return x * F.sigmoid(g).to(x.dtype)[:, :, None, None]  # Eq. 8, 10


def _as_channels_last(u: torch.Tensor) -> torch.Tensor:
    """Give u (B, 1, H, W) the strides of channels last: with one channel both layouts are the same in memory.

    Where they say contiguous, oneDNN takes 16 times as long for the gradient of the convolution's input (11.6 and
    0.7 ms, float32, 64 maps of 32 x 32, one thread). So u stays as it is where no gradient is wanted, which also keeps
    what FX traces equal to the last bit. Compiled, inductor gains nothing by the strides and fails on them where sides
    are dynamic, so u stays as it is there too, where it is traced or exported, and where it is no plain tensor: an
    fx.Proxy, a DTensor. A scripted gate has the strides on any device.
    """
    if not torch.jit.is_scripting():  # nested, so that TorchScript leaves it out
        if type(u) is not torch.Tensor or not u.is_cpu or not u.requires_grad:
            return u
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return u
    return u.squeeze(1).unsqueeze(3).permute(0, 3, 1, 2)
