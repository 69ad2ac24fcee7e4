"""SRM: style-based recalibration.

Paper: `SRM: A Style-based Recalibration Module for Convolutional Neural Networks` - https://arxiv.org/abs/1903.10829
"""

import torch
from torch import nn
from torch.nn import functional as F

from .arguments import check_channels


class SRM(nn.Module):
    """Channel attention from each channel's mean and standard deviation.

    Style pooling, a fully connected layer per channel (2C weights), batch norm (2C) and a sigmoid.

    Shape: (B, C, H, W) -> (B, C, H, W). As every batch norm over pooled features it needs B > 1 in training.

    Args:
        channels: C, the channels of the input.
        eps: added to the variance under the root.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        AssertionError: the input has another number of channels.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.eps = eps
        self.cfc = nn.Parameter(torch.empty(channels, 2, **dd))
        self.bn = nn.BatchNorm2d(channels, **dd)  # as in the authors' code: what freezes or swaps 2d norms finds it
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at zero, as in the authors' code: the gate is 1/2."""
        nn.init.zeros_(self.cfc)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_channels(x, self.cfc.shape[0], 'SRM')
        mean = x.mean((2, 3), keepdim=True)
        var = x.var((2, 3), unbiased=False, keepdim=True)  # few converters know torch.var_mean
        of_mean, of_std = self.cfc[:, :, None, None].unbind(1)
        z = mean * of_mean + (var + self.eps).sqrt() * of_std
        return x * F.sigmoid(self.bn(z)).to(x.dtype)
