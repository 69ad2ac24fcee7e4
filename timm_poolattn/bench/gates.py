"""Each gate alone, beside a copy of its input and timm's SE."""

import statistics
from collections.abc import Sequence
from itertools import product
from typing import Any

import timm
import torch
from torch import nn

from ..layers import GATES, FocusAssociation, create_gate, fa_weight
from ..utils import look_up, progress
from .machine import LAYOUTS, describe_machine
from .memory import bytes_moved, peak_bytes
from .timer import median_ratio, time_in_turns

#: Reads and writes of the map that a gate cannot do without: pooled, scaled; then in backward g and x for the gradient
#: of the scale, g again and the gradient of x.
FLOOR = {'forward': 3, 'training': 3 + 4}


class _FocusedWeight(nn.Module):
    """FA around a block that has given u: k from x, and X_{i+1}, Eq. 9."""

    def __init__(self, channels: int, u: torch.Tensor) -> None:
        super().__init__()
        self.fa, self.u = FocusAssociation(channels, 1, device=u.device, dtype=u.dtype), u

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fa_weight(x, self.u, self.fa(x, []))


class _Copy(nn.Module):
    """The identity, as a gate would have to pay for it: one map read, one written."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


def _map_sizes(models: Sequence[str]) -> dict[tuple[int, int], str]:
    """Return channels and side of the maps that the stages of `models` have, with the first model that has each."""
    sizes: dict[tuple[int, int], str] = {}
    for name in models:
        look_up('model', name, timm.list_models())
        model = timm.create_model(name, device='meta')
        side = model.pretrained_cfg['input_size'][-1]
        for info in (info for info in model.feature_info if info['module'] != 'act1'):  # that of a stem
            sizes.setdefault((info['num_chs'], side // info['reduction']), name)
    return sizes


def bench_gates(
    models: Sequence[str] = ('resnet20', 'resnet164', 'resnet50'),
    gates: Sequence[str] = ('identity', *GATES, 'fa'),
    *,
    layouts: Sequence[str] = ('contiguous', 'channels_last'),
    dtypes: Sequence[str] = ('float32', 'bfloat16'),
    compile: bool = False,
    batch_size: int = 64,
    device: torch.device | str = 'cpu',
    repeats: int = 5,
) -> dict[str, Any]:
    """Measure each gate alone, on maps of the sizes that the stages of a network have.

    Args:
        models: networks whose stages give the sizes. resnet56 has those of resnet20.
        gates: 'identity' (a copy of the map), 'fa', and names of `GATES`; identity and se are always measured.
        layouts: keys of `LAYOUTS`.
        dtypes: names of torch's.
        compile: measure each gate compiled, too.
        batch_size: maps at once.
        device: where the gates run.
        repeats: turns; as many come before, which do not count.

    Returns:
        What was measured where, and `rows`, for each gate, size, layout, dtype and `mode` (eager or compiled):

        - medians `forward_ms` and `training_ms` (forward and backward), with `_to_identity` and `_to_se`, medians over
          the turns of their ratio to those gates;
        - `forward_bandwidth_to_copy`, the maps of `FLOOR` over the time, relative to what the copy moves over its own;
        - `peak_maps`, the memory that training needs at most beyond its input and its gradient at the output, in maps;
        - `forward_moved` and `training_moved`, what the operations read and wrote, in maps (see `bytes_moved`), and
          `forward_to_floor` and `training_to_floor`, over `FLOOR`. Eager only.

    Raises:
        UserError: an unknown gate or layout.
    """
    gates = list(
        dict.fromkeys(look_up('gate', gate, ('identity', 'fa', *GATES)) for gate in ('identity', 'se', *gates))
    )
    layouts = [look_up('layout', layout, LAYOUTS) for layout in layouts]
    sizes = _map_sizes(models)
    cases = list(product(dtypes, layouts, sizes))
    rows = []
    for dtype, layout, (channels, side) in progress(cases, 'measuring', unit='size'):
        torch.compiler.reset()  # or the limit of recompilations ends the compiled ones
        dd = dict(device=device, dtype=getattr(torch, dtype))
        x, u, g = (
            torch.randn(batch_size, channels, side, side, **dd).to(memory_format=LAYOUTS[layout]) for _ in range(3)
        )
        x.requires_grad_()
        modules: dict[tuple[str, str], nn.Module] = {}
        for gate in gates:
            if gate == 'identity':
                module: nn.Module = _Copy()
            else:
                module = _FocusedWeight(channels, u) if gate == 'fa' else create_gate(gate, channels, **dd)
            modules[gate, 'eager'] = module
            if compile:
                modules[gate, 'compiled'] = torch.compile(module)

        @torch.no_grad()
        def forward(module: nn.Module) -> None:
            module(x)  # noqa: B023

        def training(module: nn.Module) -> None:
            module(x).backward(g)  # noqa: B023
            x.grad = None  # noqa: B023
            module.zero_grad()

        runs = {'forward': forward, 'training': training}
        timed = {
            kind: time_in_turns({key: lambda m=m, run=run: run(m) for key, m in modules.items()}, repeats, repeats)
            for kind, run in runs.items()
        }
        for (gate, mode), module in modules.items():
            row: dict[str, Any] = dict(gate=gate, model=sizes[channels, side], channels=channels, size=side)
            row.update(layout=layout, dtype=dtype, mode=mode)
            for kind, seconds in timed.items():
                row[f'{kind}_ms'] = 1000 * statistics.median(seconds[gate, mode])
                for reference in ('identity', 'se'):
                    row[f'{kind}_ms_to_{reference}'] = median_ratio(seconds[gate, mode], seconds[reference, mode])
            maps = 2 if gate == 'identity' else FLOOR['forward']
            row['forward_bandwidth_to_copy'] = maps / 2 / row['forward_ms_to_identity']
            row['peak_maps'] = peak_bytes(lambda module=module: training(module), device) / x.nbytes
            if mode == 'eager':
                for kind, run in runs.items():
                    row[f'{kind}_moved'] = bytes_moved(lambda run=run, module=module: run(module)) / x.nbytes
                    row[f'{kind}_to_floor'] = row[f'{kind}_moved'] / FLOOR[kind]
            rows.append(row)
    return dict(**describe_machine(device), batch_size=batch_size, repeats=repeats, rows=rows)
