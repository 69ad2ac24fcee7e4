"""Fine-tuning to a folder of one's own classes: train, keep the best epoch, say what it gets right and wrong."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from timm.data import resolve_data_config
from timm.models import create_model, save_for_hf
from torch import nn

from ..data import ImageData, ResidentDataset, ResidentLoader, list_classes, load_images
from ..inference import decoded_size, load_pretrained
from .runner import train


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
        """Per class: images, those found (recall), and how often the class's name was right (precision)."""
        width = max(len('class'), *map(len, self.classes))
        lines = [f'{"class":<{width}}  images  found  recall  precision']
        for i, name in enumerate(self.classes):
            images, named = self.confusion[i].sum().item(), self.confusion[:, i].sum().item()
            found = self.confusion[i, i].item()
            recall = f'{found / images:.1%}' if images else '-'
            precision = f'{found / named:.1%}' if named else '-'
            lines.append(f'{name:<{width}}  {images:>6}  {found:>5}  {recall:>6}  {precision:>9}')
        return '\n'.join(lines)


def finetune(data_dir: str | Path, argv: Sequence[str] = (), **options) -> Finetuned:
    """Fine-tune by the recipe `finetune`; the best epoch's weights are kept.

    Args:
        data_dir: as in `load_images`: with splits, or a folder of classes, of which a fifth is held out. Images of any
            size are resized to the model's.
        argv: arguments of train.py that override the recipe's: --model, --epochs, --output, ...
        **options: of `train`.

    Raises:
        As `train`.
    """
    classes = list_classes(data_dir)
    argv = ['--num-classes', str(len(classes)), *argv, '--data-dir', str(data_dir)]
    run = train(argv, **{'recipe': 'finetune', **options})
    args = yaml.safe_load((run / 'args.yaml').read_text())
    with torch.serialization.safe_globals([argparse.Namespace]):
        best = torch.load(run / 'model_best.pth.tar', map_location='cpu', weights_only=True)
    model = create_model(args['model'], num_classes=args['num_classes'], **args['model_kwargs'])
    model.load_state_dict(best.get('state_dict_ema', best['state_dict']))
    config = dict(resolve_data_config(args, model=model), crop_pct=args['crop_pct'] or 1.0)  # as the run evaluated it
    save_for_hf(
        model,
        run / 'model',
        model_config=dict(label_names=classes),
        data_config={k: config[k] for k in ('input_size', 'mean', 'std', 'crop_pct', 'interpolation')},
        safe_serialization=True,
    )
    model = load_pretrained(f'local-dir:{run / "model"}')
    img_mode = 'L' if model.in_chans == 1 else 'RGB'
    data = load_images(data_dir, args['val_split'], img_mode=img_mode, size=decoded_size(model), classes=classes)
    confusion = confusion_matrix(model, data)
    figure = _draw(confusion, classes, run / 'confusion.png')
    return Finetuned(run / 'model', classes, confusion, best['epoch'], figure)


@torch.inference_mode()
def confusion_matrix(model: nn.Module, data: ImageData) -> torch.Tensor:
    """(classes, classes): images of class i that `model` takes for class j."""
    config = resolve_data_config(model=model)
    loader = ResidentLoader(
        ResidentDataset(data), config['input_size'], 500, is_training=False, mean=config['mean'], std=config['std']
    )
    pairs = torch.cat([target * model.num_classes + model.eval()(input).argmax(1) for input, target in loader])
    return pairs.bincount(minlength=model.num_classes**2).view(model.num_classes, model.num_classes)


def _draw(confusion: torch.Tensor, classes: list[str], path: Path) -> Path | None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    side = 2 + 0.4 * len(classes)
    figure = Figure((side + 1, side), layout='constrained')
    axes = figure.subplots()
    share = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    image = axes.imshow(share.numpy(), cmap='Blues', vmin=0, vmax=1)
    for i, j in confusion.nonzero().tolist() if len(classes) <= 30 else ():
        color = 'white' if share[i, j] > 0.5 else 'black'
        axes.text(j, i, confusion[i, j].item(), ha='center', va='center', color=color)
    axes.set_xticks(range(len(classes)), classes, rotation=90)
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel='predicted', ylabel='class')
    figure.colorbar(image, label="share of the class's images")
    figure.savefig(path, dpi=150)
    return path
