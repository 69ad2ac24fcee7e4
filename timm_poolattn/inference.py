"""Using trained models: load by name, classify images, measure accuracy on a data set."""

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from safetensors import SafetensorError
from timm.utils import AverageMeter, accuracy
from torch import nn
from torch.nn import functional as F

from .data import ImageData, ResidentDataset, ResidentLoader, View, evaluation_config, load_images, read_image
from .models import check_model_name, hub_errors, no_weights
from .utils import MissingFileError, UserError, progress


def load_untrained(name: str) -> nn.Module:
    """Build timm.create_model(name) in evaluation mode.

    Raises:
        UserError: no such model (the message names the nearest), or a folder or repository.
    """
    if ':' in name:
        raise UserError(f'{name}: a folder or repository holds weights; without them, name its architecture')
    return timm.create_model(check_model_name(name)).eval()


def load_pretrained(name: str) -> nn.Module:
    """Build timm.create_model(name, pretrained=True) in evaluation mode.

    Raises:
        UserError: no such model (the message names the nearest), one without weights (it names those with), a folder
            or repository that is none of a model, or weights that are not finite.
        HubError: the Hub did not give the weights; the message says why.
    """
    source, _, place = name.rpartition(':')  # hf-hub:..., local-dir:... are timm's to resolve
    if not source:
        check_model_name(name)
        if not timm.models.is_model_pretrained(name):
            raise no_weights(name)
    elif source == 'local-dir':
        _check_folder(Path(place))
    try:
        with hub_errors(place):
            try:
                model = timm.create_model(name, pretrained=True).eval()
            except (
                json.JSONDecodeError,
                RecursionError,
            ) as e:  # of a repository's config.json; the Hub's own answers are checked before
                raise UserError(f'{name}: its config.json is no JSON ({e}); have it published again') from None
    except (
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        AssertionError,
        OSError,
        SafetensorError,
    ) as e:
        if not source or isinstance(e, UserError):
            raise
        # timm's, of a folder or repository that says what cannot be
        said = ' '.join(str(e).split())[:300]
        if not said or isinstance(e, KeyError):  # whose text alone says nothing
            said = f'{type(e).__name__} {said}'.strip()
        raise UserError(f'{name} cannot be loaded: {said}; `poolattn hub verify {name}` may say more') from e
    for key, weight in model.state_dict().items():
        if not weight.isfinite().all():
            raise UserError(f'{name}: {key} holds NaN or infinity, so that it predicts nothing; take other weights')
    _check_config(model, name)
    return model


def _check_config(model: nn.Module, name: str) -> None:
    """Refuse what a model's config says of images and classes where it cannot be."""
    try:
        config = evaluation_config(model)
        channels = View.of(config).input_size[0]
    except (UserError, TypeError, ValueError) as e:
        raise UserError(f'{name}: its config.json: {e}') from e
    for key, least in (('mean', -math.inf), ('std', 0)):
        values = config[key]
        if not isinstance(values, list | tuple) or len(values) != channels or not all(map(_is_number, values)):
            raise UserError(f'{name}: its config.json: {key} is {values!r}, and must be {channels} numbers')
        if min(values) <= least:
            raise UserError(f'{name}: its config.json: {key} is {values!r}, and must be over {least}')
    labels = model.pretrained_cfg.get('label_names')
    texts = isinstance(labels, list | tuple) and all(isinstance(label, str) for label in labels)
    if labels is not None and not (texts and len(labels) >= model.num_classes):
        raise UserError(f'{name}: its config.json: label_names must be {model.num_classes} texts')


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_folder(folder: Path) -> None:
    path = folder / 'config.json'
    if not path.is_file():
        raise MissingFileError(f'{path}: no such file; a model is a folder with config.json and model.safetensors')
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise UserError(f'{path}: is no JSON ({e}); make or download the folder again') from e
    except OSError as e:
        raise UserError(f'{path}: cannot be read ({e.strerror})') from e
    if not isinstance(config, dict) or not isinstance(config.get('architecture'), str):
        raise UserError(f'{path}: names no "architecture"; make or download the folder again')


def view_of(model: nn.Module) -> View:
    """Return how images are brought to the size of `model`."""
    return View.of(evaluation_config(model))


def model_input(model: nn.Module, image: Image.Image, name: str = 'image') -> torch.Tensor:
    """Bring `image`, of any size and mode, to what goes into `model`: (1, C, H, W), normalised.

    Raises:
        UserError: as `View`; the message has `name`.
    """
    config = evaluation_config(model)
    pixels = torch.from_numpy(View.of(config)(image, name)).permute(2, 0, 1)
    mean, std = (torch.tensor(config[k]).view(-1, 1, 1) for k in ('mean', 'std'))
    return pixels.float().div(255).sub(mean).div(std).unsqueeze(0)


def load_data(
    model: nn.Module, root: str | Path, split: str, *, name: str = '', hold_out: bool = False, **options
) -> ImageData:
    """Read a split as `model` sees it. Of a folder with the classes right in it, that is all of it.

    Args:
        model: whose size and channels the images get.
        root: as in `load_images`, as is what follows.
        split: of the data.
        name: torchvision's of a data set.
        hold_out: take what fine-tuning holds out, of a folder with the classes right in it.
        **options: more of `load_images`.

    Raises:
        MissingFileError, UserError: as `load_images`.
    """
    return load_images(root, split, name=name, view=view_of(model), hold_out=hold_out, **options)


def class_names(model: nn.Module) -> list[str]:
    """Return the names of a model's classes, or their numbers where its config has none, or those of another head."""
    return label_names(model) or list(map(str, range(model.num_classes)))


def label_names(model: nn.Module) -> list[str] | None:
    """Return the names of a model's classes; None where its config has none, or those of another head."""
    names = list(model.pretrained_cfg.get('label_names') or [])
    return names if len(names) == model.num_classes else None


def device_of(model: nn.Module) -> torch.device:
    """Return where a model takes its input. A quantised one may have no parameters, an offloaded one some on 'meta'."""
    devices = (p.device for p in model.parameters() if p.device.type != 'meta')
    return next(devices, torch.device('cpu'))


@torch.inference_mode()
def predict(
    model: nn.Module, paths: Iterable[str | Path], topk: int = 5, *, skip_broken: bool = False
) -> list[dict[str, Any]]:
    """Classify image files of any size and mode, resized as the model's config says.

    Args:
        model: in evaluation mode.
        paths: image files.
        topk: how many classes to return.
        skip_broken: go on after a file that is missing or cannot be read.

    Returns:
        For each image `image` (its path) and `predictions`, most probable first: `label` and `probability`. For a
        broken one `image` and `error`, the message.

    Raises:
        UserError: a file that cannot be read, unless `skip_broken`; or outputs that are not finite.
    """
    channels, labels = view_of(model).input_size[0], class_names(model)
    device = device_of(model)
    results = []
    for path in paths:
        try:
            input = model_input(model, read_image(path, channels), str(path)).to(device)
        except UserError as e:
            if not skip_broken:
                raise
            results.append(dict(image=str(path), error=str(e)))
            continue
        probabilities = _finite(model(input)).softmax(1)[0]
        top = probabilities.topk(min(topk, len(probabilities)))
        predictions = [
            dict(label=labels[i], probability=p) for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
        results.append(dict(image=str(path), predictions=predictions))
    return results


def _finite(output: torch.Tensor) -> torch.Tensor:
    if not output.isfinite().all():
        raise UserError('the model gives NaN or infinity: its weights or its config are broken; take others')
    return output.float()


def evaluation_loader(
    model: nn.Module, data: ImageData, batch_size: int = 500, device: torch.device | str = 'cpu'
) -> ResidentLoader:
    """Return batches of `data` in order, as `model` sees the images and numbers the classes: what `evaluate` measures.

    Raises:
        UserError: data that were read for a model of another size, or classes that the model does not know.
    """
    labels = label_names(model) or data.classes
    if len(labels) != model.num_classes:
        raise UserError(
            f'the config of the model does not name its {model.num_classes} classes, and the data have {len(labels)}:'
            f' which of them are these? Give model.pretrained_cfg a label_names of all'
        )
    unknown = [name for name in data.classes if name not in labels]
    if unknown:
        raise UserError(
            f'the model was not trained on the classes {", ".join(unknown[:5])}; it knows {len(labels)}: take these'
            f' out, or fine-tune a model on them'
        )
    index = torch.tensor([labels.index(name) for name in data.classes])  # the data may hold a few of the classes only
    config = evaluation_config(model)
    facts = {k: config[k] for k in ('mean', 'std')}
    dataset = ResidentDataset(replace(data, targets=index[data.targets]).seen_by(View.of(config)))
    return ResidentLoader(dataset, config['input_size'], batch_size, is_training=False, device=device, **facts)


@torch.inference_mode()
def evaluate(
    model: nn.Module, data: ImageData, *, batch_size: int = 500, device: torch.device | str = 'cpu'
) -> dict[str, float]:
    """Measure the accuracy on every image of `data`, single view.

    Images that `load_images` read as they are get the model's size here, so that there is one result for them.

    Args:
        model: put into evaluation mode and moved to `device`.
        data: as `load_data` or `load_images` reads it.
        batch_size: images at a time.
        device: to compute on.

    Returns:
        `top1` and `top5` in %, `loss` (mean cross entropy), `ece` (see `calibration_error`), `images` (their number).

    Raises:
        UserError: data that were read for a model of another size, classes that the model does not know, or outputs
            that are not finite.
    """
    loader = evaluation_loader(model, data, batch_size, device)
    model.to(device).eval()
    top1, top5, loss = AverageMeter(), AverageMeter(), AverageMeter()
    confidences, hits = [], []
    for input, target in progress(loader, desc='evaluating', unit='batch'):
        output = _finite(model(input))
        acc1, acc5 = accuracy(output, target, topk=(1, 5))
        for meter, value in ((top1, acc1), (top5, acc5), (loss, F.cross_entropy(output, target))):
            meter.update(value.item(), len(target))
        confidence, prediction = output.softmax(1).max(1)
        confidences.append(confidence)
        hits.append(prediction == target)
    ece = calibration_error(torch.cat(confidences).cpu(), torch.cat(hits).cpu())  # float64, which not all devices have
    means = dict(top1=round(top1.avg, 4), top5=round(top5.avg, 4), loss=round(loss.avg, 6), ece=round(ece, 4))
    return dict(**means, images=len(data))


def calibration_error(confidence: torch.Tensor, hit: torch.Tensor, bins: int = 15) -> float:
    """Return the expected calibration error in %: how far confidence lies from accuracy, on average over its bins.

    Paper: `On Calibration of Modern Neural Networks` - https://arxiv.org/abs/1706.04599 (Eq. 3)

    Args:
        confidence: (N,) probability of the predicted class.
        hit: (N,) True where it is the right one.
        bins: of equal width, ((m - 1) / bins, m / bins].
    """
    index = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64, device=confidence.device)  # |B_m| (acc(B_m) - conf(B_m))
    gaps.index_add_(0, index, hit.double() - confidence.double())
    return 100 * gaps.abs().sum().item() / len(confidence)
