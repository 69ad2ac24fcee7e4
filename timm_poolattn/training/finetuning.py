"""Fine-tuning to a folder of one's own classes: train, keep the best epoch, say what it gets right and wrong."""

import argparse
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data.readers.class_map import load_class_map
from timm.utils import world_info_from_env
from torch import nn

from ..data import ImageData, ResidentDataset, ResidentLoader, list_classes
from ..utils import UserError, replacing
from .runner import train
from .runs import read_run


@dataclass
class Finetuned:
    """A fine-tuned model and its report.

    Attributes:
        model_dir: timm's format: create_model(f'local-dir:{model_dir}', pretrained=True) loads it, classes and all.
        classes: class names, in order.
        confusion: int64, (classes, classes): images of class i that were taken for class j.
        epoch: the best one, counted from 0, whose weights these are.
        figure: the confusion matrix as a picture, or None without matplotlib (the `explain` extra).
    """

    model_dir: Path
    classes: list[str]
    confusion: torch.Tensor
    epoch: int
    figure: Path | None

    @property
    def top1(self) -> float:
        """Accuracy in %."""
        return 100 * (self.confusion.trace() / self.confusion.sum()).item()

    def table(self) -> str:
        """Write per class: images, those found (recall), and how often the class's name was right (precision)."""
        names = [''.join(c if c.isprintable() else '?' for c in name) for name in self.classes]
        width = max(len('class'), *map(len, names))
        lines = [f'{"class":<{width}}  images  found  recall  precision']
        for i, name in enumerate(names):
            images, named = self.confusion[i].sum().item(), self.confusion[:, i].sum().item()
            found = self.confusion[i, i].item()
            recall = f'{found / images:.1%}' if images else '-'
            precision = f'{found / named:.1%}' if named else '-'
            lines.append(f'{name:<{width}}  {images:>6}  {found:>5}  {recall:>6}  {precision:>9}')
        return '\n'.join(lines)


def finetune(data_dir: str | Path, argv: Sequence[str] = (), **options) -> Finetuned:
    """Fine-tune by the recipe `finetune`; the best epoch's weights are kept.

    Args:
        data_dir: as in `load_images`: with splits, or a folder of classes, of which about a fifth is held out. Images
            of any size are resized to the model's.
        argv: arguments of train.py that override the recipe's: --model, --epochs, --output, ...
        **options: of `train`.

    Raises:
        As `train`, and UserError: `argv` has what follows from the images.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('--train-split', default='train')
    parser.add_argument('--val-split', default='validation')
    parser.add_argument('--class-map')
    parser.add_argument('--data-dir')
    parser.add_argument('--num-classes')
    args = parser.parse_known_args(list(argv))[0]
    if world_info_from_env()[2] > 1:
        raise UserError('finetune: is one process; `train --recipe finetune` takes several')
    if args.data_dir or args.num_classes:
        raise UserError('finetune: the images given say --data-dir and --num-classes; leave them out')
    if not args.val_split:
        raise UserError("finetune: --val-split '' leaves nothing to find the best epoch by; leave it out")
    classes = list_classes(data_dir, args.train_split)
    if args.class_map:
        named = {*classes}
        with suppress(Exception):  # `train` reads the file again, and says what is wrong with it
            named = {*load_class_map(args.class_map, str(data_dir))}
        if named != {*classes}:
            raise UserError(f'finetune: --class-map {args.class_map} may order the classes, not leave out or add some')
    argv = [*argv, '--num-classes', str(len(classes)), '--data-dir', str(data_dir)]
    run = read_run(train(argv, **{'recipe': 'finetune', **options}))
    model = run.build_model('best')
    with replacing(run.folder / 'model') as temp:
        run.save_model(model, temp)
    confusion = confusion_matrix(model, run.load_data(model), run.data_config(model))
    figure = draw_confusion(confusion, run.classes, run.folder / 'confusion.png')
    return Finetuned(run.folder / 'model', run.classes, confusion, run.read_checkpoint('best')['epoch'], figure)


@torch.inference_mode()
def confusion_matrix(model: nn.Module, data: ImageData, config: dict[str, Any]) -> torch.Tensor:
    """Count images of class i that `model` takes for class j: (classes, classes).

    Args:
        model: in evaluation mode.
        data: brought to size.
        config: input_size, mean and std.
    """
    n, dataset = model.num_classes, ResidentDataset(data)
    loader = ResidentLoader(
        dataset, config['input_size'], 500, is_training=False, mean=config['mean'], std=config['std']
    )
    confusion = torch.zeros(n, n, dtype=torch.long)
    for input, target in loader:
        confusion.index_put_((target, model(input).argmax(1)), torch.ones_like(target), accumulate=True)
    return confusion


def draw_confusion(confusion: torch.Tensor, classes: Sequence[str], path: Path) -> Path | None:
    """Draw a confusion matrix into `path`, at most 2,400 pixels wide however many classes; None without matplotlib.

    Up to 30 classes have their counts in it, and up to 80 their names, which are plain text whatever is in them.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    n = len(classes)
    side = min(2 + 0.4 * n, 15)
    figure = Figure((side + 1, side), layout='constrained')
    axes = figure.subplots()
    share = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    image = axes.imshow(share.numpy(), cmap='Blues', vmin=0, vmax=1)
    for i, j in confusion.nonzero().tolist() if n <= 30 else ():
        color = 'white' if share[i, j] > 0.5 else 'black'
        axes.text(j, i, confusion[i, j].item(), ha='center', va='center', color=color)
    if n <= 80:
        names = [name if len(name) <= 24 else f'{name[:23]}…' for name in classes]
        style = dict(parse_math=False, fontsize=10 if n <= 30 else 6)
        axes.set_xticks(range(n), names, rotation=90, **style)
        axes.set_yticks(range(n), names, **style)
    number = ' (number)' if n > 80 else ''
    axes.set(xlabel=f'predicted{number}', ylabel=f'class{number}')
    figure.colorbar(image, label="share of the class's images")
    with replacing(path) as temp:
        figure.savefig(temp, dpi=150)
    return path
