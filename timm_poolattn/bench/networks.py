"""Measurements, printed and never asserted: medians, and ratios within one run."""

import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import reparameterize_model
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from ..data import ImageData
from ..inference import evaluate
from ..layers import GATES, FocusAssociation, create_gate, fa_weight

_IMPORT = """
import json, time
start = time.perf_counter()
import timm
middle = time.perf_counter()
import timm_poolattn
print(json.dumps([middle - start, time.perf_counter() - middle]))
"""


def bench_import(runs: int = 5) -> dict[str, float]:
    """What `import timm_poolattn` adds to `import timm`, in fresh processes.

    Args:
        runs: processes. Default: 5.

    Returns:
        Medians `timm_ms` and `timm_poolattn_ms`, and the median `ratio` of the second to the first.
    """
    times = []
    for _ in tqdm(range(runs), desc='importing', delay=1, leave=False):
        done = subprocess.run([sys.executable, '-c', _IMPORT], capture_output=True, text=True, check=True)
        times.append(json.loads(done.stdout))
    return dict(
        timm_ms=1000 * statistics.median(t for t, _ in times),
        timm_poolattn_ms=1000 * statistics.median(t for _, t in times),
        ratio=statistics.median(ours / timm for timm, ours in times),
    )


def _environment(device: torch.device | str) -> dict[str, Any]:
    from ..version import __version__

    on_cuda = torch.device(device).type == 'cuda'
    return dict(
        machine=torch.cuda.get_device_name(device) if on_cuda else f'{os.cpu_count()} CPU cores ({platform.machine()})',
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        timm=timm.__version__,
        timm_poolattn=__version__,
        date=date.today().isoformat(),
    )


def _measure(
    contenders: dict[str, Callable[[], Any]], device: torch.device | str, repeats: int
) -> dict[str, list[dict[str, float]]]:
    """Seconds of each contender, in turns, so that what else the machine does meets all of them alike.

    Returns:
        For each contender and turn `wall` and `cpu`: the latter counts this process alone, of all its threads.
    """
    sync = torch.cuda.synchronize if torch.device(device).type == 'cuda' else lambda: None
    for run in contenders.values():
        run()  # warm up, compile
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            sync()
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            sync()
            seconds[name].append(dict(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu))
    return seconds


def _median(seconds: list[dict[str, float]], clock: str = 'wall') -> float:
    return statistics.median(turn[clock] for turn in seconds)


def _ratio(seconds: list[dict[str, float]], reference: list[dict[str, float]], clock: str = 'wall') -> float:
    """Median over the turns of this time over that of the reference."""
    return statistics.median(a[clock] / b[clock] for a, b in zip(seconds, reference, strict=True))


def peak_bytes(run: Callable[[], Any], device: torch.device | str = 'cpu') -> int:
    """The most that `run` holds at once in tensors, beyond what was allocated before, as the allocator counts it."""
    if torch.device(device).type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault('KINETO_LOG_LEVEL', '5')  # else the profiler writes lines of its own
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == '[memory]']
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def plain_name(name: str) -> str | None:
    """The registered backbone of a gated model without its gate, or None for a model without one."""
    arch, _, tag = name.partition('.')
    plain, _, gate = arch.rpartition('_')
    if gate not in (*GATES, 'fa', 'fase'):
        return None
    if timm.is_model(f'cifar_{plain}'):  # where timm owns the plain name
        plain = f'cifar_{plain}'
    return f'{plain}.{tag}' if tag else plain


class _BytesMoved(TorchDispatchMode):
    """Counts what operations read and write: their tensor arguments and results, each once. Views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        read, written = (
            [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)] for tree in ((args, kwargs), out)
        )
        address = lambda t: t.untyped_storage().data_ptr()  # noqa: E731
        is_view = not func._schema.is_mutable and {*map(address, written)} & {*map(address, read)}
        if not is_view and 'empty' not in func.__name__:
            self.total += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in (*read, *written))
        return out


def bytes_moved(run: Callable[[], Any]) -> int:
    """What the operations of an eager `run` read and write, in bytes."""
    with _BytesMoved() as moved:
        run()
    return moved.total


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


#: Reads and writes of the map that a gate cannot do without: pooled, scaled; then in backward g and x for the gradient
#: of the scale, g again and the gradient of x.
FLOOR = {'forward': 3, 'training': 3 + 4}


def bench_gates(
    models: Sequence[str] = ('resnet20', 'resnet164', 'resnet50'),
    gates: Sequence[str] = ('identity', *GATES, 'fa'),
    *,
    layouts: Sequence[str] = ('contiguous', 'channels_last'),
    dtypes: Sequence[str] = ('float32', 'bfloat16'),
    compile: bool = False,
    batch_size: int = 64,
    device: torch.device | str = 'cpu',
    repeats: int = 10,
) -> dict[str, Any]:
    """Each gate alone, on maps of the sizes that the stages of a network have.

    Args:
        models: networks whose stages give the sizes. resnet56 has those of resnet20. Default: resnet20, 164 and 50.
        gates: 'identity' (a copy of the map), 'fa', and names of `GATES`; identity and se are always measured.
        layouts: 'contiguous', 'channels_last'. Default: both.
        dtypes: names of torch's. Default: float32 and bfloat16.
        compile: measure each gate compiled, too. Default: False.
        batch_size: Default: 64.
        device: Default: 'cpu'.
        repeats: turns. Default: 10.

    Returns:
        What was measured where, and `rows`, for each gate, size, layout, dtype and `mode` (eager or compiled):

        - medians `forward_ms` and `training_ms` (forward and backward), with `_to_identity` and `_to_se`, medians over
          the turns of their ratio to those gates; and likewise `_cpu` in place of `_ms`, by the time that the process
          spent on all its threads, which a busy machine disturbs less;
        - `forward_bandwidth_to_copy`, the maps of `FLOOR` over the time, relative to what the copy moves over its own;
        - `peak_maps`, the memory that training needs at most beyond its input and its gradient at the output, in maps;
        - `forward_moved` and `training_moved`, what the operations read and wrote, in maps (see `bytes_moved`), and
          `forward_to_floor` and `training_to_floor`, over `FLOOR`. Eager only.

    Raises:
        ValueError: an unknown gate.
    """
    gates = list(dict.fromkeys(('identity', 'se', *gates)))
    unknown = [name for name in gates if name not in ('identity', 'fa', *GATES)]
    if unknown:
        raise ValueError(f'unknown gate {unknown[0]!r}; choose from identity, fa, {", ".join(GATES)}')
    sizes: dict[tuple[int, int], str] = {}
    for name in models:
        with torch.device('meta'):
            model = timm.create_model(name)
        side = model.pretrained_cfg['input_size'][-1]
        for info in model.feature_info[1:]:
            sizes.setdefault((info['num_chs'], side // info['reduction']), name)
    cases = [(size, layout, dtype) for dtype in dtypes for layout in layouts for size in sizes]
    rows = []
    for (channels, side), layout, dtype in tqdm(cases, desc='measuring', unit='size', delay=1, leave=False):
        dd = dict(device=device, dtype=getattr(torch, dtype))
        memory_format = torch.channels_last if layout == 'channels_last' else torch.contiguous_format
        x, u, g = (
            torch.randn(batch_size, channels, side, side, **dd).to(memory_format=memory_format) for _ in range(3)
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

        timed = {
            kind: _measure({key: lambda m=m, run=run: run(m) for key, m in modules.items()}, device, repeats)
            for kind, run in (('forward', forward), ('training', training))
        }
        for (gate, mode), module in modules.items():
            row: dict[str, Any] = dict(
                gate=gate,
                model=sizes[channels, side],
                channels=channels,
                size=side,
                layout=layout,
                dtype=dtype,
                mode=mode,
            )
            for kind, seconds in timed.items():
                for clock, unit in (('wall', 'ms'), ('cpu', 'cpu')):
                    row[f'{kind}_{unit}'] = 1000 * _median(seconds[gate, mode], clock)
                    for reference in ('identity', 'se'):
                        ratio = _ratio(seconds[gate, mode], seconds[reference, mode], clock)
                        row[f'{kind}_{unit}_to_{reference}'] = ratio
            maps = 2 if gate == 'identity' else FLOOR['forward']
            row['forward_bandwidth_to_copy'] = maps / 2 / row['forward_ms_to_identity']
            row['peak_maps'] = peak_bytes(lambda module=module: training(module), device) / x.nbytes
            if mode == 'eager':
                for kind, run in (('forward', forward), ('training', training)):
                    row[f'{kind}_moved'] = bytes_moved(lambda run=run, module=module: run(module)) / x.nbytes
                    row[f'{kind}_to_floor'] = row[f'{kind}_moved'] / FLOOR[kind]
            rows.append(row)
    return dict(**_environment(device), batch_size=batch_size, repeats=repeats, rows=rows)


def _spem_authors(path: Path) -> nn.Module:
    """ResNet-164 with SPEM as its authors publish it, from a checkout of Qrange-group/SPEM."""
    file = path / 'models' / 'spem.py'
    if not file.is_file():
        raise FileNotFoundError(f'{file}: not there; --spem-authors takes a checkout of github.com/Qrange-group/SPEM')
    spec = importlib.util.spec_from_file_location('spem_authors', file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SPEM(164, num_classes=10, block_name='bottleneck')


def bench_models(
    names: Sequence[str] = ('resnet164_spem', 'resnet56_saam', 'resnet56_fa'),
    *,
    compile: bool = False,
    reparameterize: bool = False,
    channels_last: bool = False,
    batch_size: int = 64,
    memory_batch_size: int = 128,
    device: torch.device | str = 'cpu',
    repeats: int = 5,
    spem_authors: Path | None = None,
) -> dict[str, Any]:
    """Whole networks: inference and training, relative to the same backbone without its gates in the same run.

    Args:
        names: of our models with gates. Default: resnet164_spem, resnet56_saam, resnet56_fa.
        compile: measure them compiled, too. Default: False.
        reparameterize: measure inference with `timm.utils.reparameterize_model` too, where a model has something to
            fold. Default: False.
        channels_last: run ours and the plain ones in this memory format. Default: False.
        batch_size: Default: 64.
        memory_batch_size: of the step whose memory is taken. Default: 128.
        device: Default: 'cpu'.
        repeats: turns. Default: 5.
        spem_authors: a checkout of github.com/Qrange-group/SPEM. Its ResNet-164 runs, eager and contiguous as it is
            published, beside resnet164_spem. Default: None.

    Returns:
        What was measured where, and `rows`, for each `model` and `mode` (eager, compiled or, with no figures of
        training, reparameterized), the plain backbone first:

        - medians `inference_images_per_s` and `training_images_per_s` (forward, cross entropy and backward), with
          `inference_to_plain` and `training_to_plain`, the median over the turns of this time over the plain one's,
          and `_cpu_to_plain`, by the time that the process spent on all its threads. With the authors' code also
          `_to_authors`;
        - `parameters`; eager only, as what follows;
        - `peak_mib`, the most that a training step holds at once beyond the weights, and `peak_to_plain`;
        - `construct_s`, the median seconds to build it, and `construct_to_plain`.
    """
    dd = dict(device=device)
    authors_model = _spem_authors(spem_authors).to(**dd) if spem_authors else None
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    rows = []
    for name in tqdm(names, desc='measuring', unit='model', delay=1, leave=False):
        with torch.device('meta'):
            model = timm.create_model(name)
        plain = plain_name(name) or name
        same = dict(flavour=model.flavour) if hasattr(model, 'flavour') else {}
        build = {plain: lambda: timm.create_model(plain, **same), name: lambda: timm.create_model(name)}  # noqa: B023
        built = _measure(build, 'cpu', repeats)
        eager = {label: make().to(memory_format=memory_format, **dd) for label, make in build.items()}
        if authors_model is not None and name == 'resnet164_spem':
            eager['SPEM authors'] = authors_model
        modules = {(label, 'eager'): m for label, m in eager.items()}
        if compile:
            modules |= {(label, 'compiled'): torch.compile(eager[label]) for label in build}
        folded = {}
        if reparameterize:
            folded = {(label, 'reparameterized'): reparameterize_model(eager[label].eval()) for label in build}

        def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
            x = torch.randn(size, *eager[name].pretrained_cfg['input_size'], **dd)  # noqa: B023
            return x.to(memory_format=memory_format), torch.arange(size, **dd) % 10

        def training(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
            out = module.train()(x)
            F.cross_entropy(out[0] if isinstance(out, tuple) else out, y).backward()
            module.zero_grad()

        @torch.no_grad()
        def inference(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
            module.eval()(x)

        x, y = batch(batch_size)
        timed = {
            kind: _measure({key: lambda m=m, run=run: run(m, x, y) for key, m in measured.items()}, device, repeats)  # noqa: B023
            for kind, run, measured in (('inference', inference, modules | folded), ('training', training, modules))
        }
        peaks = {}
        for label in build:
            images = batch(memory_batch_size)
            peaks[label] = peak_bytes(lambda label=label, images=images: training(eager[label], *images), device)  # noqa: B023
        for label, mode in modules | folded:
            row: dict[str, Any] = dict(model=label, mode=mode)
            for kind, seconds in timed.items():
                if (label, mode) not in seconds:
                    continue
                row[f'{kind}_images_per_s'] = batch_size / _median(seconds[label, mode])
                row[f'{kind}_to_plain'] = _ratio(seconds[label, mode], seconds[plain, mode])
                row[f'{kind}_cpu_to_plain'] = _ratio(seconds[label, mode], seconds[plain, mode], 'cpu')
                if ('SPEM authors', 'eager') in seconds:
                    authors = seconds['SPEM authors', 'eager']
                    row[f'{kind}_to_authors'] = _ratio(seconds[label, mode], authors)
                    row[f'{kind}_cpu_to_authors'] = _ratio(seconds[label, mode], authors, 'cpu')
            if mode == 'eager' and label in build:
                row['parameters'] = sum(p.numel() for p in eager[label].parameters())
                row.update(peak_mib=peaks[label] / 2**20, peak_to_plain=peaks[label] / peaks[plain])
                row.update(construct_s=_median(built[label]), construct_to_plain=_ratio(built[label], built[plain]))
            rows.append(row)
    return dict(
        **_environment(device),
        layout='channels_last' if channels_last else 'contiguous',
        batch_size=batch_size,
        memory_batch_size=memory_batch_size,
        repeats=repeats,
        rows=rows,
    )


def bench_skip(
    model: nn.Module,
    data: ImageData,
    thresholds: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    *,
    per_sample: bool = True,
    batch_size: int = 500,
    device: torch.device | str = 'cpu',
    repeats: int = 3,
) -> list[dict[str, float]]:
    """What skipping blocks with a small k saves and costs, on a data set.

    Args:
        model: with FA gates.
        data: as `load_images` reads it.
        thresholds: of `set_skip_threshold`; the first is what `speedup` refers to. Default: 0 to 0.9.
        per_sample: see `set_skip_threshold`. Default: True.
        batch_size: Default: 500.
        device: Default: 'cpu'.
        repeats: passes over the data for a threshold, in turns. Default: 3.

    Returns:
        For each `threshold`: `top1` in %, `blocks_run` (share of all blocks of all images), and the medians
        `images_per_s` and `speedup`, the time of the first threshold over this one's within one turn.
    """
    ran = [0]
    stages = [m for m in model.modules() if hasattr(m, 'skip_threshold')]
    blocks = [b for stage in stages for b in (stage.blocks if hasattr(stage, 'blocks') else [stage.body])]
    hooks = [b.register_forward_hook(lambda m, args, out: ran.__setitem__(0, ran[0] + len(args[0]))) for b in blocks]
    rows = [dict(threshold=t) for t in thresholds]
    seconds: list[list[float]] = [[] for _ in thresholds]
    try:
        for _ in tqdm(range(repeats), desc='measuring', unit='turn', delay=1, leave=False):
            for row, times in zip(rows, seconds, strict=True):
                model.set_skip_threshold(row['threshold'], per_sample=per_sample)
                ran[0] = 0
                start = time.perf_counter()
                row['top1'] = evaluate(model, data, batch_size=batch_size, device=device)['top1']
                times.append(time.perf_counter() - start)
                row['blocks_run'] = ran[0] / (len(blocks) * len(data))
    finally:
        model.set_skip_threshold(0)
        for hook in hooks:
            hook.remove()
    for row, times in zip(rows, seconds, strict=True):
        row['images_per_s'] = len(data) / statistics.median(times)
        row['speedup'] = statistics.median(first / t for first, t in zip(seconds[0], times, strict=True))
    return rows
