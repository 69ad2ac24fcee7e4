"""What a loader gives in a second: ours, timm's, airbench's."""

import importlib.util
import statistics
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from timm.data import create_loader
from torch.utils.benchmark import timer

from ..data import ImageData, ImageFiles, ResidentDataset, ResidentLoader, load_images
from ..papers import DATASETS
from ..utils import MissingFileError, progress
from .timer import median_ratio


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
    """Measure images/s of the resident loader, of timm's (files, workers, PrefetchLoader), and of airbench's.

    Ours and airbench's crop at random with padding 4, and flip; timm's crops at random by its own default, and flips,
    without colour jitter. Ours and airbench's are timed over whole epochs, timm's from its second batch on.

    Args:
        data_dir: a folder or a tar by class.
        split: of the data.
        batch_size: images at once.
        workers: of timm's loader.
        device: where the batches go.
        airbench: a checkout of KellerJordan/cifar10-airbench; only for 32x32 images.
        repeats: turns.
        seconds: each loader gets in a turn, and at least an epoch if it is held in memory.

    Returns:
        For each `loader`: the median `images_per_s`, and `ratio`, the median over turns of ours to it.
    """
    device = torch.device(device)
    data = load_images(data_dir, split)
    size = (data.images.shape[3], *data.images.shape[1:3])
    facts = dict(mean=DATASETS['cifar10']['mean'][: size[0]], std=DATASETS['cifar10']['std'][: size[0]])
    ours = ResidentLoader(ResidentDataset(data), size, batch_size, is_training=True, device=device, **facts)
    timms = create_loader(
        ImageFiles(data_dir, split, size[0]),
        size,
        batch_size,
        is_training=True,
        color_jitter=None,
        num_workers=workers,
        device=device,
        **facts,
    )
    loaders = {'resident': ours, f'timm, {workers} workers': timms}
    if airbench:
        loaders['airbench'] = _airbench_loader(Path(airbench), data, batch_size, device)
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for turn in progress(range(repeats + 1), desc='measuring', unit='turn'):
        for name, loader in loaders.items():
            rate = loading_rate(loader, seconds, by_epoch=loader is not timms)
            if turn:  # the first warms up
                rates[name].append(rate)
    return [
        dict(
            loader=name,
            images_per_s=statistics.median(measured),
            ratio=median_ratio(rates['resident'], measured),
        )
        for name, measured in rates.items()
    ]


def loading_rate(loader: Iterable, seconds: float, *, by_epoch: bool, clock: Callable[[], float] = timer) -> float:
    """Measure images/s: over whole epochs until `seconds` are over, or from the second batch of one on.

    Args:
        loader: of pairs of images and targets.
        seconds: to measure for.
        by_epoch: begin and end with an epoch. A loader with workers is measured from its second batch on, when these
            have started.
        clock: in s.
    """
    images, start = 0, clock()
    while True:
        for i, (input, _) in enumerate(loader):
            if i == 0 and not by_epoch:
                images, start = 0, clock()
                continue
            images += len(input)
            if not by_epoch and clock() - start > seconds:
                break
        elapsed = clock() - start
        if not by_epoch or elapsed > seconds:
            return images / elapsed


def _airbench_loader(folder: Path, data: ImageData, batch_size: int, device: torch.device) -> Iterable:
    path = folder / 'airbench' / 'utils.py'
    if not path.is_file():
        raise MissingFileError(f'{folder}: no checkout of cifar10-airbench, for it has no airbench/utils.py')
    spec = importlib.util.spec_from_file_location('airbench_utils', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with tempfile.TemporaryDirectory() as temp:
        torch.save(dict(images=data.images, labels=data.targets, classes=data.classes), Path(temp, 'train.pt'))
        # it names the device 'cuda'
        load = lambda path, load=torch.load, **_: load(path, map_location=device, weights_only=True)  # noqa: E731
        with mock.patch.object(torch, 'load', load):
            return module.CifarLoader(temp, train=True, batch_size=batch_size, aug=dict(flip=True, translate=4))
