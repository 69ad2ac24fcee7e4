"""A run's folder: what was trained, how, how it went, and the model as it was evaluated."""

import argparse
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.data import resolve_data_config
from timm.models import clean_state_dict, create_model, get_pretrained_cfg
from torch import nn

from ..data import ImageData, View, list_classes, load_images
from ..models import release_args, save_model
from ..utils import MissingFileError, UserError, look_up

#: timm's names of the checkpoints to choose from.
CHECKPOINTS = dict(last='last.pth.tar', best='model_best.pth.tar')
#: train.py's names of what it gives to create_model, by create_model's.
MODEL_ARGS = dict(
    num_classes='num_classes',
    drop_rate='drop',
    drop_path_rate='drop_path',
    drop_block_rate='drop_block',
    global_pool='gp',
    bn_momentum='bn_momentum',
    bn_eps='bn_eps',
)
#: What a run's record holds, where it holds it.
_RECORD = dict(arguments=dict, options=dict, versions=dict, resumed=list, classes=list, wall_time_s=int | float)
#: What a config.json says of the images.
_DATA_CONFIG = ('input_size', 'mean', 'std', 'crop_pct', 'crop_mode', 'interpolation')


@dataclass(frozen=True)
class Run:
    """The output folder of `poolattn train`; see `read_run`.

    Attributes:
        folder: where it lies.
        args: all of train.py's arguments by name: args.yaml.
        record: what `train` adds to them: run.json. Empty for a run of train.py alone.
    """

    folder: Path
    args: dict[str, Any]
    record: dict[str, Any]

    @cached_property
    def curve(self) -> list[dict[str, float]]:
        """A row for each epoch; see `read_curve`."""
        return read_curve(self.folder)

    def data_dir(self) -> str:
        """Return where the run's data were.

        Raises:
            UserError: args.yaml does not say.
            MissingFileError: they are no longer there.
        """
        root = self.args.get('data_dir') or self.args.get('data')
        if not isinstance(root, str):
            raise UserError(f'{self.folder / "args.yaml"}: says no data_dir; give --data-dir')
        if not os.path.exists(os.path.expanduser(root)):
            raise MissingFileError(f'{root}: the data of {self.folder} are not there; --data-dir names another place')
        return root

    @cached_property
    def classes(self) -> list[str]:
        """The names of the training data's classes, in the order of the model's.

        Raises:
            UserError: an older run does not say them, and its data are no longer there.
        """
        if 'classes' in self.record:
            return self.record['classes']
        if self.args.get('dataset'):
            return load_images(self.data_dir(), 'train', name=self.args['dataset']).classes
        classes = list_classes(self.data_dir(), self.args.get('train_split') or 'train')
        return sorted(classes) if self.record else classes  # as an older run of ours had them, and one of timm's

    def read_checkpoint(self, which: str = 'last') -> dict[str, Any]:
        """Read what timm's saver wrote; no pickle is run.

        Raises:
            MissingFileError: it is not there.
            UserError: an unknown `which`, or a file of another kind.
        """
        look_up('checkpoint', which, CHECKPOINTS)
        return read_checkpoint(self.folder / CHECKPOINTS[which])

    def build_model(self, which: str = 'last') -> nn.Module:
        """Build the model in evaluation mode, with the weights that the run evaluated: the average where it kept one.

        Raises:
            As `read_checkpoint`.
            UserError: the weights are not of the model that args.yaml says.
        """
        saved = self.read_checkpoint(which)
        model = self.untrained_model()
        try:
            model.load_state_dict(model_weights(saved, ema=self.has_ema(saved)))
        except (KeyError, RuntimeError, AttributeError) as e:
            said = ' '.join(str(e).split())[:300]
            file = self.folder / CHECKPOINTS[which]
            raise UserError(f'{file}: not of the model that args.yaml beside it says: {said}') from e
        return model.eval()

    def has_ema(self, saved: dict[str, Any]) -> bool:
        """Return True if the run evaluated the moving average that is in the checkpoint `saved`."""
        return 'state_dict_ema' in saved and not self.args.get('model_ema_force_cpu')

    def untrained_model(self) -> nn.Module:
        """Build the model as train.py did, with random weights."""
        args, name = self.args, self.args['model']
        given = {ours: args.get(theirs) for ours, theirs in MODEL_ARGS.items()}
        if not args.get('in_chans') and args.get('input_size'):
            given['in_chans'] = args['input_size'][0]
        else:
            given['in_chans'] = args.get('in_chans') or 3
        given = {k: v for k, v in given.items() if v is not None}
        released = {}
        if args.get('pretrained') and (cfg := get_pretrained_cfg(name)):  # whose weights say more than their name
            released = release_args(f'{name.partition(".")[0]}.{cfg.tag}')
        try:
            return create_model(name, **{**released, **given, **(args.get('model_kwargs') or {})})
        except Exception as e:  # of timm's and of the model's own kinds
            raise UserError(f'{self.folder}: {name} cannot be built as args.yaml says ({type(e).__name__}: {e})') from e

    def data_config(self, model: nn.Module) -> dict[str, Any]:
        """Return how the run brought images to `model`: input_size, mean, std, crop_pct, crop_mode, interpolation."""
        try:
            config = resolve_data_config(self.args, model=model)
        except (AssertionError, TypeError) as e:
            raise UserError(f'{self.folder / "args.yaml"}: cannot be of the images ({type(e).__name__}: {e})') from e
        # a run of train.py alone has no record, an older one of ours no options; the resident loader has its own ways
        if self.record and self.record.get('options', {}).get('resident', True):
            config.update(crop_pct=self.args.get('crop_pct') or 1.0)
        else:
            config.update(crop_mode='center')  # all that train.py has its loader do
        return {k: config[k] for k in _DATA_CONFIG}

    def load_data(self, model: nn.Module, data_dir: str | Path | None = None) -> ImageData:
        """Read the images that the run evaluated `model` on, or those of `data_dir`, brought to size as they were."""
        root, name = data_dir or self.data_dir(), self.args.get('dataset') or ''
        split = self.args.get('val_split') or 'validation'
        classes = self.record.get('classes')  # of which a split may hold a few
        if not (classes or name):
            classes = list_classes(root, split)
            classes = sorted(classes) if self.record else classes  # as `classes` says
        return load_images(root, split, name=name, view=View.of(self.data_config(model)), classes=classes)

    def save_model(self, model: nn.Module, folder: str | Path) -> None:
        """Write `model` with its classes and the run's way to see images: see `models.save_model`."""
        save_model(model, folder, self.classes, self.data_config(model))


def read_run(folder: str | Path) -> Run:
    """Read the output folder of `poolattn train`.

    Raises:
        MissingFileError: no args.yaml in it.
        UserError: a file of it cannot be read.
    """
    folder = Path(folder)
    if not (folder / 'args.yaml').is_file():
        raise MissingFileError(f'{folder}: no args.yaml; is it the output folder of `poolattn train`?')
    read = {}
    for name, parse in (('args.yaml', yaml.safe_load), ('run.json', json.loads)):
        path = folder / name
        try:
            read[name] = parse(path.read_text()) if path.is_file() else {}
        except (yaml.YAMLError, ValueError) as e:
            raise UserError(f'{path}: cannot be read ({" ".join(str(e).split())[:200]}); was it cut short?') from e
        if not isinstance(read[name], dict):
            raise UserError(f'{path}: not a mapping; was it cut short?')
    if not isinstance(read['args.yaml'].get('model'), str):
        raise UserError(f"{folder / 'args.yaml'}: says no model; is it train.py's?")
    for key, value in read['run.json'].items():
        item = dict(classes=str, resumed=dict).get(key)
        if not isinstance(value, _RECORD.get(key, object)) or (item and not all(isinstance(v, item) for v in value)):
            raise UserError(f'{folder / "run.json"}: {key} is {str(value)[:100]}, which no run writes; was it changed?')
    return Run(folder, read['args.yaml'], read['run.json'])


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read what timm's saver wrote; no pickle is run.

    Raises:
        MissingFileError: it is not there.
        UserError: a file of another kind, or a damaged one.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f'{path}: no such checkpoint; is its folder that of a finished `poolattn train`?')
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            saved = torch.load(path, map_location='cpu', weights_only=True)
        return {**saved, 'epoch': int(saved['epoch']), 'state_dict': dict(saved['state_dict'])}
    except Exception as e:  # torch's and pickle's own kinds
        said = ' '.join(str(e).split())[:200]
        raise UserError(f'{path}: no checkpoint of `poolattn train` ({type(e).__name__}: {said})') from e


def model_weights(saved: dict[str, Any], ema: bool = False) -> dict[str, torch.Tensor]:
    """Return the weights in a checkpoint, without the norms that --split-bn adds for its augmented splits alone."""
    weights = clean_state_dict(saved['state_dict_ema' if ema else 'state_dict'])
    return {name: weight for name, weight in weights.items() if '.aux_bn.' not in name}


def read_curve(folder: str | Path) -> list[dict[str, float]]:
    """Return the whole rows of a run's summary.csv, one an epoch, in order; none where the file is empty or missing.

    timm writes the header again where a run resumes, and no row of an epoch that --val-interval leaves out. A row that
    was cut, by a kill or a full disk, is left out. A run that was killed between an epoch's row and its checkpoint
    repeats that epoch; one that was resumed from an earlier checkpoint repeats all that came after.
    """
    path = Path(folder, 'summary.csv')
    text = path.read_text(errors='replace') if path.is_file() else ''
    *lines, _ = text.split('\n')  # whole lines end
    # a resumed run's header may follow a cut row on its line
    lines = [f'epoch,{line.rpartition("epoch,")[2]}' if 'epoch,' in line else line for line in lines]
    rows = [line.strip().split(',') for line in lines]
    header, curve = [], []
    for row in rows:
        if row[0] == 'epoch':
            header = row
            continue
        try:
            epoch = {name: float(value) for name, value in zip(header, row, strict=True)}
            int(epoch['epoch'])
        except (ValueError, OverflowError):
            continue
        curve = [before for before in curve if before['epoch'] < epoch['epoch']] + [epoch]
    return curve


def teachers_of(result: dict[str, Any]) -> list[str]:
    """Return the models whose outputs a run was trained on, by `poolattn train --teacher` or timm's distillation."""
    names = [*result['options'].get('teacher', []), result['arguments'].get('kd_model_name')]
    return [name for name in names if name]
