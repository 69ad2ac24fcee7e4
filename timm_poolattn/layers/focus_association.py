"""FA: focus and association, attention over the blocks of a network.

Paper: `A Novel Block-wise Attention Method: Focus-and-Association Networks` (Liu et al.; equation numbers are its own)

Blocks B_0 ... B_{n-1} of a stage turn X_i into U_i. B_0 is the benchmark and has no gate. Block i >= 1 has a
`FocusAssociation(channels, i)`: one scalar k_i a sample, from X_i and the list of earlier k alone. So k_i is known
before block i runs. `fa_weight` gives X_{i+1}. Each stage starts a new list; whole stages are then gated once more in
the same way (Fig. 4). `Stage` in `models/_stage.py` wires both.
"""

from collections.abc import Callable

import torch
from timm.layers import make_divisible
from torch import nn
from torch.nn import functional as F

from ..utils import UserError
from .arguments import check_rd_ratio
from .identity_init import FadeIn


class Focus(nn.Module):
    """Focused attention k'_i in (0, 1), Eq. 5-7.

    Shape: (B, C, H, W) -> (B, 1).

    Args:
        channels: C, the channels of X_i.
        rd_ratio: hidden channels over C. The paper's r1 = 4 is 1/4.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        UserError: an `rd_ratio` that leaves no channel.
        RuntimeError: the input has another number of channels.
    """

    def __init__(self, channels: int, *, rd_ratio: float = 1 / 4, device=None, dtype=None) -> None:
        check_rd_ratio(channels, rd_ratio, 'Focus')
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        rd_channels = make_divisible(channels * rd_ratio, 1, round_limit=0.0)
        self.fc1 = nn.Linear(channels, rd_channels, **dd)  # W1, b1
        self.fc2 = nn.Linear(rd_channels, 1, **dd)  # W2, b2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f = x.mean((2, 3))  # Eq. 6
        return F.sigmoid(self.fc2(F.relu(self.fc1(f))))  # Eq. 5, 7


class Association(nn.Module):
    """Associative attention k_i in (0, 1), Eq. 8.

    Shape: s'_i = [k_1, ..., k_{i-1}, k'_i], (B, i) -> (B, 1).

    Args:
        index: i, at least 2.
        expand_ratio: hidden width over i, the paper's r2.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, index: int, *, expand_ratio: int = 4, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        # the paper prints R^{r2 x i} and no biases; its parameter counts need the hidden width r2 * i, and b1 to b4
        self.fc1 = nn.Linear(index, expand_ratio * index, **dd)  # W3, b3
        self.fc2 = nn.Linear(expand_ratio * index, 1, **dd)  # W4, b4

    def forward(self, s: torch.Tensor) -> torch.Tensor:
        return F.sigmoid(self.fc2(F.relu(self.fc1(s))))  # Eq. 8


class FocusAssociation(nn.Module):
    """The gate of block i >= 1: k_i = F_as(k_1, ..., k_{i-1}, F_fo(X_i)), Eq. 2; k_1 = k'_1, Eq. 4.

    Shape: X_i (B, C, H, W) and the i - 1 earlier k, each (B, 1) -> (B, 1).

    Args:
        channels: C, the channels of X_i.
        index: i, at least 1.
        rd_ratio: hidden channels of the focus over C. The paper's r1 = 4 is 1/4.
        expand_ratio: hidden width of the association over i, the paper's r2.
        identity_init: start without effect, by `FadeIn`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        UserError: `index` below 1 (block 0 is the benchmark and has no gate), `expand_ratio` below 1, or an `rd_ratio`
            that leaves no channel.
        RuntimeError: the input has another number of channels.
        AssertionError: `ks` has another number of earlier k.
    """

    def __init__(
        self,
        channels: int,
        index: int,
        *,
        rd_ratio: float = 1 / 4,
        expand_ratio: int = 4,
        identity_init: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        if index < 1:
            raise UserError(f'FocusAssociation: index={index} must be at least 1; block 0 is the benchmark, ungated')
        if expand_ratio < 1:
            raise UserError(f'FocusAssociation: expand_ratio={expand_ratio} must be at least 1')
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.index = index
        self.focus = Focus(channels, rd_ratio=rd_ratio, **dd)
        self.association = Association(index, expand_ratio=expand_ratio, **dd) if index > 1 else None
        self.fade_in = FadeIn(**dd) if identity_init else None
        self.register_load_state_dict_pre_hook(_read_own_alpha)

    def forward(self, x: torch.Tensor, ks: list[torch.Tensor]) -> torch.Tensor:
        assert len(ks) == self.index - 1, 'FA: block i takes the i - 1 earlier k; wrappers hand on their list itself'
        k = self.focus(x)  # k'_i, and k_1 by Eq. 4
        if self.association is not None:
            k = self.association(torch.cat(ks + [k], dim=1))  # Eq. 2
        return k if self.fade_in is None else self.fade_in(k)


def _read_own_alpha(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *args) -> None:
    """Load an alpha of version 0.1, which had it here."""
    if f'{prefix}alpha' in state_dict:
        state_dict[f'{prefix}fade_in.alpha'] = state_dict.pop(f'{prefix}alpha')


def fa_weight(x: torch.Tensor, u: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """X_{i+1} = X_i + (U_i - X_i) k_i, Eq. 9. Shapes: x and u (B, C, H, W), k (B, 1) -> (B, C, H, W).

    Written as (1 - k) X + k U, whose gradients need X and U alone. A compiled step keeps both anyway; U - X would be
    one map more, and the mask of U's ReLU another. A step of resnet20_fa over plain resnet20's takes 1.05 in float32
    and 1.08 in bfloat16 so, and 1.31 and 1.44 with `torch.lerp` (one thread, channels last). `torch.addcmul` would save
    a pass where nothing is compiled, and few converters know it.
    """
    k = k.to(x.dtype)[:, :, None, None]
    return x * (1 - k) + u * k  # Eq. 9


def fa_weight_unskipped(
    x: torch.Tensor,
    k: torch.Tensor,
    run: Callable[[torch.Tensor | slice], torch.Tensor],
    threshold: float,
    per_sample: bool = True,
) -> torch.Tensor:
    """Eq. 9 with k_i below `threshold` taken as 0: there X_{i+1} = X_i (Eq. 12), and the block does not run.

    Args:
        x: X_i, (B, C, H, W).
        k: k_i, (B, 1).
        run: U_i of the samples that it is given the indices of.
        threshold: in [0, 1].
        per_sample: run the samples above the threshold alone; else all of them or none.

    Raises:
        UserError: while tracing, which would keep what ran for one input.
    """
    if torch.jit.is_tracing():
        raise UserError('a trace cannot skip: it would keep what ran for one input; set_skip_threshold(model, 0) first')
    active = (k >= threshold).flatten()
    if not active.any():
        return x
    if active.all() or not per_sample:
        return fa_weight(x, run(slice(None)), k)
    index = active.nonzero().flatten()
    return x.index_copy(0, index, fa_weight(x[index], run(index), k[index]))
