"""Using trained models: load by name, classify images, measure accuracy on a data set."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import replace
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError
from timm.data import create_transform, resolve_data_config
from timm.utils import AverageMeter, accuracy
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from .data import ImageData, ResidentDataset, ResidentLoader
from .models import FAMILIES, HubError, hub_errors
from .utils import UserError


def _check_known(name: str) -> None:
    known = timm.list_models(include_tags='.' in name)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        raise ValueError(f'unknown model {name!r}; nearest: {", ".join(near) or "none"}. `poolattn list` shows ours')


def load_untrained(name: str) -> nn.Module:
    """timm.create_model(name) in evaluation mode.

    Raises:
        ValueError: no such model; the message names the nearest.
    """
    _check_known(name)
    return timm.create_model(name).eval()


def load_pretrained(name: str) -> nn.Module:
    """timm.create_model(name, pretrained=True) in evaluation mode.

    Raises:
        ValueError: no such model (the message names the nearest), one without weights (it names those with), or a
            folder or repository that is none of a model.
        HubError: the Hub did not give the weights; the message says why.
    """
    if ':' not in name:  # hf-hub:..., local-dir:... are timm's to resolve
        _check_known(name)
        if not timm.models.is_model_pretrained(name):
            arch = name.partition('.')[0]
            trained = timm.list_pretrained(f'{arch}*') or timm.list_models(module=FAMILIES, pretrained=True)
            raise ValueError(f'{name} has no weights yet; with weights: {", ".join(trained) or "none"}')
    try:
        with hub_errors(name.partition(':')[2]):
            try:
                return timm.create_model(name, pretrained=True).eval()
            except JSONDecodeError as e:  # and not of the Hub, which `hub_errors` would say
                raise UserError(f'{name}: its config.json is not JSON ({e}); download or write it again') from None
    except (RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as e:
        if ':' not in name or isinstance(e, HubError):
            raise
        # timm's, of a folder or repository that says what cannot be
        raise ValueError(f'{name} cannot be loaded: {e}; `poolattn hub verify {name}` may say more') from e


def read_image(path: str | Path, in_chans: int = 3) -> Image.Image:
    """An image file of any size and mode, turned upright, in grey for one channel and else in RGB.

    Raises:
        FileNotFoundError: a missing file.
        ValueError: a file that is not an image.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert('L' if in_chans == 1 else 'RGB')
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such file') from None
    except (UnidentifiedImageError, OSError) as e:
        reason = 'not an image' if isinstance(e, UnidentifiedImageError) else e
        raise ValueError(f'{path}: cannot be read as an image ({reason})') from e


def class_names(model: nn.Module) -> list[str]:
    """The names of a model's classes, or their numbers where its config has none."""
    return list(model.pretrained_cfg.get('label_names') or map(str, range(model.num_classes)))


@torch.inference_mode()
def predict(model: nn.Module, paths: Iterable[str | Path], topk: int = 5) -> list[dict[str, Any]]:
    """Classify image files of any size and mode, resized as the model's config says.

    Args:
        model: in evaluation mode.
        paths: image files.
        topk: how many classes to return. Default: 5.

    Returns:
        For each image `image` (its path) and `predictions`, most probable first: `label` and `probability`.

    Raises:
        FileNotFoundError: a missing file.
        ValueError: a file that is not an image.
    """
    config = resolve_data_config(model=model)
    transform = create_transform(**config)
    labels = class_names(model)
    results = []
    for path in paths:
        image = read_image(path, config['input_size'][0])
        probabilities = model(transform(image).unsqueeze(0)).float().softmax(1)[0]
        top = probabilities.topk(min(topk, len(probabilities)))
        predictions = [
            dict(label=labels[i], probability=p) for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
        results.append(dict(image=str(path), predictions=predictions))
    return results


def decoded_size(model: nn.Module) -> int | None:
    """`size` of `load_images` by which `evaluate` sees images of any size as timm's evaluation does.

    None for a model that is not square: its images must be of its size.
    """
    config = resolve_data_config(model=model)
    height, width = config['input_size'][1:]
    return math.floor(height / config['crop_pct']) if height == width else None


@torch.inference_mode()
def evaluate(
    model: nn.Module, data: ImageData, *, batch_size: int = 500, device: torch.device | str = 'cpu'
) -> dict[str, float]:
    """Accuracy on every image of `data`, single view; of larger images than the model's, the centre.

    Args:
        model: Put into evaluation mode and moved to `device`.
        data: as `load_images` reads it.
        batch_size: Default: 500.
        device: Default: 'cpu'.

    Returns:
        `top1` and `top5` in %, `loss` (mean cross entropy), `ece` (see `calibration_error`), `images` (their number).

    Raises:
        ValueError: the images are smaller than the model's, or classes that the model does not know.
    """
    labels = list(model.pretrained_cfg.get('label_names') or data.classes)
    unknown = [name for name in data.classes if name not in labels[: model.num_classes]]
    if unknown:
        raise ValueError(f'the model was not trained on the classes {", ".join(unknown[:5])}; it knows {len(labels)}')
    index = torch.tensor([labels.index(name) for name in data.classes])  # the data may hold a few of the classes only
    data = replace(data, targets=index[data.targets])
    config = resolve_data_config(model=model)
    statistics = dict(mean=config['mean'], std=config['std'])
    loader = ResidentLoader(
        ResidentDataset(data), config['input_size'], batch_size, is_training=False, device=device, **statistics
    )
    model.to(device).eval()
    top1, top5, loss = AverageMeter(), AverageMeter(), AverageMeter()
    confidences, hits = [], []
    for input, target in tqdm(loader, desc='evaluating', unit='batch', delay=1, disable=None):
        output = model(input)
        acc1, acc5 = accuracy(output, target, topk=(1, 5))
        for meter, value in ((top1, acc1), (top5, acc5), (loss, F.cross_entropy(output, target))):
            meter.update(value.item(), len(target))
        confidence, prediction = output.float().softmax(1).max(1)
        confidences.append(confidence)
        hits.append(prediction == target)
    ece = calibration_error(torch.cat(confidences), torch.cat(hits))
    means = dict(top1=round(top1.avg, 4), top5=round(top5.avg, 4), loss=round(loss.avg, 6), ece=round(ece, 4))
    return dict(**means, images=len(data))


def calibration_error(confidence: torch.Tensor, hit: torch.Tensor, bins: int = 15) -> float:
    """Expected calibration error in %: how far confidence lies from accuracy, on average over bins of confidence.

    Paper: `On Calibration of Modern Neural Networks` - https://arxiv.org/abs/1706.04599 (Eq. 3)

    Args:
        confidence: (N,) probability of the predicted class.
        hit: (N,) whether it is the right one.
        bins: of equal width, ((m - 1) / bins, m / bins]. Default: 15.
    """
    index = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64, device=confidence.device)  # |B_m| (acc(B_m) - conf(B_m))
    gaps.index_add_(0, index, hit.double() - confidence.double())
    return 100 * gaps.abs().sum().item() / len(confidence)
