import torch
from torch import nn


def read_scalar_alpha(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *args) -> None:
    """Load an alpha of version 0.1, which has no axis. Such a parameter cannot be sharded by FSDP."""
    name = f'{prefix}alpha'
    if name in state_dict and state_dict[name].ndim == 0:
        state_dict[name] = state_dict[name].view(1)


class FadeIn(nn.Module):
    """A weight in (0, 1) that has no effect at first: 1 + alpha (k - 1), with a learned alpha that starts at 0.

    A module of its own, of one tensor: tools that take gradients by sample run what owns a parameter by itself.

    Shape: (B, 1) -> (B, 1).

    Args:
        device: Device of the parameter.
        dtype: Dtype of the parameter.
    """

    def __init__(self, *, device=None, dtype=None) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.register_load_state_dict_pre_hook(read_scalar_alpha)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start without effect."""
        nn.init.zeros_(self.alpha)

    def forward(self, k: torch.Tensor) -> torch.Tensor:
        return 1 + self.alpha * (k - 1)


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
        self.alpha = nn.Parameter(next(gate.parameters()).new_empty(1))
        self.register_load_state_dict_pre_hook(read_scalar_alpha)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start without effect."""
        nn.init.zeros_(self.alpha)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.alpha.to(x.dtype) * (self.gate(x) - x)
