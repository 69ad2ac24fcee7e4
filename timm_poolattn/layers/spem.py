"""SPEM: self-adaptive pooling enhanced attention.

Paper: `Mix-Pooling Strategy for Attention Mechanism` - https://arxiv.org/abs/2208.10322 (equation numbers are its own)
"""

import torch
from torch import nn
from torch.nn import functional as F

from ..utils import UserError, look_up
from .arguments import check_channels
from .max_min_pool import max_min_pool

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

    Shape: (B, C, H, W) -> (B, C, H, W), any B and any H, W >= 1. Which of several equal extremes gets the gradient:
    see `max_min_pool`.

    Args:
        channels: C, the channels of the input.
        fixed_lambda: a constant in [0, 1] in place of the learned lambda of Eq. 3 (the rows of Table 3).
            None learns it.
        reweight: how v_rew is built, one of `REWEIGHT_FORMS`. 'sum' is Eq. 5-6, 'public' the form of the
            authors' published code, whose checkpoints it loads: both pools first pass g_rew, so that beta_rew counts
            twice in v_rew, and u mixes the transformed pools.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Parameters are 4C + 2; 6C + 2 where unshared, 2C + 2 without reweighting, and 2 less where lambda is fixed.

    Raises:
        UserError: `fixed_lambda` outside [0, 1] or an unknown `reweight`.
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
            raise UserError(f'SPEM: fixed_lambda={fixed_lambda} must lie in [0, 1]; None learns it')
        look_up('reweight', reweight, REWEIGHT_FORMS)
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
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
        return f'{self.gamma_exc.shape[0]}, fixed_lambda={self.fixed_lambda}, reweight={self.reweight!r}'

    @torch.jit.ignore
    def penalty(self) -> torch.Tensor:
        """Return p0^2 + p1^2 of Eq. 8, a scalar without its eta; zero where lambda is fixed."""
        return self.beta_exc.new_zeros(()) if self.p is None else self.p.square().sum()

    def pool_lambda(self) -> torch.Tensor:
        """Return lambda of Eq. 3, a scalar: the weight of max pooling, in [0, 1]. Where both p are 0 it is 1/2."""
        if self.p is None:
            return self.beta_exc.new_full((), self.fixed_lambda)
        p2 = self.p.to(torch.promote_types(self.p.dtype, torch.float32)).square()  # float16 holds 6e-8 to 65504
        p2 = torch.where(p2.sum() != 0, p2, torch.ones_like(p2))
        return (p2 / p2.sum())[0]

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
        elif self.reweight == 'public':
            return F.sigmoid(f_max + f_min)
        return F.sigmoid(gamma * (f_min + f_max) + beta)  # Eq. 5, 6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_channels(x, self.gamma_exc.shape[0], 'SPEM')
        f_max, f_min = max_min_pool(x)  # Eq. 1
        if self.reweight == 'public':
            f_max, f_min = self.gamma_rew * f_max + self.beta_rew, self.gamma_rew * f_min + self.beta_rew
        lambda_ = self.pool_lambda()  # Eq. 3
        u = lambda_ * f_max + (1 - lambda_) * f_min  # Eq. 2
        v = F.sigmoid(self.gamma_exc * u + self.beta_exc)  # v_exc, Eq. 4
        if self.reweight != 'none':
            v = v * self._v_rew(f_max, f_min)
        return x * v.to(x.dtype)[:, :, None, None]  # Eq. 7
