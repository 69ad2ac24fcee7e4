"""SPEM: self-adaptive pooling enhanced attention.

Paper: `Mix-Pooling Strategy for Attention Mechanism` - https://arxiv.org/abs/2208.10322 (equation numbers are its own)
"""

import torch
from torch import nn
from torch.nn import functional as F

from ._steps import max_min_pool, scale
from .arguments import check_channels

#: Ways to build v_rew: Eq. 5-6, rows a-g of Table 4, its last row, and the authors' published code.
REWEIGHT_FORMS = (
    'sum',  # Eq. 5-6
    'unshared',  # a: f_max and f_min have a g_rew each
    'no_sigmoid',  # b
    'product',  # c: g(f_max) * g(f_min)
    'sigmoid_sum',  # d: sigmoid before adding
    'sigmoid_product',  # e: sigmoid before multiplying (inferred, the caption is cut)
    'max',  # f: f_max only (inferred from the text)
    'min',  # g: f_min only
    'none',  # no reweighting module
    'public',  # the authors' code, see SPEM
)


class SPEM(nn.Module):
    """Channel attention from a learned mix of global max and min pooling, Eq. 1-7.

    Shape: (B, C, H, W) -> (B, C, H, W), any B and any H, W >= 1. Where several positions share the maximum (or the
    minimum) of a channel, they share its gradient; in eager mode on a GPU or with channels last, one of them gets it.

    Args:
        channels: C, the channels of the input.
        fixed_lambda: a constant in [0, 1] in place of the learned lambda of Eq. 3 (the rows of Table 3).
            Default: None, learned.
        reweight: how v_rew is built, one of `REWEIGHT_FORMS`. Default: 'sum', Eq. 5-6. 'public' is the form of the
            authors' published code, whose checkpoints it loads: both pools first pass g_rew, so that beta_rew counts
            twice in v_rew, and u mixes the transformed pools.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Parameters are 4C + 2; 6C + 2 where unshared, 2C + 2 without reweighting, and 2 less where lambda is fixed.

    Raises:
        ValueError: `fixed_lambda` outside [0, 1] or an unknown `reweight`.
        AssertionError: the input has another number of channels.
    """

    def __init__(
        self,
        channels: int,
        *,
        fixed_lambda: float | None = None,
        reweight: str = 'sum',
        device=None,
        dtype=None,
    ) -> None:
        if fixed_lambda is not None and not 0.0 <= fixed_lambda <= 1.0:
            raise ValueError(f'SPEM: fixed_lambda={fixed_lambda} must lie in [0, 1]; None learns it')
        if reweight not in REWEIGHT_FORMS:
            raise ValueError(f'SPEM: unknown reweight={reweight!r}; choose from {", ".join(REWEIGHT_FORMS)}')
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.channels = channels
        self.fixed_lambda = fixed_lambda
        self.reweight = reweight
        self.register_parameter('p', nn.Parameter(torch.empty(2, **dd)) if fixed_lambda is None else None)
        self.gamma_exc = nn.Parameter(torch.empty(channels, **dd))
        self.beta_exc = nn.Parameter(torch.empty(channels, **dd))
        # rows are (f_max, f_min) where unshared
        shape = (2, channels) if reweight == 'unshared' else (channels,)
        has_rew = reweight != 'none'
        self.register_parameter('gamma_rew', nn.Parameter(torch.empty(shape, **dd)) if has_rew else None)
        self.register_parameter('beta_rew', nn.Parameter(torch.empty(shape, **dd)) if has_rew else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start values of Sec. 3.1-3.3: p0 = p1 = 0.5, gamma 0, beta -1."""
        if self.p is not None:
            nn.init.constant_(self.p, 0.5)
        nn.init.zeros_(self.gamma_exc)
        nn.init.constant_(self.beta_exc, -1.0)
        if self.gamma_rew is not None:
            nn.init.zeros_(self.gamma_rew)
            nn.init.constant_(self.beta_rew, -1.0)

    def extra_repr(self) -> str:
        return f'{self.channels}, fixed_lambda={self.fixed_lambda}, reweight={self.reweight!r}'

    @torch.jit.ignore
    def penalty(self) -> torch.Tensor:
        """p0^2 + p1^2 of Eq. 8, a scalar without its eta; zero where lambda is fixed."""
        return self.beta_exc.new_zeros(()) if self.p is None else self.p.square().sum()

    @torch.jit.ignore
    def pool_lambda(self) -> torch.Tensor:
        """lambda of Eq. 3, a scalar: the weight of max pooling, in [0, 1]."""
        if self.p is None:
            return self.beta_exc.new_tensor(self.fixed_lambda)
        return self.p[0].square() / self.p.square().sum()

    def _mix(self, f_max: torch.Tensor, f_min: torch.Tensor) -> torch.Tensor:
        if self.p is None:
            return torch.lerp(f_min, f_max, self.fixed_lambda)  # Eq. 2
        p2 = self.p.square()
        lambda_ = (p2 / p2.sum())[0]  # Eq. 3
        return torch.lerp(f_min, f_max, lambda_)  # Eq. 2

    def _v_rew(self, f_max: torch.Tensor, f_min: torch.Tensor) -> torch.Tensor:
        gamma, beta = self.gamma_rew, self.beta_rew
        if self.reweight == 'unshared':
            return F.sigmoid(gamma[0] * f_max + beta[0] + gamma[1] * f_min + beta[1])
        elif self.reweight == 'no_sigmoid':
            return gamma * (f_min + f_max) + beta
        elif self.reweight == 'product':
            return F.sigmoid((gamma * f_max + beta) * (gamma * f_min + beta))
        elif self.reweight == 'sigmoid_sum':
            return F.sigmoid(gamma * f_max + beta) + F.sigmoid(gamma * f_min + beta)
        elif self.reweight == 'sigmoid_product':
            return F.sigmoid(gamma * f_max + beta) * F.sigmoid(gamma * f_min + beta)
        elif self.reweight == 'max':
            return F.sigmoid(gamma * f_max + beta)
        elif self.reweight == 'min':
            return F.sigmoid(gamma * f_min + beta)
        return F.sigmoid(torch.addcmul(beta, gamma, f_min + f_max))  # Eq. 5-6

    def _gate(
        self,
        x: torch.Tensor,
        shortcut: torch.Tensor | None = None,
        affine: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        check_channels(x, self.channels, 'SPEM')
        x, f_max, f_min = max_min_pool(x)  # Eq. 1
        if affine is not None:
            a, d = affine
            f_max, f_min = torch.addcmul(d, f_max, a), torch.addcmul(d, f_min, a)
            f_max, f_min = torch.maximum(f_max, f_min), torch.minimum(f_max, f_min)  # a < 0 swaps them
        if self.reweight == 'public':
            f_max = f_max * self.gamma_rew + self.beta_rew
            f_min = f_min * self.gamma_rew + self.beta_rew
        u = self._mix(f_max, f_min)
        v = F.sigmoid(torch.addcmul(self.beta_exc, self.gamma_exc, u))  # v_exc, Eq. 4
        if self.reweight == 'public':
            v = v * F.sigmoid(f_max + f_min)
        elif self.reweight != 'none':
            v = v * self._v_rew(f_max, f_min)  # Eq. 7
        return scale(x, v, shortcut, affine)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._gate(x)

    def forward_add(
        self, x: torch.Tensor, shortcut: torch.Tensor, affine: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """forward(x) + shortcut, or with `affine` = (a, d), (C) each, forward(a x + d) + shortcut: in fewer passes."""
        return self._gate(x, shortcut, affine)
