"""The end of a residual branch, in eager mode: with one pass less over the map, and one map less in memory."""

from contextlib import nullcontext

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from ..layers import SAAM, SPEM
from ..layers._steps import folds_norm, hooked, norm_affine, trains_compiled, trains_eagerly


class _KeptByNorm(saved_tensors_hooks):
    """Within it, x = norm(...) is not saved for backward: it is computed again from the input that the norm saves."""

    def __init__(self, norm: nn.BatchNorm2d, x: torch.Tensor) -> None:
        # not x itself, which the hooks would keep alive
        node, address, shape = x.grad_fn, x.untyped_storage()._cdata, x.shape
        uses = 0
        again: torch.Tensor | None = None

        def pack(saved: torch.Tensor) -> torch.Tensor | None:
            nonlocal uses
            if saved.untyped_storage()._cdata != address or saved.shape != shape:
                return saved
            uses += 1
            return None

        @torch.no_grad()
        def unpack(packed: torch.Tensor | None) -> torch.Tensor:
            nonlocal uses, again
            if packed is not None:
                return packed
            x = again
            if x is None:
                var = node._saved_result2**-2 - norm.eps
                x = F.batch_norm(node._saved_input, node._saved_result1, var, norm.weight, norm.bias, eps=norm.eps)
            uses -= 1
            again = x if uses > 0 else None
            return x

        super().__init__(pack, unpack)


def add_gated(block: nn.Module, norm: nn.Module, x: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
    """block.drop_path(block.gate(norm(x))) + shortcut. Shapes: (B, C, H, W)."""
    gate = block.gate
    adds = isinstance(gate, (SPEM, SAAM)) and isinstance(block.drop_path, nn.Identity) and not hooked(gate)
    if adds and folds_norm(norm, x):
        x, affine = norm_affine(norm, x)
        return gate.forward_add(x, shortcut, affine)
    if block.fa is not None and trains_compiled(x) and folds_norm(norm, x):
        x, (a, d) = norm_affine(norm, x)
        x = x * a[:, None, None] + d[:, None, None]  # fuses with all that follows up to FA's weight
    else:
        x = norm(x)
    if isinstance(gate, nn.Identity):
        return block.drop_path(x) + shortcut
    kept = type(norm) is nn.BatchNorm2d and norm.training and trains_eagerly(x) and hasattr(x.grad_fn, '_saved_result2')
    # checkpointing, for one, saves nothing itself and lets nothing be read twice
    kept = kept and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    with _KeptByNorm(norm, x) if kept else nullcontext():
        if adds:
            return gate.forward_add(x, shortcut)
        x = gate(x)
    return block.drop_path(x) + shortcut
