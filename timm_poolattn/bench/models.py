"""Whole networks, beside the same backbone without its gates."""

import importlib.util
import statistics
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import reparameterize_model
from torch import nn
from torch.nn import functional as F

from ..layers import use_fused_pool
from ..utils import MissingFileError, UserError, look_up, progress
from .backbones import plain_args
from .machine import LAYOUTS, describe_machine
from .memory import peak_bytes
from .timer import median_ratio, time_in_turns

#: Of autocast; float32 runs without it.
DTYPES = ('float32', 'bfloat16')
_AUTHORS = 'SPEM authors'


def _spem_authors(folder: Path) -> nn.Module:
    """Build ResNet-164 with SPEM as its authors publish it, from a checkout of Qrange-group/SPEM."""
    file = folder / 'models' / 'spem.py'
    if not file.is_file():
        raise MissingFileError(f'{file}: not there; --spem-authors takes a checkout of github.com/Qrange-group/SPEM')
    spec = importlib.util.spec_from_file_location('spem_authors', file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SPEM(164, num_classes=10, block_name='bottleneck')


def bench_models(
    names: Sequence[str] = ('resnet164_spem', 'resnet56_saam', 'resnet56_fa'),
    *,
    layouts: Sequence[str] = ('contiguous', 'channels_last'),
    dtypes: Sequence[str] = ('float32',),
    compile: bool = False,
    reparameterize: bool = False,
    batch_size: int = 64,
    device: torch.device | str = 'cpu',
    repeats: int = 5,
    spem_authors: Path | None = None,
) -> dict[str, Any]:
    """Measure inference and training of networks, relative to their backbones in the same run.

    Args:
        names: of our models with gates.
        layouts: keys of `LAYOUTS`.
        dtypes: of `DTYPES`.
        compile: measure them compiled, too: minutes for a deep model.
        reparameterize: measure inference with `timm.utils.reparameterize_model`, too.
        batch_size: images at once.
        device: where the models run.
        repeats: turns; as many come before, which do not count.
        spem_authors: a checkout of github.com/Qrange-group/SPEM. Its ResNet-164 runs, eager and contiguous as it is
            published, beside resnet164_spem.

    Returns:
        What was measured where, and `rows`, for each `model`, `layout`, `dtype` and `mode` (eager, compiled or, with no
        figures of training, reparameterized), the plain backbone first:

        - medians `inference_images_per_s` and `training_images_per_s` (forward, cross entropy and backward), with
          `inference_to_plain` and `training_to_plain`, the median over the turns of this time over the plain one's in
          the same mode. With the authors' code also `_to_authors`;
        - `peak_mib`, the most that a training step holds at once beyond the weights, and `peak_to_plain`;
        - of eager ones `parameters`, and `construct_s`, the median seconds to build it, with `construct_to_plain`.

    Raises:
        UserError: an unknown model, layout or dtype, or no checkout of the authors'.
    """
    names = [look_up('model', name, timm.list_models(include_tags='.' in name)) for name in names]
    layouts = [look_up('layout', layout, LAYOUTS) for layout in layouts]
    dtypes = [look_up('dtype', dtype, DTYPES) for dtype in dtypes]
    authors = _spem_authors(spem_authors).to(device) if spem_authors else None
    if spem_authors and 'resnet164_spem' not in names:
        raise UserError(f'--spem-authors: runs beside --model resnet164_spem, and not beside {", ".join(names)}')
    rows = []
    bar = progress(total=len(names) * len(layouts) * len(dtypes), desc='measuring')
    for name in names:
        plain = plain_args(name)
        build = {
            plain['model_name']: lambda plain=plain: timm.create_model(**plain),
            name: lambda name=name: timm.create_model(name),
        }
        built = time_in_turns(build, repeats)
        for layout, dtype in product(layouts, dtypes):
            measured = _measure(
                {label: make().to(device, memory_format=LAYOUTS[layout]) for label, make in build.items()},
                authors if name == 'resnet164_spem' else None,
                layout=layout,
                dtype=dtype,
                compile=compile,
                reparameterize=reparameterize,
                batch_size=batch_size,
                device=torch.device(device),
                repeats=repeats,
            )
            for row in measured:
                if row['mode'] == 'eager' and (seconds := built.get(row['model'])):
                    ratio = median_ratio(seconds, built[plain['model_name']])
                    row.update(construct_s=statistics.median(seconds), construct_to_plain=ratio)
            rows += measured
            bar.update()
    bar.close()
    facts = dict(batch_size=batch_size, repeats=repeats, fused_pool=use_fused_pool())
    return dict(**describe_machine(device), **facts, rows=rows)


def _measure(
    eager: dict[str, nn.Module],
    authors: nn.Module | None,
    *,
    layout: str,
    dtype: str,
    compile: bool,
    reparameterize: bool,
    batch_size: int,
    device: torch.device,
    repeats: int,
) -> list[dict[str, Any]]:
    """Measure the rows of `bench_models` for one layout and dtype; the first of `eager` is the plain backbone."""
    plain, *_ = eager
    torch.compiler.reset()  # or the limit of recompilations ends the compiled ones
    modules = {(label, 'eager'): module for label, module in eager.items()}
    if authors is not None:
        modules[_AUTHORS, 'eager'] = authors
    if compile:
        modules |= {(label, 'compiled'): torch.compile(module) for label, module in eager.items()}
    folded = {}
    if reparameterize:
        folded = {(label, 'reparameterized'): reparameterize_model(module.eval()) for label, module in eager.items()}
    size = eager[plain].pretrained_cfg['input_size']
    x = torch.randn(batch_size, *size, device=device)
    y = torch.arange(batch_size, device=device) % eager[plain].num_classes
    cast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == 'bfloat16')

    def output(module: nn.Module) -> torch.Tensor:
        with cast:
            out = module(x if module is authors else x.to(memory_format=LAYOUTS[layout]))
        return out[0] if isinstance(out, tuple) else out

    def training(module: nn.Module) -> None:
        F.cross_entropy(output(module.train()), y).backward()
        module.zero_grad()

    @torch.no_grad()
    def inference(module: nn.Module) -> None:
        output(module.eval())

    def timed(run: Callable[[nn.Module], None], of: dict[Any, nn.Module]) -> dict[Any, list[float]]:
        return time_in_turns({key: lambda module=module: run(module) for key, module in of.items()}, repeats, repeats)

    # training first: until a process has held that much memory, the first passes fetch new pages for every map
    seconds = dict(training=timed(training, modules), inference=timed(inference, modules | folded))
    peaks = {key: peak_bytes(lambda module=module: training(module), device) for key, module in modules.items()}
    rows = []
    for label, mode in modules | folded:
        row: dict[str, Any] = dict(model=label, layout=layout, dtype=dtype, mode=mode)
        if label == _AUTHORS:
            row['layout'] = 'contiguous'
        for kind, of in seconds.items():
            if (label, mode) in of:
                row[f'{kind}_images_per_s'] = batch_size / statistics.median(of[label, mode])
                row[f'{kind}_to_plain'] = median_ratio(of[label, mode], of[plain, mode])
                if authors is not None:
                    row[f'{kind}_to_authors'] = median_ratio(of[label, mode], of[_AUTHORS, 'eager'])
        if (label, mode) in peaks:
            row.update(peak_mib=peaks[label, mode] / 2**20, peak_to_plain=peaks[label, mode] / peaks[plain, mode])
        if mode == 'eager' and label in eager:
            row['parameters'] = sum(p.numel() for p in eager[label].parameters())
        rows.append(row)
    return rows
