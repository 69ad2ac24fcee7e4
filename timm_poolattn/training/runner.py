"""Running timm's train.py with our models, loader and task. Whatever it does besides is timm's own."""

import argparse
import logging
import math
import os
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from timm.data import resolve_data_config
from timm.data.readers.class_map import load_class_map
from timm.models import load_checkpoint, safe_model_name
from timm.optim import SGDP, SGDW
from timm.task import TrainingTask
from timm.utils import world_info_from_env
from torch import nn
from torch.optim import Optimizer

from ..data import BatchErasing, ImageFiles, ResidentDataset, ResidentLoader, View, list_classes, load_images
from ..data.listing import EVAL_SPLITS, TRAIN_SPLITS
from ..models import check_model_name
from ..utils import UserError, look_up
from .arguments import CROP_AND_COLOUR, check_arguments, parse_arguments, read_pretrained_cfg
from .penalty import PenaltyMixin, with_penalty
from .records import Record, new_folder, own_folder
from .recovery import Guard, check_checkpoint, check_optimizer, check_rate, newest_checkpoint
from .runs import read_curve
from .teachers import soft_targets, weight_hashes
from .timm_script import find_train_script, load_train_script
from .warm_starts import without_place

_logger = logging.getLogger(__name__)

#: Options of train.py that need timm's own loader: images one by one, other sizes, or several copies of a batch.
_NEED_TIMM_LOADER = (
    *('aa', 'aug_splits', 'aug_repeats', 'naflex_loader', 'train_crop_mode', 'class_map', 'resplit'),
    *('vflip', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob'),
    *('train_img_sizes', 'train_batch_sizes', 'train_batches_per_epoch'),
)
#: Data sets of torchvision of which timm takes the test images for any split that it does not know.
_TORCHVISION = tuple(f'torch/{name}' for name in ('cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist'))
#: Arguments that say where something lies on one machine, not what was trained.
_PLACES = ('data', 'data_dir', 'output', 'experiment', 'resume', 'initial_checkpoint', 'device', 'workers', 'pin_mem')


def train(
    argv: Sequence[str],
    *,
    recipe: str | None = None,
    timm_script: str | Path | None = None,
    allow_unpinned: bool = False,
    resident: bool = True,
    crop_padding: int | None = None,
    penalty_weight: float = 0.1,
    teachers: Sequence[str] = (),
) -> Path:
    """Run timm's train.py; returns its output folder.

    Args:
        argv: arguments of train.py.
        recipe: one of `recipes()`, whose values `argv` overrides.
        timm_script: the train.py to run. Default: found by `find_train_script`.
        allow_unpinned: see `find_train_script`.
        resident: hold the data on the training device and augment whole batches there. Options of train.py that
            need images one by one fall back to timm's loader, with one line that says so.
        crop_padding: see `ResidentLoader`. Default: an eighth of the image's side.
        penalty_weight: eta of `PenaltyMixin`.
        teachers: trained models whose `soft_targets` take the place of the classes and of label smoothing.

    The output folder belongs to one run. It gets, beside what timm writes, `run.json`: the recipe (the name of
    --config's file), the source of a warm start, the arguments that are not train.py's defaults, the teachers' hashes,
    the classes, seed, versions, hardware and wall time.

    `--resume auto` goes on from the latest whole checkpoint in the folder of --experiment, if there is one. Several
    machines must see the same folder.

    Raises:
        UserError: arguments that cannot be right, found before anything long is begun: a misspelt name, a missing or
            foreign file, data that do not fit the model, a folder that holds another run.
        RunStopped: the loss is not finite, or the disk is full.
        KeyboardInterrupt: Ctrl-C; its message says what was saved and how to resume.
    """
    module = load_train_script(find_train_script(timm_script, allow_unpinned=allow_unpinned))
    if teachers:
        argv = [*argv, '--smoothing', '0']  # of which the soft targets take the place
    parsed = parse_arguments(module, argv, recipe)
    args = parsed.args
    check_arguments(args)
    _view(args, training=True)  # raises where no image can be brought to it
    if not 0 <= penalty_weight < math.inf:
        raise UserError(f'--penalty-weight is {penalty_weight}, and must be at least 0')
    _, rank, _ = world_info_from_env()
    output, folder, is_new = Path(args.output or './output/train'), None, True
    if args.experiment:
        folder = output / args.experiment
        is_new = not os.path.isdir(folder)  # also of a name that is too long
        if args.resume == 'auto':
            args.resume = str(newest_checkpoint(folder) or '')
    elif args.resume == 'auto':
        raise UserError('--resume auto: give --experiment too, the name of the folder to go on in')
    resumable = args.sched != 'plateau'
    if args.resume:
        if not resumable:
            raise UserError(
                '--sched plateau: no checkpoint holds where it is, so a resumed run would have other learning rates;'
                ' train from the start, or with another --sched'
            )
        check_checkpoint(args.resume)
        if not args.no_resume_opt:
            check_rate(args.resume, args.opt, args.lr)
    resident = resident and _can_be_resident(args, parsed.given)
    if crop_padding is not None and not resident:
        raise UserError("--crop-padding is the resident loader's; leave it out, or what wants timm's own loader")
    if teachers:
        _check_teachers(args, teachers, resident)
    elif args.bce_loss and (args.jsd_loss or not (args.smoothing or args.mixup or args.cutmix or args.cutmix_minmax)):
        raise UserError(
            '--bce-loss: train.py has it for smoothed or mixed classes alone, without --jsd-loss; give --smoothing 0.1'
        )
    classes = [] if args.class_map or (args.dataset and not resident) else _check_data(args)
    if folder is None and rank == 0:
        folder = new_folder(output, safe_model_name(args.model))
        args.experiment = folder.name
    facts = {k: v for k, v in dict(recipe=parsed.recipe, warm_start=_warm_start(args)).items() if v}
    facts['arguments'] = {k: v for k, v in parsed.given.items() if k not in _PLACES}
    if args.initial_checkpoint:
        facts['arguments']['initial_checkpoint'] = Path(args.initial_checkpoint).name
    facts['options'] = dict(resident=resident, crop_padding=crop_padding, penalty_weight=penalty_weight)
    if teachers:
        facts['options']['teacher'] = [without_place(name) for name in teachers]
        facts['teacher_weights'] = weight_hashes(teachers) if rank == 0 else []  # whose facts are written
    if args.device == 'cpu' and rank == 0:
        print(_say_bfloat16(args.amp and args.amp_dtype == 'bfloat16'))
    handlers_before = logging.root.handlers[:]  # main adds its own each time
    with own_folder(folder, args.resume, is_new, resumable) if rank == 0 else nullcontext():
        record = Record(folder, args.resume, args.device, seed=args.seed, **facts) if rank == 0 else None
        guard = Guard(args.seed, rank, args.resume, resumable, on_save=record.write if record else lambda: None)
        seen: list[str] = []  # the classes
        note = partial(_note_classes, args, args.num_classes, record, seen)
        count = record.facts.update if record else lambda **_: None
        module._parse_args = lambda: (args, parsed.text)
        module.create_model = partial(_create_model, args, module.create_model, note, classes)
        tasks = []
        for name, task in list(vars(module).items()):
            if isinstance(task, type) and issubclass(task, TrainingTask):
                setattr(module, name, partial(_create_task, args, seen, tasks, with_penalty(task), penalty_weight))
        module.create_optimizer_v2 = partial(_create_optimizer, args, tasks, module.create_optimizer_v2)
        module.train_one_epoch = guard.around(_with_epoch_metrics(module.train_one_epoch))
        if resident:
            module.create_dataset = partial(create_resident_dataset, args, note, count, teachers)
            module.create_loader = partial(create_resident_loader, crop_padding=crop_padding)
        else:
            module.create_dataset = partial(_create_dataset, args, module.create_dataset, note, count)
        try:
            with guard.watching():
                module.main()
                if guard.interrupts:  # train.py catches it, and ends as if it were done
                    raise KeyboardInterrupt(guard.save_interrupted())
        except UserError as e:
            if '\n' not in str(e):
                raise
            # of a loader's worker, with its traceback before it
            raise UserError(str(e).strip().splitlines()[-1].partition(': ')[2]) from e
        except Exception as e:  # of timm's and torch's own kinds
            short = isinstance(e, RuntimeError) and 'allocate memory' in str(e)  # torch's on a CPU
            if short or isinstance(e, torch.OutOfMemoryError | MemoryError):
                images = ', or --no-resident, which reads images one by one' if resident and not guard.started else ''
                said = f'--batch-size {args.batch_size}: {args.device} has not the memory; give less{images}'
                raise UserError(said) from e
            if guard.interrupts:  # which may end a loader's workers first
                raise KeyboardInterrupt(guard.save_interrupted()) from e
            if guard.started:
                raise
            what = str(e) or traceback.extract_tb(e.__traceback__)[-1].line or ''  # of a bare assert, its line
            said = f'{type(e).__name__}: {" ".join(what.split())[:300]}'.removesuffix(': ')
            blame = '' if isinstance(e, OSError) else ' takes no such arguments: it'
            raise UserError(f'train.py{blame} ended before its first batch with {said}') from e
        finally:
            logging.root.handlers = handlers_before
        if record:
            record.end(trained=bool(guard.saver))
            rows = read_curve(folder)
            last = '  '.join(f'{name}: {value:.4g}' for name, value in rows[-1].items()) if rows else 'no epoch ended'
            print(f'trained {args.model} in {record.seconds:.0f} s -> {folder}  ({last})')
    return folder or output / (args.experiment or '')


def _say_bfloat16(is_used: bool) -> str:
    """Return one line: has this CPU instructions for bfloat16, and what follows for the arguments."""
    flags = '--amp --amp-dtype bfloat16'
    if not hasattr(torch.cpu, 'get_capabilities'):
        return f'cpu: this torch cannot say if it has bfloat16 instructions; if it has, {flags} is faster'
    if any(value for name, value in torch.cpu.get_capabilities().items() if name.endswith('bf16')):
        return f'cpu: it has bfloat16 instructions{"" if is_used else f"; {flags} --torchcompile is faster"}'
    return f'cpu: it has no bfloat16 instructions{f"; without {flags} it is faster" if is_used else ""}'


def _warm_start(args: argparse.Namespace) -> str | None:
    """Return how the file of --initial-checkpoint was made, where `warm_start` made it."""
    if not args.initial_checkpoint.endswith('.safetensors'):
        return None
    try:
        with safe_open(args.initial_checkpoint, 'pt') as f:
            return (f.metadata() or {}).get('warm_start')
    except SafetensorError as e:
        raise UserError(f'--initial-checkpoint {args.initial_checkpoint}: no safetensors file ({e})') from e


def _check_data(args: argparse.Namespace) -> list[str]:
    """Return the classes to train on; nothing is decoded. Empty for torchvision's data, which are small and read later.

    Raises:
        UserError: no data, or not the splits or classes that the run wants.
    """
    root = args.data_dir or args.data
    if not root:
        raise UserError('where are the images? --data-dir names a folder, a tar file, or the root of --dataset')
    if args.dataset:
        return []
    classes = list_classes(root, args.train_split)
    if args.val_split:
        tested = list_classes(root, args.val_split)
        _check_known(tested, classes, root)
        if untested := [name for name in classes if name not in tested]:
            _logger.warning(f'{root}: {args.val_split} has no images of {", ".join(untested[:5])}: none are tested')
    return classes


def _check_known(classes: list[str], trained: list[str], root: str) -> None:
    if unknown := [name for name in classes if name not in trained]:
        raise UserError(
            f'{root}: validation has classes that are not trained on: {", ".join(unknown[:5])}; take them out, or add'
            f' them to the training split'
        )


def _note_classes(
    args: argparse.Namespace,
    given: int | None,
    record: Record | None,
    seen: list[str],
    classes: list[str],
    num_classes: int,
) -> None:
    """Record the classes of the training data, and put them into `seen`.

    Raises:
        UserError: they are more than the model's, or fewer though `given`, the user's --num-classes, does not say so.
    """
    n = len(classes)
    if n > num_classes or (n < num_classes and given is None):
        raise UserError(
            f'{args.data_dir or args.data}: {n} classes, and the model has {num_classes}; give --num-classes {n}'
        )
    seen[:] = classes
    if record:
        if (before := record.facts.get('classes', classes)) != classes:
            said = f'{n} ({classes[0]}, ...), not the {len(before)} ({before[0]}, ...)'
            raise UserError(
                f'{args.data_dir or args.data}: its classes are {said} that the run to resume is trained on; give its'
                f' data, or leave out --resume and name another --experiment'
            )
        record.facts['classes'] = classes


def _create_model(
    args: argparse.Namespace,
    create_model: Callable[..., nn.Module],
    note: Callable[[list[str], int], None],
    classes: list[str],
    name: str,
    **kwargs: Any,
) -> nn.Module:
    """Stand in for timm's create_model in train.py: what does not fit is named before the data are read."""
    start = kwargs.pop('checkpoint_path', '')
    doing = f'--model {name} with these arguments'
    try:
        model = create_model(name, **kwargs)
        if start:
            doing = f'--initial-checkpoint {start} for --model {name}'
            load_checkpoint(model, start)
            doing = f'--model {name} with these arguments'
        if not getattr(args, 'naflex_loader', False):  # whose models take no images
            config = resolve_data_config(vars(args), model=model)
            _check_output(model, config['input_size'])
            if not read_pretrained_cfg(name):  # an entrypoint of the user's own, of which only the model knows them
                for key in ('input_size', 'interpolation', 'crop_mode', 'mean', 'std'):
                    setattr(args, key, config[key])
    except UserError:
        raise
    except Exception as e:  # of timm's, of the model's and of the Hub's own kinds
        raise UserError(f'{doing} cannot be: {type(e).__name__}: {" ".join(str(e).split())[:300]}') from e
    if classes:
        note(classes, model.num_classes)
    if args.resume:
        check_checkpoint(args.resume, model)
    return model


@torch.inference_mode()
def _check_output(model: nn.Module, input_size: Sequence[int]) -> None:
    """Refuse a model that has no number for each class of an image, as one without pooling has not."""
    shape = tuple(model.eval()(torch.zeros(1, *input_size)).shape)
    model.train()
    if shape != (1, model.num_classes):
        raise UserError(f'--model: an image gives {shape} numbers, not {model.num_classes}; --gp avg pools them')


def _create_task(
    args: argparse.Namespace,
    classes: list[str],
    tasks: list[TrainingTask],
    kind: type[TrainingTask],
    penalty_weight: float,
    **kwargs,
) -> TrainingTask:
    """Stand in for one of timm's tasks. That of --kd-model-name knows the classes, and sees its own colours."""
    if args.kd_model_name and args.kd_distill_type != 'feature':
        cfg, student = read_pretrained_cfg(args.kd_model_name), kwargs['student_model']
        if cfg.get('num_classes', student.num_classes) != student.num_classes:
            said = f'{cfg["num_classes"]} classes, and the model has {student.num_classes}'
            raise UserError(f'--kd-model-name {args.kd_model_name}: of {said}: its head would be a random one')
        labels = cfg.get('label_names') or classes  # a list, or a dict by number
        if classes and [*(labels.values() if isinstance(labels, dict) else labels)] != classes:
            raise UserError(f'--kd-model-name {args.kd_model_name}: its classes are not those of the data, in order')
    task = kind(penalty_weight=penalty_weight, **kwargs)
    if args.kd_model_name:  # timm's task takes the colours of the model's cfg, the loader those of --mean and --std
        config = resolve_data_config(vars(args), model=kwargs['student_model'])
        for name in ('mean', 'std'):
            getattr(task, f'student_{name}').copy_(torch.tensor(config[name]).view(1, -1, 1, 1))
    tasks.append(task)
    return task


def _create_optimizer(
    args: argparse.Namespace, tasks: list[TrainingTask], create: Callable[..., Optimizer], *of, **kwargs
) -> Optimizer:
    """Call timm's create_optimizer_v2. If steps do not follow the gradient's size, the task has the penalty."""
    optimizer = create(*of, **kwargs)
    inner = getattr(optimizer, '_base_optimizer', optimizer)  # private: Lookahead runs no hooks, what it wraps does
    if not isinstance(inner, torch.optim.SGD | SGDW | SGDP):
        tasks[-1].decouple(inner)
    if args.resume and not args.no_resume_opt:
        check_optimizer(args.resume, optimizer)
    return optimizer


def _create_dataset(
    args: argparse.Namespace,
    create_dataset: Callable[..., Any],
    note: Callable[[list[str], int], None],
    count: Callable[..., None],
    name: str,
    root: str | None = None,
    split: str = 'validation',
    class_map: str = '',
    is_training: bool = False,
    **kwargs: Any,
) -> Any:
    """Call timm's create_dataset, and note the classes where its reader has them.

    Of a folder or a tar it takes other images for a split, all where there is no folder of the split's very name. So
    these are listed here, as the resident loader does.
    """
    try:
        if name:
            if name.lower() in _TORCHVISION:
                look_up('split', split, (*TRAIN_SPLITS, *EVAL_SPLITS), f'of {name}')
            given = dict(split=split, class_map=class_map, is_training=is_training)
            dataset = create_dataset(name, root=root, **given, **kwargs)
            index = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)  # torchvision's have no reader
            if index and sorted(index.values()) != list(range(len(index))):  # synonyms, as of ImageNet's classes
                index = None
        else:
            classes = list_classes(root, args.train_split)
            index = load_class_map(class_map, root) if class_map else {c: i for i, c in enumerate(classes)}
            if sorted(index.values()) != list(range(len(index))):
                raise UserError(f'--class-map {class_map}: its numbers must be 0 to {len(index) - 1}, each once')
            if not index.keys() & set(classes):
                raise UserError(f'--class-map {class_map}: names none of the folders {", ".join(classes[:3])}, ...')
            if is_training and class_map:
                _say_left_out(class_map, [*index], classes)
            dataset = ImageFiles(root, split, _view(args, is_training).input_size[0], index)
    except UserError:
        raise
    except (
        OSError,
        RuntimeError,
        AssertionError,
        ValueError,
        EOFError,
        UnpicklingError,
    ) as e:  # the last of a class map
        raise UserError(f'--data-dir {root}: {" ".join(str(e).split())[:300]}') from e
    if is_training and not getattr(args, 'naflex_loader', False) and hasattr(dataset, '__len__'):
        _, _, processes = world_info_from_env()
        n = math.ceil(len(dataset) / processes)  # the sampler repeats a few
        if processes > 1 and getattr(args, 'aug_repeats', 0):
            n = len(dataset) // 256 * 256 // processes  # timm's RepeatAugSampler
        if n < args.batch_size:
            each = f' for each of {processes} processes' if processes > 1 else ''
            remedy = f'give at most {n}' if n else 'add images'
            raise UserError(f'--batch-size {args.batch_size}: {n} images to train on{each} are not one batch; {remedy}')
    if not is_training and hasattr(dataset, '__len__'):
        count(test_images=len(dataset))
    if index and is_training:
        note(sorted(index, key=index.get), args.num_classes)
    return dataset


def _say_left_out(class_map: str, named: list[str], folders: list[str]) -> None:
    """Warn of names that only one of the two has: a class left out on purpose looks the same as one misspelt.

    Raises:
        UserError: an empty name, of an empty line.
    """
    if '' in named:
        raise UserError(f'--class-map {class_map}: line {named.index("") + 1} is empty; take it out')
    for names, said in (
        ([name for name in folders if name not in named], 'does not name, so that their images are left out'),
        ([name for name in named if name not in folders], 'names, and no images are of them'),
    ):
        if names:
            _logger.warning(f'--class-map {class_map}: {", ".join(names[:5])}: it {said}')


def _can_be_resident(args: argparse.Namespace, given: dict[str, Any]) -> bool:
    options = [o for o in _NEED_TIMM_LOADER if getattr(args, o, None)]
    if not args.no_aug:
        options += [o for o in CROP_AND_COLOUR if given.get(o)]  # --color-jitter 0 needs no loader
    need = [f'--{o.replace("_", "-")}' for o in options]
    if args.mixup_mode == 'half' and (args.mixup or args.cutmix or args.cutmix_minmax):
        need.append('--mixup-mode half')
    if args.dataset not in ('', 'torch/cifar10', 'torch/cifar100'):
        need.append(f'--dataset {args.dataset}')
    if need:
        _logger.warning(f"training with timm's own loader, which {', '.join(need)} needs")
    return not need


def _check_teachers(args: argparse.Namespace, teachers: Sequence[str], resident: bool) -> None:
    for name in teachers:
        check_model_name(name)
    if not resident:
        raise UserError("--teacher: its targets need the resident loader; leave out what wants timm's own")
    if args.mixup or args.cutmix or args.cutmix_minmax:
        raise UserError('--teacher: mixup and cutmix mix classes, not its targets; leave out one or the other')
    if args.bce_loss:  # which train.py has for smoothed or mixed classes alone
        raise UserError('--teacher: its targets are of cross-entropy; leave out --bce-loss')


def _view(args: argparse.Namespace, training: bool) -> View:
    """Return how images are brought to the model's size. In training --crop-pct leaves a margin for random crops."""
    config = resolve_data_config(vars(args), pretrained_cfg=read_pretrained_cfg(args.model))
    view = View.of({**config, 'crop_pct': args.crop_pct or 1.0})
    if not training or view.crop_pct == 1:
        return view
    channels, *size = view.input_size
    return replace(view, input_size=(channels, *(math.floor(side / view.crop_pct) for side in size)), crop_pct=1.0)


def create_resident_dataset(
    args: argparse.Namespace,
    note: Callable[[list[str], int], None],
    count: Callable[..., None],
    teachers: Sequence[str],
    name: str,
    root: str | None = None,
    split: str = 'validation',
    download: bool = False,
    seed: int = 42,
    is_training: bool = False,
    **_,
) -> ResidentDataset:
    """Stand in for timm.data.create_dataset, with the arguments of train.py before its own."""
    view = _view(args, training=is_training)
    classes = None if name else list_classes(root, args.train_split)  # the evaluation split may hold a few of them
    data = load_images(root, split, name=name, download=download, view=view, classes=classes)
    if is_training:
        note(data.classes, args.num_classes)
        if teachers:
            data = replace(data, targets=soft_targets(teachers, data, args.num_classes, args.device))
    else:
        count(test_images=len(data))
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
    """Stand in for timm.data.create_loader. `collate_fn`, which train.py gives only for it, is timm's mixup."""
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
            f' flip {loader.hflip}'
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
