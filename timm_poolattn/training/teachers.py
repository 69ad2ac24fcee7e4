"""Targets from trained models: what they see in each training image, rather than its class alone."""

import hashlib
import logging
from collections.abc import Sequence

import torch
from safetensors.torch import load_file, save, save_file
from timm.models import safe_model_name
from torch.nn import functional as F

from ..data import ImageData, evaluation_config
from ..inference import evaluation_loader, label_names, load_pretrained, view_of
from ..models import data_sha256
from ..utils import UserError, cache_dir, progress, replacing

_logger = logging.getLogger(__name__)


def soft_targets(
    teachers: Sequence[str], data: ImageData, num_classes: int, device: torch.device | str = 'cpu'
) -> torch.Tensor:
    """Return the mean of the class probabilities that `teachers` give to each image.

    Paper: `Distilling the Knowledge in a Neural Network` - https://arxiv.org/abs/1503.02531 (Eq. 1 with T = 1)

    A teacher sees an image once, as it is, and not each of its augmented views. So it costs one evaluation of the
    training images, which is cached for further runs, and the epochs cost no more than with any other targets.

    Args:
        teachers: names with weights, as in `load_pretrained`.
        data: the training images.
        num_classes: of the model to train; classes beyond those of `data` get 0.
        device: to compute on.

    Returns:
        (N, num_classes) float32.

    Raises:
        UserError: an unknown teacher, one without weights, one of another image size, or one that does not know all of
            the classes.
    """
    mean = sum(_probabilities(name, data, device) for name in teachers) / len(teachers)
    return F.pad(mean, (0, num_classes - len(data.classes)))


def weight_hashes(teachers: Sequence[str]) -> list[str]:
    """Return the SHA-256 of each teacher's weights: a release's `data_sha256`, by which its results.json names them.

    Raises:
        UserError: as `load_pretrained`.
    """
    hashes = []
    for name in teachers:
        weights = load_pretrained(name).state_dict()
        unshared = {key: w.clone(memory_format=torch.contiguous_format) for key, w in weights.items()}
        hashes.append(data_sha256(save(unshared)))
    return hashes


@torch.no_grad()  # not inference_mode, whose tensors take no part in a loss
def _probabilities(name: str, data: ImageData, device: torch.device | str) -> torch.Tensor:
    """Return what one teacher gives, (N, classes): of the classes that the data have, which share the others' part."""
    model = load_pretrained(name)
    if data.view not in (None, view_of(model)):
        raise UserError(
            f'--teacher {name}: it sees images as {view_of(model)}, and the model to train as {data.view}; leave out'
            ' --input-size, --crop-pct and --interpolation, or take another teacher'
        )
    try:
        loader = evaluation_loader(model, data, device=device)
    except UserError as e:
        raise UserError(f'--teacher {name}: {e}') from e
    labels = label_names(model) or data.classes
    digest = hashlib.sha256(f'{data.classes} {labels} {evaluation_config(model)} {model}'.encode())
    for tensor in (data.images, *model.state_dict().values()):
        digest.update(tensor.contiguous().numpy())
    path = cache_dir() / f'{safe_model_name(name)[:40]}-{digest.hexdigest()[:16]}.safetensors'
    if path.is_file():
        try:
            return load_file(path)['probabilities']
        except Exception as e:  # a damaged header raises safetensors' own kinds
            _logger.warning(f'{path}: computing again, {e}')
    index = torch.tensor([labels.index(label) for label in data.classes], device=device)
    model.to(device)
    batches = progress(loader, desc=f'targets from {name}', unit='batch')
    probabilities = torch.cat([model(input)[:, index].softmax(1).float().cpu() for input, _ in batches])
    try:
        with replacing(path) as temp:
            save_file(dict(probabilities=probabilities), temp)
    except (UserError, OSError) as e:  # it costs the next run a computation, no more
        _logger.warning(f'{path}: not cached ({e}); TIMM_POOLATTN_CACHE names another folder')
    return probabilities
