"""Running timm's train.py with our models, loader and task. Whatever it does besides is timm's own."""

import argparse
import json
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors import safe_open
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg, safe_model_name
from timm.task import TrainingTask

from ..data import BatchErasing, ResidentDataset, ResidentLoader, list_classes, load_images
from ..version import __version__
from .penalty import PenaltyMixin, with_penalty
from .recovery import Guard, check_checkpoint
from .runs import read_curve
from .timm_script import find_train_script, load_train_script

_logger = logging.getLogger(__name__)

#: Options of train.py that need timm's own loader: images one by one, other sizes, or several copies of a batch.
_NEED_TIMM_LOADER = (
    *('aa', 'aug_splits', 'aug_repeats', 'epoch_repeats', 'naflex_loader', 'train_crop_mode', 'class_map', 'resplit'),
    *('train_num_samples', 'val_num_samples', 'vflip', 'grayscale_prob', 'gaussian_blur_prob', 'tta'),
    *('train_img_sizes', 'train_batch_sizes', 'train_batches_per_epoch'),
)
#: Arguments that say where something lies on one machine, not what was trained.
_PLACES = ('data', 'data_dir', 'output', 'experiment', 'resume', 'initial_checkpoint', 'device', 'workers', 'pin_mem')


def recipes() -> dict[str, Path]:
    """The recipes by name: files for train.py's --config, from an installed package or a source checkout."""
    package = Path(__file__).parent.parent
    packaged = package / 'recipes'
    folder = packaged if packaged.is_dir() else package.parent / 'train_scripts' / 'recipes'
    return {path.stem: path for path in sorted(folder.glob('*.yaml'))}


def train(
    argv: Sequence[str],
    *,
    recipe: str | None = None,
    timm_script: str | Path | None = None,
    allow_unpinned: bool = False,
    resident: bool = True,
    crop_padding: int | None = None,
    penalty_weight: float = 0.1,
) -> Path:
    """Run timm's train.py; returns its output folder.

    Args:
        argv: arguments of train.py.
        recipe: one of `recipes()`, whose values `argv` overrides. Default: none.
        timm_script: the train.py to run. Default: found by `find_train_script`.
        allow_unpinned: see `find_train_script`. Default: False.
        resident: hold the data on the training device and augment whole batches there. Default: True. Options of
            train.py that need images one by one fall back to timm's loader, with one line that says so.
        crop_padding: see `ResidentLoader`. Default: an eighth of the image's side.
        penalty_weight: eta of `PenaltyMixin`. Default: 0.1.

    The output folder gets, beside what timm writes, `run.json`: the recipe (the name of --config's file), the source
    of a warm start, the arguments that are not train.py's defaults, seed, versions, hardware and wall time.

    Raises:
        FileNotFoundError, ValueError: as `find_train_script`, `load_images` and `check_checkpoint`, or no such recipe.
        RunStopped: the loss is not finite, or the disk is full.
        KeyboardInterrupt: Ctrl-C; its message says what was saved and how to resume.
    """
    if recipe is not None:
        if recipe not in recipes():
            raise ValueError(f'no recipe {recipe!r}; choose from {", ".join(recipes())}, or give --config FILE')
        argv = ['--config', str(recipes()[recipe]), *argv]
    module = load_train_script(find_train_script(timm_script, allow_unpinned=allow_unpinned))
    if not torch.cuda.is_available():
        module.parser.set_defaults(device='cpu')  # timm's default is cuda
    defaults = vars(module.parser.parse_args([]))
    argv_before, sys.argv = sys.argv, ['train.py', *argv]
    handlers_before = logging.root.handlers[:]  # main adds its own each time
    try:
        args, args_text = module._parse_args()
        if args.resume and args.resume != 'auto':  # newer train.py's own way to find it
            check_checkpoint(args.resume)
        arguments = {k: v for k, v in vars(args).items() if v != defaults.get(k) and k not in _PLACES}
        if args.initial_checkpoint:
            arguments['initial_checkpoint'] = Path(args.initial_checkpoint).name
        args.experiment = args.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(args.model)}'
        module._parse_args = lambda: (args, args_text)
        for name, task in list(vars(module).items()):
            if isinstance(task, type) and issubclass(task, TrainingTask):
                setattr(module, name, partial(with_penalty(task), penalty_weight=penalty_weight))
        guard = Guard(args.seed, rank=int(os.environ.get('RANK', 0)))
        module.train_one_epoch = guard.around(_with_epoch_metrics(module.train_one_epoch))
        if resident and _can_be_resident(args):
            module.create_dataset = partial(create_resident_dataset, args)
            module.create_loader = partial(create_resident_loader, crop_padding=crop_padding)
        start = time.time()
        with guard.watching():
            module.main()
    finally:
        sys.argv, logging.root.handlers = argv_before, handlers_before
    output = Path(args.output or './output/train', args.experiment)
    if guard.rank == 0:
        options = dict(resident=resident, crop_padding=crop_padding, penalty_weight=penalty_weight)
        config = module.config_parser.parse_known_args(argv)[0].config
        named = dict(recipe=Path(config).stem) if config else {}
        if args.initial_checkpoint.endswith('.safetensors'):
            with safe_open(args.initial_checkpoint, 'pt') as f:  # `warm_start` says where it comes from
                named.update({k: v for k, v in (f.metadata() or {}).items() if k == 'warm_start'})
        seconds = time.time() - start
        _write_run(output, args, dict(**named, arguments=arguments, options=options), seconds)
        if not guard.interrupts:
            rows = read_curve(output)
            last = '  '.join(f'{name}: {value:.4g}' for name, value in rows[-1].items()) if rows else 'no epoch ended'
            print(f'trained {args.model} in {seconds:.0f} s -> {output}  ({last})')
    if guard.interrupts:  # train.py catches it, and ends as if it were done
        raise KeyboardInterrupt(guard.save_interrupted())
    return output


def _can_be_resident(args: argparse.Namespace) -> bool:
    need = [f'--{o.replace("_", "-")}' for o in _NEED_TIMM_LOADER if getattr(args, o, None)]
    if args.dataset not in ('', 'torch/cifar10', 'torch/cifar100'):
        need.append(f'--dataset {args.dataset}')
    if need:
        _logger.warning(f"training with timm's own loader, which {', '.join(need)} needs")
    return not need


def _decoded_size(args: argparse.Namespace) -> int | None:
    """Side to which images of another size are brought as they are decoded; None for models that are not square.

    --crop-pct leaves a margin around the model's own size: random crops in training, the centre in evaluation.
    """
    cfg = get_pretrained_cfg(args.model)
    h, w = resolve_data_config(vars(args), pretrained_cfg=cfg.to_dict() if cfg else {})['input_size'][1:]
    return None if h != w else math.floor(h / (args.crop_pct or 1))


def create_resident_dataset(
    args: argparse.Namespace,
    name: str,
    root: str | None = None,
    split: str = 'validation',
    download: bool = False,
    seed: int = 42,
    input_img_mode: str = 'RGB',
    **_,
) -> ResidentDataset:
    """In place of timm.data.create_dataset, with the arguments of train.py before its own."""
    if not root:
        raise ValueError('where are the images? --data-dir names a folder, a tar file, or the root of --dataset')
    size = _decoded_size(args)
    classes = None if name else list_classes(root, args.train_split)  # the evaluation split may hold a few of them
    data = load_images(root, split, name=name, download=download, img_mode=input_img_mode, size=size, classes=classes)
    if len(data.classes) > args.num_classes:
        n = len(data.classes)
        raise ValueError(f'{root}: {n} classes, and the model has {args.num_classes}; give --num-classes {n}')
    return ResidentDataset(data, seed)


def create_resident_loader(
    dataset: ResidentDataset,
    input_size: Sequence[int],
    batch_size: int,
    is_training: bool = False,
    no_aug: bool = False,
    re_prob: float = 0.0,
    re_mode: str = 'const',
    re_count: int = 1,
    hflip: float = 0.5,
    distributed: bool = False,
    collate_fn: Any = None,
    crop_padding: int | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    img_dtype: torch.dtype = torch.float32,
    device: torch.device | str = 'cpu',
    **_,
) -> ResidentLoader:
    """In place of timm.data.create_loader. `collate_fn`, which train.py gives only for it, is timm's mixup."""
    loader = ResidentLoader(
        dataset,
        input_size,
        batch_size,
        is_training=is_training,
        mean=mean,
        std=std,
        augment=not no_aug,
        img_dtype=img_dtype,
        device=device,
        crop_padding=crop_padding,
        hflip=hflip,
        erasing=BatchErasing(re_prob, re_mode, re_count) if re_prob else None,
        mixup=collate_fn,
        rank=torch.distributed.get_rank() if distributed else 0,
        world_size=torch.distributed.get_world_size() if distributed else 1,
    )
    if is_training:
        h, w = dataset.data.images.shape[1:3]
        _logger.info(
            f'{len(dataset)} images of {w}x{h} held on {device}: random crop with padding {loader.crop_padding},'
            f' flip {loader.hflip}; --scale, --ratio and --color-jitter do not apply'
        )
    return loader


def _with_epoch_metrics(train_one_epoch):
    def wrapped(epoch: int, *args, task: TrainingTask, **kwargs):
        metrics = train_one_epoch(epoch, *args, task=task, **kwargs)
        extra = task.epoch_metrics() if isinstance(task, PenaltyMixin) else {}
        if extra:
            _logger.info(f'Train: {epoch} ' + '  '.join(f'{name}: {value:.4f}' for name, value in extra.items()))
        metrics.update(extra)
        return metrics

    return wrapped


def _write_run(output: Path, args: argparse.Namespace, run: dict[str, Any], seconds: float) -> None:
    device = torch.cuda.get_device_name() if str(args.device).startswith('cuda') else f'{os.cpu_count()} CPU cores'
    run.update(
        seed=args.seed,
        versions=dict(
            timm_poolattn=__version__,
            timm=timm.__version__,
            torch=torch.__version__,
            torchvision=torchvision.__version__,
            python=platform.python_version(),
        ),
        hardware=f'{device} ({platform.machine()})',
        wall_time_s=round(seconds),
    )
    path = output / 'run.json'
    if args.resume and path.is_file():  # a run resumed in its own folder: how it went before is part of it
        before = json.loads(path.read_text())
        run['resumed'] = [*before.pop('resumed', []), dict(arguments=before['arguments'], options=before['options'])]
        run['wall_time_s'] += before['wall_time_s']
    temp = path.with_suffix('.tmp')
    temp.write_text(json.dumps(run, indent=2) + '\n')
    os.replace(temp, path)
