"""CBAM as the SAAM paper's baseline has it. timm's own CbamModule puts a batch norm behind the spatial convolution.

Paper: `CBAM: Convolutional Block Attention Module` - https://arxiv.org/abs/1807.06521
"""

import torch
from timm.layers.cbam import ChannelAttn
from torch import nn
from torch.nn import functional as F

from ..utils import UserError
from .arguments import check_rd_ratio


class CBAM(nn.Module):
    """Channel gate from average and max pooling, then a spatial gate: kernel_size^2 conv, 2 -> 1, no bias, no norm.

    Shape: (B, C, H, W) -> (B, C, H, W), any B and any H, W >= 1.

    Args:
        channels: C, the channels of the input.
        rd_ratio: hidden channels of the channel gate over C.
        kernel_size: of the spatial gate, odd.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        UserError: a `kernel_size` that is even or below 1, or an `rd_ratio` that leaves no channel.
        RuntimeError: the input has another number of channels.
    """

    def __init__(
        self,
        channels: int,
        *,
        rd_ratio: float = 1 / 4,
        kernel_size: int = 5,
        device=None,
        dtype=None,
    ) -> None:
        if kernel_size < 1 or kernel_size % 2 != 1:
            raise UserError(f'CBAM: kernel_size={kernel_size} must be odd and at least 1')
        check_rd_ratio(channels, rd_ratio, 'CBAM')
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.channel = ChannelAttn(channels, rd_ratio=rd_ratio, **dd)
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.channel(x)
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return x * F.sigmoid(self.conv(pooled)).to(x.dtype)
