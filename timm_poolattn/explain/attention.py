"""What the gates of a network did to given images, as arrays."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from timm.layers import CecaModule, EcaModule, EffectiveSEModule, SEModule
from timm.layers.cbam import CbamModule, ChannelAttn, LightCbamModule
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import nn

from ..layers import CBAM, SAAM, SGE, SPEM, SRM, FadeIn, FocusAssociation, IdentityInit
from ..utils import UserError


def _factor(out: torch.Tensor, x: torch.Tensor, dim: int) -> torch.Tensor:
    """Return f of out = f * x, constant along `dim`, read where |x| is largest; NaN where x is zero all along."""
    index = x.abs().argmax(dim, keepdim=True)
    return (out.gather(dim, index) / x.gather(dim, index)).squeeze(dim)


def _position(flat_index: torch.Tensor, width: int) -> torch.Tensor:
    return torch.stack([flat_index // width, flat_index % width], dim=-1)


def _channel(gate: nn.Module, x: torch.Tensor, out: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(weight=_factor(out.flatten(2), x.flatten(2), 2))


def _spem(gate: SPEM, x: torch.Tensor, out: torch.Tensor) -> dict[str, torch.Tensor]:
    flat, width = x.flatten(2), x.shape[3]
    (f_max, at_max), (f_min, at_min) = flat.max(2), flat.min(2)
    return dict(
        _channel(gate, x, out),
        f_max=f_max,
        f_min=f_min,
        argmax=_position(at_max, width),
        argmin=_position(at_min, width),
        map_size=torch.tensor(x.shape[2:]).expand(len(x), 2),
        pool_lambda=gate.pool_lambda().expand(len(x)),
    )


def _saam(gate: SAAM, x: torch.Tensor, out: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(_channel(gate, x, out), score_map=gate.score_map(x))


def _cbam(gate: nn.Module, x: torch.Tensor, out: torch.Tensor) -> dict[str, torch.Tensor]:
    between = gate.channel(x)
    return dict(_channel(gate, x, between), spatial=_factor(out, between, 1).unsqueeze(1))


def _sge(gate: SGE, x: torch.Tensor, out: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(spatial=_factor(out.unflatten(1, (gate.groups, -1)), x.unflatten(1, (gate.groups, -1)), 2))


def _fa(gate: FocusAssociation, x: torch.Tensor, out: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(k=out.squeeze(1))


#: What is traced, ours and timm's own: the gate's name and how to read it.
_READERS: dict[type[nn.Module], tuple[str, Callable[..., dict[str, torch.Tensor]]]] = {
    SPEM: ('spem', _spem),
    SAAM: ('saam', _saam),
    FocusAssociation: ('fa', _fa),
    CBAM: ('cbam', _cbam),
    CbamModule: ('cbam', _cbam),
    LightCbamModule: ('cbam', _cbam),
    SEModule: ('se', _channel),
    SqueezeExcite: ('se', _channel),
    EffectiveSEModule: ('se', _channel),
    ChannelAttn: ('se2', _channel),
    EcaModule: ('eca', _channel),
    CecaModule: ('eca', _channel),
    SRM: ('srm', _channel),
    SGE: ('sge', _sge),
}


def find_gates(model: nn.Module) -> dict[str, nn.Module]:
    """Return the gates of `model` by module name, without those inside another gate."""
    gates: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, tuple(_READERS)) and not any(name.startswith(f'{outer}.') for outer in gates):
            gates[name] = module
    return gates


def block_label(name: str) -> str:
    """Return stage and block by their numbers from 0: '2.1' of a gate's module name 'stages.2.blocks.1.gate'."""
    block = name.partition('.body')[0]  # a VGG block is a sequence, whose numbers are layers
    return '.'.join(re.findall(r'\d+', block)) or block


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode, and afterwards each module's own mode again."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _skip_threshold(model: nn.Module, name: str) -> tuple[float, bool]:
    """Return `set_skip_threshold` as it stands for the FA gate `name`: (threshold, per_sample)."""
    while name:
        name = name.rpartition('.')[0]
        owner = model.get_submodule(name)
        if hasattr(owner, 'skip_threshold'):
            return owner.skip_threshold, owner.skip_per_sample
    return 0.0, True


def attention_trace(model: nn.Module, x: torch.Tensor) -> dict[str, dict[str, Any]]:
    """Trace what each gate did to a batch, in evaluation mode. The model is left as it was, also after an error.

    Args:
        model: a network with gates of this package, its own or put there by `insert`, or with timm's SE, ECA or CBAM.
        x: (B, 3, H, W), normalised, on the model's device.

    Returns:
        By module name, in the order of the network: `gate`, its name as in model names, and float or int arrays.

        - channel gates (all but SGE and FA): `weight` (B, C), by which each channel was multiplied: SPEM's
          v_exc * v_rew, SAAM's r. NaN for a channel that was zero everywhere.
        - SPEM: `pool_lambda` (B,) in [0, 1], Eq. 3; `f_max`, `f_min` (B, C), Eq. 1; `argmax`, `argmin` (B, C, 2), row
          and column of the first position that has them, in a map of `map_size` (B, 2), h and w.
        - SAAM: `score_map` (B, K, h, w), V of Eq. 7, which sums to 1 over h, w.
        - CBAM, SGE: `spatial` (B, 1 or groups, h, w), by which each position was multiplied.
        - FA: `k` (B,) in (0, 1), Eq. 8; `skipped` (B,), where `set_skip_threshold` left the block out.
        - with `identity_init`: `alpha`, the learned share of the gate. It starts at 0, where the gate has no effect and
          k is 1.

        Where a skipped block or stage kept a gate from running, its floats are NaN and its integers -1.

    Raises:
        UserError: a model without gates.
    """
    gates = find_gates(model)
    if not gates:
        raise UserError(
            f"{type(model).__name__} has no gates to trace, of ours or timm's; timm_poolattn.insert(model, gate) puts"
            f' some in'
        )
    labels = {
        name: next(_READERS[kind] for kind in type(gate).__mro__ if kind in _READERS) for name, gate in gates.items()
    }
    thresholds = {name: _skip_threshold(model, name) for name in gates if labels[name][0] == 'fa'}
    # samples are skipped one by one: only alone is it clear whose row a gate got
    size = 1 if any(threshold > 0 and per_sample for threshold, per_sample in thresholds.values()) else len(x)
    starts = range(0, len(x), size)

    traced: dict[str, dict[int, dict[str, torch.Tensor]]] = {name: {} for name in gates}
    handles = []
    try:
        with torch.no_grad(), evaluating(model):
            for name, gate in gates.items():

                def record(gate, args, out, parts=traced[name], read=labels[name][1]) -> None:
                    parts[start] = {key: value.cpu() for key, value in read(gate, args[0], out).items()}

                handles.append(gate.register_forward_hook(record))
            for start in starts:
                model(x[start : start + size])
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: _merge(model, name, labels[name][0], [parts.get(start) for start in starts], size, thresholds.get(name))
        for name, parts in traced.items()
        if parts or name in thresholds
    }


def _merge(
    model: nn.Module,
    name: str,
    gate: str,
    parts: list[dict[str, torch.Tensor] | None],
    size: int,
    threshold: tuple[float, bool] | None,
) -> dict[str, Any]:
    ran = next((part for part in parts if part is not None), dict(k=torch.empty(0)))
    missing = {
        key: like.new_full((size, *like.shape[1:]), torch.nan if like.is_floating_point() else -1)
        for key, like in ran.items()
    }
    merged: dict[str, Any] = dict(gate=gate)
    for key in ran:
        value = torch.cat([(part or missing)[key] for part in parts])
        merged[key] = (value.float() if value.is_floating_point() else value).numpy()
    if threshold is not None:
        value, per_sample = threshold
        skipped = ~(merged['k'] >= value)
        merged['skipped'] = skipped if per_sample else np.full_like(skipped, skipped.all())
    for module in (model.get_submodule(name), model.get_submodule(name.rpartition('.')[0])):
        start = module.fade_in if isinstance(module, FocusAssociation) else module
        if isinstance(start, FadeIn | IdentityInit):
            merged['alpha'] = start.alpha.item()
    return merged
