"""What a loader and a training step cost: medians, and ratios within one run. Printed, never asserted."""

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from timm.data import create_dataset, create_loader
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ..data import ImageData, ResidentDataset, ResidentLoader, load_images
from ..papers import DATASETS
from ..training import PenaltyTask
from .networks import peak_bytes, plain_name

#: Forms of a training step, in the order in which `bench_train` prints them.
MODES = ('eager', 'channels_last', 'autocast', 'compiled')


def _synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def bench_loader(
    data_dir: str | Path,
    *,
    split: str = 'train',
    batch_size: int = 128,
    workers: int = 2,
    device: torch.device | str = 'cpu',
    airbench: str | Path | None = None,
    repeats: int = 3,
    seconds: float = 3.0,
) -> list[dict[str, Any]]:
    """Images/s of the resident loader, of timm's (files, workers, PrefetchLoader), and of airbench's.

    Ours and airbench's crop at random with padding 4, and flip; timm's crops at random by its own default, and flips,
    without colour jitter. Ours and airbench's are timed over whole epochs, timm's from its second batch on.

    Args:
        data_dir: a folder or a tar by class.
        split: Default: 'train'.
        batch_size: Default: 128.
        workers: of timm's loader. Default: 2.
        device: Default: 'cpu'.
        airbench: a checkout of KellerJordan/cifar10-airbench; only for 32x32 images. Default: without it.
        repeats: turns. Default: 3.
        seconds: each loader gets in a turn, and at least an epoch if it is held in memory. Default: 3.

    Returns:
        For each `loader`: the median `images_per_s`, and `ratio`, the median over turns of ours to it.
    """
    device = torch.device(device)
    data = load_images(data_dir, split)
    size = (data.images.shape[3], *data.images.shape[1:3])
    facts = dict(mean=DATASETS['cifar10']['mean'][: size[0]], std=DATASETS['cifar10']['std'][: size[0]])
    ours = ResidentLoader(ResidentDataset(data), size, batch_size, is_training=True, device=device, **facts)
    # timm's own names of splits are the folders'
    files = create_dataset('', root=str(data_dir), split=split, is_training=True)
    timms = create_loader(
        files, size, batch_size, is_training=True, color_jitter=None, num_workers=workers, device=device, **facts
    )
    loaders = {'resident': ours, f'timm, {workers} workers': timms}
    if airbench:
        loaders['airbench'] = _airbench_loader(Path(airbench), data, batch_size, device)
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for turn in tqdm(range(repeats + 1), desc='measuring', unit='turn', delay=1, leave=False):
        for name, loader in loaders.items():
            rate = _rate(loader, seconds, device, by_epoch=loader is not timms)
            if turn:  # the first warms up
                rates[name].append(rate)
    return [
        dict(
            loader=name,
            images_per_s=statistics.median(measured),
            ratio=statistics.median(mine / other for mine, other in zip(rates['resident'], measured, strict=True)),
        )
        for name, measured in rates.items()
    ]


def _rate(loader: Iterable, seconds: float, device: torch.device, by_epoch: bool) -> float:
    """Images/s, over epochs until `seconds` are over, or from the second batch of one on."""
    images, start = 0, time.perf_counter()
    while True:
        for i, (input, _) in enumerate(loader):
            _synchronize(device)
            if i == 0 and not by_epoch:  # workers have started
                images, start = 0, time.perf_counter()
                continue
            images += len(input)
            if not by_epoch and time.perf_counter() - start > seconds:
                break
        _synchronize(device)
        elapsed = time.perf_counter() - start
        if not by_epoch or elapsed > seconds:
            return images / elapsed


def _airbench_loader(folder: Path, data: ImageData, batch_size: int, device: torch.device) -> Iterable:
    path = folder / 'airbench' / 'utils.py'
    if not path.is_file():
        raise FileNotFoundError(f'{folder}: no checkout of cifar10-airbench, for it has no airbench/utils.py')
    spec = importlib.util.spec_from_file_location('airbench_utils', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with tempfile.TemporaryDirectory() as temp:
        torch.save(dict(images=data.images, labels=data.targets, classes=data.classes), Path(temp, 'train.pt'))
        # it names the device 'cuda'
        load = lambda path, load=torch.load, **_: load(path, map_location=device, weights_only=True)  # noqa: E731
        with mock.patch.object(torch, 'load', load):
            return module.CifarLoader(temp, train=True, batch_size=batch_size, aug=dict(flip=True, translate=4))


def bench_train(
    models: Sequence[str],
    *,
    modes: Sequence[str] = MODES,
    batch_size: int = 128,
    device: torch.device | str = 'cpu',
    dtype: torch.dtype = torch.bfloat16,
    compile_mode: str | None = None,
    steps: int = 20,
    repeats: int = 3,
) -> list[dict[str, Any]]:
    """Images/s and peak memory of training steps: as train.py takes them, `.item()` of the loss included.

    Args:
        models: names; each is measured and, right after it, the same backbone without the gate.
        modes: of `MODES`; each adds to the one before it, except that 'compiled' on a CPU leaves out autocast, which
            is slow there without bfloat16 instructions. Default: all.
        batch_size: Default: 128.
        device: Default: 'cpu'.
        dtype: of autocast. Default: bfloat16.
        compile_mode: torch.compile's; 'reduce-overhead' for CUDA graphs. Default: torch's.
        steps: in a turn. Default: 20.
        repeats: turns; every mode of a model has one before the next begins. Default: 3.

    Returns:
        For each `model`, `backbone_of` (the name that was asked for) and `mode`: the median `images_per_s`; `peak_mb`,
        the most memory that a step takes beyond parameters, gradients and optimizer; and the floor: `gflop` of
        convolutions and linear layers of a step, `gbytes` that it moves at least (what backward reads of forward,
        written and read once; parameters, gradients and momentum), and `floor_images_per_s`, at this device's own speed
        in a large matrix product and a large copy.
    """
    device = torch.device(device)
    rows = []
    for name in models:
        gated = timm.create_model(name)
        for variant in (name, *([plain] if (plain := plain_name(name)) else [])):
            # the backbone of a gated model, whose paper's form depends on its gate
            form = dict(flavour=gated.flavour) if variant != name and hasattr(gated, 'flavour') else {}
            taken: list[tuple[dict[str, Any], Callable[[], None]]] = []
            for mode in modes:
                model = timm.create_model(variant, **form).to(device)
                step = _step(model, mode, batch_size, device, dtype, compile_mode)
                row = dict(model=variant, backbone_of=name, mode=mode, peak_mb=peak_bytes(step, device) / 1e6)
                taken.append((row, step))
                rows.append(row)
            floor = _floor(timm.create_model(variant, **form).to(device), batch_size, device, dtype)
            rates: list[list[float]] = [[] for _ in taken]
            for _ in tqdm(range(repeats), desc=f'measuring {variant}', unit='turn', delay=1, leave=False):
                for (_, step), measured in zip(taken, rates, strict=True):
                    start = time.perf_counter()
                    for _ in range(steps):
                        step()
                    _synchronize(device)
                    measured.append(batch_size * steps / (time.perf_counter() - start))
            for (row, _), measured in zip(taken, rates, strict=True):
                row.update(images_per_s=statistics.median(measured), **floor)
    return rows


def _step(
    model: nn.Module, mode: str, batch_size: int, device: torch.device, dtype: torch.dtype, compile_mode: str | None
) -> Callable[[], None]:
    """A warm training step of `model`."""
    if mode not in MODES:
        raise ValueError(f'unknown mode {mode!r}; choose from {", ".join(MODES)}')
    level = MODES.index(mode)
    layout = torch.channels_last if level >= 1 else torch.contiguous_format
    task = PenaltyTask(model.to(memory_format=layout), nn.CrossEntropyLoss(), device=device, verbose=False).train()
    cast = level >= 2 and not (mode == 'compiled' and device.type == 'cpu')
    autocast = partial(torch.autocast, device.type, dtype=dtype) if cast else nullcontext
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    if mode == 'compiled':
        task.compile(mode=compile_mode)
    input = torch.randn(batch_size, *model.pretrained_cfg['input_size'], device=device).to(memory_format=layout)
    target = torch.randint(model.num_classes, (batch_size,), device=device)

    def step() -> None:
        with autocast():
            loss = task(input, target)['loss']
        loss.backward()
        optimizer.step()
        loss.item()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    return step


def _floor(model: nn.Module, batch_size: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    on_cuda = device.type == 'cuda'
    autocast = torch.autocast('cuda', dtype=dtype) if on_cuda else nullcontext()  # what the fastest mode there runs in
    input = torch.randn(batch_size, *model.pretrained_cfg['input_size'], device=device)
    saved: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        with autocast:
            output = model.train()(input)
        output.sum().backward()
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    flop, moved = counter.get_total_flops(), 2 * sum(saved.values()) + 6 * parameters
    side, count = (8192, 2**28) if on_cuda else (1024, 2**24)
    a = torch.randn(side, side, device=device, dtype=dtype if on_cuda else torch.float32)
    b = torch.empty(count, device=device)
    flop_per_s = 2 * side**3 / _median_time(lambda: a @ a, device)
    bytes_per_s = 2 * b.nbytes / _median_time(lambda: b.clone(), device)
    seconds = max(flop / flop_per_s, moved / bytes_per_s)
    return dict(gflop=flop / 1e9, gbytes=moved / 1e9, floor_images_per_s=batch_size / seconds)


def _median_time(run: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
