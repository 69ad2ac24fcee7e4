"""SAAM: score-based aggregated attention.

Paper: `Score-based Aggregation for Attention Modules in Image Classification Tasks` (Lee, Chung; equation numbers are
its own)
"""

import torch
from timm.layers import make_divisible
from torch import nn
from torch.nn import functional as F

from ._steps import channel_mean, scale, score_conv, weighted_pool
from .arguments import check_channels, check_rd_ratio


class SAAM(nn.Module):
    """Channel attention whose pooling weights positions by a learned score map, Eq. 4-10.

    Shape: (B, C, H, W) -> (B, C, H, W), any B and any H, W >= 1.

    Args:
        channels: C, the channels of the input.
        rd_ratio: hidden channels of g over C. Default: 1/4, the paper's t = 4.
        rd_channels: hidden channels of g, in place of `rd_ratio`.
        rd_divisor: what the hidden channels are rounded to a multiple of. Default: 1.
        paths: K, the number of score maps. They share g, whose outputs are summed before the sigmoid as CBAM does
            (inferred: the paper does not say). Default: 1.
        kernel_size: of the score convolution, odd. Default: 5.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Parameters are 2 C^2 rd_ratio + K kernel_size^2: no layer has a bias.

    Raises:
        ValueError: an even `kernel_size`, `paths` below 1, or an `rd_ratio` that leaves no channel.
        AssertionError: the input has another number of channels.
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
        if kernel_size % 2 != 1:
            raise ValueError(f'SAAM: kernel_size={kernel_size} must be odd, so that V has the size of its input')
        if paths < 1:
            raise ValueError(f'SAAM: paths={paths} must be at least 1')
        if rd_channels is None:
            check_rd_ratio(channels, rd_ratio, 'SAAM')
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.channels = channels
        rd_channels = rd_channels or make_divisible(channels * rd_ratio, rd_divisor, round_limit=0.0)
        self.conv = nn.Conv2d(1, paths, kernel_size, padding=kernel_size // 2, bias=False, **dd)
        self.fc1 = nn.Linear(channels, rd_channels, bias=False, **dd)
        self.fc2 = nn.Linear(rd_channels, channels, bias=False, **dd)

    def _scores(self, mean: torch.Tensor) -> torch.Tensor:
        u = score_conv(mean, self.conv.weight)  # Eq. 6
        # a score that overflows float16 would turn the softmax into NaN: take the largest finite number instead
        u = torch.nan_to_num(u)
        return u.flatten(2).softmax(dim=-1).view_as(u)  # Eq. 7

    def score_map(self, x: torch.Tensor) -> torch.Tensor:
        """V of Eq. 7, shape (B, K, H, W): for each sample and path non-negative, with sum 1 over H, W."""
        check_channels(x, self.channels, 'SAAM')
        return self._scores(x.mean(1, keepdim=True))  # Eq. 5

    def _gate(
        self,
        x: torch.Tensor,
        shortcut: torch.Tensor | None = None,
        affine: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        check_channels(x, self.channels, 'SAAM')
        x, mean = channel_mean(x, affine)  # Eq. 5
        x, s = weighted_pool(x, self._scores(mean).to(x.dtype))  # Eq. 4: (B, K, C)
        if affine is not None:
            a, d = affine
            s = torch.addcmul(d, s, a)  # the scores of a path sum to 1
        r = F.sigmoid(self.fc2(F.relu(self.fc1(s)).sum(1)))  # Eq. 8, 9; fc2 is linear, so the paths' sum may go first
        return scale(x, r, shortcut, affine)  # Eq. 10

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._gate(x)

    def forward_add(
        self, x: torch.Tensor, shortcut: torch.Tensor, affine: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """forward(x) + shortcut, or with `affine` = (a, d), (C) each, forward(a x + d) + shortcut: in fewer passes."""
        return self._gate(x, shortcut, affine)
