import torch
from torch import nn


class IdentityInit(nn.Module):
    """A channel gate that has no effect at first: x + alpha (gate(x) - x), with a learned alpha that starts at 0.

    Training moves alpha, then the gate (ReZero, https://arxiv.org/abs/2003.04887).

    Shape: (B, C, H, W) -> (B, C, H, W).

    Args:
        gate: (B, C, H, W) -> the same shape.
    """

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate
        self.alpha = nn.Parameter(next(gate.parameters()).new_zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.alpha.to(x.dtype) * (self.gate(x) - x)
