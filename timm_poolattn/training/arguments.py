"""train.py's arguments: read by its own parser, and refused before any long work if they cannot be right."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
import yaml
from timm.models import get_pretrained_cfg, resolve_model_input_args
from timm.optim import list_optimizers

from ..data.view import INTERPOLATIONS
from ..models import check_model_name
from ..utils import MissingFileError, UserError, carried, look_up, look_up_device
from .runs import MODEL_ARGS

#: train.py's of its random crop and colours, whose defaults are in no run of ours: given, they are what is meant.
CROP_AND_COLOUR = ('scale', 'ratio', 'color_jitter', 'train_interpolation')
#: Those of timm's create_scheduler_v2, but for 'none', which train.py cannot do without.
_SCHEDULES = ('cosine', 'tanh', 'step', 'multistep', 'plateau', 'poly', 'constant', 'wsd', 'rsqrt')
#: Of timm's saver.
_METRICS = ('top1', 'top5', 'loss')
#: Data sets of timm of which an epoch has no end of its own.
_STREAMS = ('hfids/', 'tfds/', 'wds/')
_COUNTS = ('epochs', 'batch_size', 'validation_batch_size', 'grad_accum_steps', 'log_interval', 'val_interval')
_COUNTS += ('checkpoint_hist', 'input_size', 'img_size', 'recount', 'decay_epochs')
_COUNTS += ('lr_cycle_limit', 'num_classes')
#: The least and the most that train.py's numbers can be; of some it takes others, and fails after a while.
_RANGES = {
    **dict.fromkeys(_COUNTS, (1, math.inf)),
    **dict.fromkeys(('aug_repeats', 'epoch_repeats', 'workers', 'lr_base', 'warmup_epochs'), (0, math.inf)),
    'lr': (1e-12, math.inf),  # it takes 0 for none, and --lr-base in its place
    **dict.fromkeys(('cooldown_epochs', 'clip_grad', 'mixup', 'cutmix', 'weight_decay', 'decay_rate'), (0, math.inf)),
    **dict.fromkeys(('warmup_lr', 'min_lr', 'start_epoch', 'patience_epochs'), (0, math.inf)),
    **dict.fromkeys(('distill_loss_weight', 'task_loss_weight'), (0, math.inf)),
    **dict.fromkeys(('lr_cycle_mul', 'kd_temperature'), (1e-3, math.inf)),
    **dict.fromkeys(('drop', 'drop_path', 'smoothing', 'reprob', 'hflip', 'vflip', 'mean'), (0, 1)),
    **dict.fromkeys(('mixup_prob', 'mixup_switch_prob', 'cutmix_minmax', 'bce_target_thresh'), (0, 1)),
    **dict.fromkeys(('momentum', 'model_ema_decay', 'layer_decay'), (0, 1)),
    **dict.fromkeys(('std', 'crop_pct'), (1e-3, 1)),
}
#: train.py's names of what cannot be in --model-kwargs too, by create_model's.
_OPTIONS = dict(
    MODEL_ARGS,
    pretrained='pretrained',
    in_chans='in_chans',
    scriptable='torchscript',
    checkpoint_path='initial_checkpoint',
)


def recipes() -> dict[str, Path]:
    """Return the recipes by name: files for train.py's --config, from an installed package or a source checkout."""
    return {path.stem: path for path in sorted(carried('train_scripts/recipes').glob('*.yaml'))}


@dataclass(frozen=True)
class Arguments:
    """train.py's arguments.

    Attributes:
        args: all of them.
        text: the same for args.yaml.
        given: those that are not train.py's own defaults, by a recipe or by hand, and `CROP_AND_COLOUR` wherever given.
        recipe: the name of --config's file, if any.
    """

    args: argparse.Namespace
    text: str
    given: dict[str, Any]
    recipe: str | None


def parse_arguments(module: ModuleType, argv: Sequence[str], recipe: str | None = None) -> Arguments:
    """Parse `argv` by the parser of train.py.

    Args:
        module: train.py.
        argv: its arguments.
        recipe: one of `recipes()`, whose values `argv` overrides.

    Raises:
        UserError: no such recipe or file, a file that is no mapping of train.py's arguments, or no model.
            Or what train.py's parser refuses.
    """
    module.config_parser.error = module.parser.error = partial(_refuse, module)
    config = module.config_parser.parse_known_args(list(argv))[0].config
    if recipe is not None:
        if config:
            own = ' (`poolattn finetune` has its recipe, `poolattn train` takes either)' * (recipe == 'finetune')
            raise UserError(
                f'recipe {recipe} and --config {config}: take one{own}, and override its values by arguments'
            )
        look_up('recipe', recipe, recipes(), 'or give a file of your own by --config')
        config = str(recipes()[recipe])
        argv = ['--config', config, *argv]
    if config:
        _check_config(Path(config), {action.dest for action in module.parser._actions})
    if not torch.cuda.is_available():
        module.parser.set_defaults(device='cpu')  # timm's default is cuda
    module.parser.set_defaults(model=None)  # timm's is a ResNet-50 for ImageNet
    defaults = vars(module.parser.parse_args([]))
    argv_before, sys.argv = sys.argv, ['train.py', *argv]
    try:
        module.parser.set_defaults(**dict.fromkeys(CROP_AND_COLOUR))
        typed = module.parser.parse_known_args(module.config_parser.parse_known_args(list(argv))[1])[0]
        source = typed if config and _was_resident(Path(config)) else module._parse_args()[0]
        given = {k: getattr(source, k) for k in CROP_AND_COLOUR if getattr(source, k) is not None}
        module.parser.set_defaults(**{k: defaults[k] for k in CROP_AND_COLOUR})
        args, text = module._parse_args()
        if more := _channel_options(args):
            sys.argv += more
            args, text = module._parse_args()
    except UserError:  # a ValueError too
        raise
    except ValueError as e:  # argparse has its own kind, but not for these
        raise UserError(f'an argument cannot be read ({e}); --model-kwargs and its like take name=value') from e
    finally:
        sys.argv = argv_before
    if not args.model:
        raise UserError('no model: give --model, as in --model resnet20_saam.cifar10, or a --recipe that names one')
    if typed.data and typed.data_dir:
        raise UserError(f'{typed.data} and --data-dir {typed.data_dir}: train.py reads one folder; leave one out')
    if args.data and args.data_dir:  # one of them is the config's
        args.data, args.data_dir = typed.data, typed.data_dir
        text = yaml.safe_dump(vars(args), default_flow_style=False)
    given |= {k: v for k, v in vars(args).items() if v != defaults.get(k)}
    return Arguments(args, text, given, Path(config).stem if config else None)


def _refuse(module: ModuleType, message: str) -> NoReturn:
    """Stand in for the parser's own `error`, which prints all of its options and ends the process."""
    unknown = message.partition('unrecognized arguments: ')[2].split()
    if unknown:
        known = {option for action in module.parser._actions for option in action.option_strings}
        look_up('argument', unknown[0].partition('=')[0], known, "`python train.py -h` describes train.py's")
    raise UserError(f'train.py: {message}; `python train.py -h` describes its arguments')


def read_pretrained_cfg(name: str) -> dict[str, Any]:
    """Return what timm knows of a model's weights, which for hf-hub:... and local-dir:... their config.json says.

    Raises:
        UserError: such a one cannot be read.
    """
    if ':' not in name:
        cfg = get_pretrained_cfg(name)
        return cfg.to_dict() if cfg else {}
    try:
        return resolve_model_input_args(name)['pretrained_cfg']
    except Exception as e:  # of timm's and of the Hub's own kinds
        raise UserError(f'--model {name} cannot be: {type(e).__name__}: {" ".join(str(e).split())[:300]}') from e


def _channel_options(args: argparse.Namespace) -> list[str]:
    """Return what another number of channels than the model's own means for the images; train.py does not ask."""
    if not args.model:
        return []
    cfg = read_pretrained_cfg(check_model_name(args.model))
    own = cfg.get('input_size') or (3, 224, 224)
    channels = args.input_size[0] if args.input_size else args.in_chans or own[0]
    if not (cfg or args.input_size or args.img_size) and channels != 3:
        raise UserError(f'--in-chans {channels}: {args.model} has no cfg that says its size; give --input-size too')
    options = []
    if not args.input_size and (channels, own[0]) != (3, 3):  # it takes any other size for 3 channels
        size = [args.img_size] * 2 if args.img_size else own[1:]
        options = ['--input-size', *map(str, (channels, *size))]
    for key in ('mean', 'std'):
        values = cfg.get(key) or (0.5,) * 3
        if getattr(args, key) is None and len(values) != channels:
            options += [f'--{key}', f'{sum(values) / len(values):.4g}']  # one number is each channel's
    return options


def _check_config(path: Path, known: set[str]) -> None:
    if not path.is_file():
        raise MissingFileError(f'--config: no file {path}; `--recipe` takes the name of a recipe')
    try:
        values = yaml.safe_load(path.read_text('utf-8'))
    except (yaml.YAMLError, ValueError) as e:
        raise UserError(f'--config {path}: no YAML ({" ".join(str(e).split())[:200]})') from e
    if not isinstance(values, dict):
        raise UserError(f'--config {path}: not a mapping of arguments to values, as in `epochs: 30`')
    for key, value in values.items():
        if value is not None and key not in known:  # another version of train.py may leave it at None
            look_up('argument', str(key), known, f'--config {path}: its keys are the arguments of train.py')


def _was_resident(config: Path) -> bool:
    """Return True of the args.yaml of a run with the resident loader: its `CROP_AND_COLOUR` were of no use."""
    try:
        return json.loads((config.parent / 'run.json').read_text('utf-8'))['options']['resident'] is True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse misspelt names, numbers out of range, missing files and devices that this machine does not have.

    Raises:
        UserError: one of them.
    """
    check_model_name(args.model)
    if args.kd_model_name:
        check_model_name(args.kd_model_name)
    look_up_device(args.device)
    if twice := sorted((args.model_kwargs or {}).keys() & _OPTIONS.keys()):
        said = ', '.join(f'{key} is --{_OPTIONS[key].replace("_", "-")}' for key in twice)
        raise UserError(f'--model-kwargs: train.py has options of its own for these: {said}')
    if args.dataset in ('torch/image_folder', 'torch/folder'):  # of which timm evaluates another folder than its split
        raise UserError(f'--dataset {args.dataset}: leave it out; --data-dir alone names a folder of images')
    if getattr(args, 'tta', 0) > 1:  # it takes the mean over neighbouring images, and counts one of them
        raise UserError('--tta: train.py evaluates something else than the images with it; leave it out')
    look_up('optimizer', args.opt.lower().removeprefix('lookahead_'), list_optimizers(), 'for --opt')
    if args.sched:
        look_up('schedule', args.sched, _SCHEDULES, 'for --sched')
    look_up('mode', args.clip_mode, ('norm', 'value', 'agc'), 'for --clip-mode')
    look_up('mode', args.mixup_mode, ('batch', 'pair', 'elem', 'half'), 'for --mixup-mode')
    look_up('scaling', args.lr_base_scale or 'linear', ('linear', 'sqrt'), 'for --lr-base-scale')
    look_up('way', args.dist_bn or 'reduce', ('reduce', 'broadcast'), 'for --dist-bn')
    look_up('seeding', args.worker_seeding, ('all', 'part'), 'for --worker-seeding')
    look_up('metric', args.eval_metric, _METRICS, 'for --eval-metric')
    look_up('interpolation', args.interpolation or 'bicubic', INTERPOLATIONS, 'for --interpolation')
    fraction = {'decay_epochs': (1e-3, math.inf)} if args.sched in ('wsd', 'rsqrt') else {}  # of the schedule
    for name, (low, high) in (_RANGES | fraction).items():
        value = getattr(args, name, None)
        for number in value if isinstance(value, list | tuple) else [value]:
            if number is not None and not low <= number <= high:
                bound = f'{low:g} to {high:g}' if high < math.inf else f'at least {low:g}'
                raise UserError(f'--{name.replace("_", "-")} is {number:g}, and must be {bound}')
    if args.cutmix_minmax and not (len(args.cutmix_minmax) == 2 and args.cutmix_minmax[0] < args.cutmix_minmax[1]):
        said = ' '.join(f'{number:g}' for number in args.cutmix_minmax)
        raise UserError(f'--cutmix-minmax {said}: give two numbers, the lesser first')
    pairs = (args.mixup or args.cutmix or args.cutmix_minmax) and not getattr(args, 'naflex_loader', False)
    if pairs and args.batch_size % 2:  # NaFlex's mixup leaves the odd one as it is
        raise UserError(f'--batch-size {args.batch_size}: mixup and cutmix pair images; give an even number')
    if not (args.dataset or '').startswith(_STREAMS):
        for name in ('epoch_repeats', 'train_num_samples', 'val_num_samples'):
            if getattr(args, name, None):
                raise UserError(
                    f'--{name.replace("_", "-")}: train.py has no use for it but with data that are read as a stream'
                    f' (--dataset {", ".join(_STREAMS)}); leave it out'
                )
    last = args.epochs + (args.cooldown_epochs or 0) * (args.sched in ('cosine', 'tanh', 'poly', 'wsd', 'rsqrt'))
    last += (args.warmup_epochs or 0) * bool(args.warmup_prefix)
    if (args.start_epoch or 0) >= last and (args.lr_cycle_limit or 1) == 1:
        raise UserError(f'--start-epoch {args.start_epoch}: counted from 0, the last of --epochs {last} is {last - 1}')
    channels = args.input_size[0] if args.input_size else 3
    if (args.in_chans or channels) != channels:
        raise UserError(f'--in-chans {args.in_chans} and --input-size of {channels} channels: give one of them')
    mode = {1: 'L', 3: 'RGB'}.get(channels)
    if mode and getattr(args, 'input_img_mode', None) not in (None, mode):
        raise UserError(f'--input-img-mode {args.input_img_mode}: images of {channels} channels are {mode}')
    for name in ('mean', 'std'):
        if len(getattr(args, name) or [0]) not in (1, channels):
            raise UserError(f'--{name}: {len(getattr(args, name))} numbers for {channels} channels; give one for each')
    for option in ('initial_checkpoint', 'pretrained_path'):
        path = getattr(args, option)
        if path and not Path(path).is_file():
            raise MissingFileError(f'--{option.replace("_", "-")}: no file {path}')
