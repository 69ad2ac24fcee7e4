"""train.py's arguments: read by its own parser, and refused before any long work if they cannot be right."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from timm.optim import list_optimizers

from ..models import check_model_name
from ..utils import MissingFileError, UserError, look_up, look_up_device

#: Those of timm's create_scheduler_v2; of any other name it makes a constant rate without a word.
_SCHEDULES = ('cosine', 'tanh', 'step', 'multistep', 'plateau', 'poly', 'constant', 'none')
#: What train.py gives to create_model, and the option for it.
_OPTIONS = dict(
    pretrained='pretrained',
    in_chans='in-chans',
    num_classes='num-classes',
    drop_rate='drop',
    drop_path_rate='drop-path',
    drop_block_rate='drop-block',
    global_pool='gp',
    bn_momentum='bn-momentum',
    bn_eps='bn-eps',
    scriptable='torchscript',
    checkpoint_path='initial-checkpoint',
)


def recipes() -> dict[str, Path]:
    """The recipes by name: files for train.py's --config, from an installed package or a source checkout."""
    package = Path(__file__).parent.parent
    packaged = package / 'recipes'
    folder = packaged if packaged.is_dir() else package.parent / 'train_scripts' / 'recipes'
    return {path.stem: path for path in sorted(folder.glob('*.yaml'))}


@dataclass(frozen=True)
class Arguments:
    """train.py's arguments.

    Attributes:
        args: all of them.
        text: the same for args.yaml.
        given: those that are not train.py's own defaults, by a recipe or by hand.
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
        SystemExit: train.py's parser refuses them, and has said why.
    """
    config = module.config_parser.parse_known_args(list(argv))[0].config
    if recipe is not None:
        if config:
            raise UserError(f'recipe {recipe} and --config {config}: take one, and override its values by arguments')
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
        args, text = module._parse_args()
    finally:
        sys.argv = argv_before
    if not args.model:
        raise UserError('no model: give --model, as in --model resnet20_saam.cifar10, or a --recipe that names one')
    given = {k: v for k, v in vars(args).items() if v != defaults.get(k)}
    return Arguments(args, text, given, Path(config).stem if config else None)


def _check_config(path: Path, known: set[str]) -> None:
    if not path.is_file():
        raise MissingFileError(f'--config: no file {path}; `--recipe` takes the name of a recipe')
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError) as e:
        raise UserError(f'--config {path}: no YAML ({" ".join(str(e).split())[:200]})') from e
    if not isinstance(values, dict):
        raise UserError(f'--config {path}: not a mapping of arguments to values, as in `epochs: 30`')
    for key, value in values.items():
        if value is not None and key not in known:  # another version of train.py may leave it at None
            look_up('argument', str(key), known, f'--config {path}: its keys are the arguments of train.py')


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse names that are misspelt, files that are missing and devices that this machine does not have.

    Raises:
        UserError: one of them.
    """
    check_model_name(args.model)
    if args.kd_model_name:
        check_model_name(args.kd_model_name)
    look_up_device(args.device)
    if twice := sorted((args.model_kwargs or {}).keys() & _OPTIONS.keys()):
        said = ', '.join(f'{key} is --{_OPTIONS[key]}' for key in twice)
        raise UserError(f'--model-kwargs: train.py has options of its own for these: {said}')
    look_up('optimizer', args.opt.lower().removeprefix('lookahead_'), list_optimizers(), 'for --opt')
    if args.sched:
        look_up('schedule', args.sched, _SCHEDULES, 'for --sched')
    for option in ('initial_checkpoint', 'pretrained_path'):
        path = getattr(args, option)
        if path and not Path(path).is_file():
            raise MissingFileError(f'--{option.replace("_", "-")}: no file {path}')
