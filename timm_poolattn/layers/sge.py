"""SGE: spatial group-wise enhancement.

Paper: `Spatial Group-wise Enhance: Improving Semantic Feature Learning in Convolutional Networks`
- https://arxiv.org/abs/1905.09646
"""

import torch
from torch import nn
from torch.nn import functional as F

from ..utils import UserError


class SGE(nn.Module):
    """Spatial attention within each group of channels, from the similarity of a position to the group's mean.

    Shape: (B, C, H, W) -> (B, C, H, W), any B and any H, W >= 1.

    Args:
        channels: C, the channels of the input.
        groups: G, the groups of channels; 2G parameters. (No printed count of the SPEM paper settles it.)
        eps: added to the standard deviation.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        UserError: `groups` does not divide `channels`.
        RuntimeError: `groups` does not divide the channels of the input.
    """

    def __init__(self, channels: int, *, groups: int = 8, eps: float = 1e-5, device=None, dtype=None) -> None:
        if groups < 1 or channels % groups:
            raise UserError(f'SGE: groups={groups} must divide channels={channels}, and be at least 1')
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(groups, 1, **dd))
        self.bias = nn.Parameter(torch.empty(groups, 1, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with the gate at sigmoid(1) everywhere."""
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = x.unflatten(1, (self.groups, -1))  # (B, G, C/G, H, W)
        c = (groups * groups.mean((3, 4), keepdim=True)).sum(2)  # similarity (B, G, H, W)
        c = (c - c.mean((2, 3), keepdim=True)) / (c.std((2, 3), unbiased=False, keepdim=True) + self.eps)
        a = F.sigmoid(c * self.weight[:, :, None] + self.bias[:, :, None]).to(x.dtype)
        return (groups * a.unsqueeze(2)).flatten(1, 2)
