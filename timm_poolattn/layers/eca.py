"""ECA: efficient channel attention, timm's layer with a forward of its own.

Paper: `ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks` - https://arxiv.org/abs/1910.03151
"""

import torch
from timm.layers import EcaModule


class ECA(EcaModule):
    """timm's EcaModule; it takes an empty batch too.

    Shape: (B, C, H, W) -> (B, C, H, W), any B and any H, W >= 1.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.mean((2, 3)).unsqueeze(1)  # timm's view(B, 1, -1) is ambiguous where B = 0
        y = self.conv(y)
        if self.conv2 is not None:  # use_mlp
            y = self.conv2(self.act(y))
        return x * self.gate(y).transpose(1, 2).unsqueeze(3)
