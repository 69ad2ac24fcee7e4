"""Where images come from: torchvision's CIFAR folders, a folder of images by class, a tar of the same.

All of them become one `ImageData` in memory. Decoding a folder or a tar happens once, into a cache.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100

from ..papers import DATASETS
from ..utils import MissingFileError, UserError, cache_dir, look_up, progress, remove_leftovers, replacing
from .listing import EVAL_SPLITS, TRAIN_SPLITS, Listing, list_split
from .view import MAX_PIXELS, View, open_image, to_channels

_logger = logging.getLogger(__name__)

#: Raised with the layout of the cache file, or what decoding makes of an image; an older cache is built anew.
CACHE_VERSION = '2'
_TORCHVISION = {DATASETS['cifar10']['torchvision']: CIFAR10, DATASETS['cifar100']['torchvision']: CIFAR100}


@dataclass
class ImageData:
    """A split of a data set, decoded.

    Attributes:
        images: uint8, (N, H, W, C).
        targets: int64, (N,), indices into `classes`; of `soft_targets` float32, (N, classes).
        classes: class names, in order.
        view: how the images were brought to their size; None for images as they are.
    """

    images: torch.Tensor
    targets: torch.Tensor
    classes: list[str]
    view: View | None = None

    def __len__(self) -> int:
        return len(self.images)

    def seen_by(self, view: View) -> 'ImageData':
        """Bring images that are as they are to a model's size.

        Raises:
            UserError: they were brought to another one already.
        """
        if self.view == view:
            return self
        if self.view is not None:
            raise UserError(f'the images were read for {self.view}, and the model wants {view}; read them again for it')
        images = [view(_to_image(pixels)) for pixels in self.images.numpy()]
        return replace(self, images=torch.from_numpy(np.stack(images)), view=view)


def _to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0])


def load_images(
    root: str | Path,
    split: str,
    *,
    name: str = '',
    download: bool = False,
    view: View | None = None,
    classes: list[str] | None = None,
    hold_out: bool = True,
) -> ImageData:
    """Read one split of a data set into memory. What is passed over is said in one line.

    Args:
        root: a folder with a folder for each split, a tar of such a folder, or torchvision's root; or a folder or tar
            with the classes right in it.
        split: 'train', 'validation' or any of their usual synonyms ('test' is one of validation's).
        name: torchvision's name of a data set in `DATASETS`; '' for a folder or a tar.
        download: let torchvision download CIFAR into `root`.
        view: how the images are brought to a model's size. Default: as they are in RGB, which must be one size.
        classes: what the targets are indices into, where the split may hold a few of them only. Default: its own.
        hold_out: of a root with the classes right in it, about a fifth of each class is for evaluation alone and the
            rest for training alone, by the images' names; or else all of it is the split.

    Raises:
        MissingFileError: no `root`, or no such split in it.
        UserError: a class without images or beyond `classes`, an image that cannot be decoded, images of mixed size,
            an unknown `name`.
    """
    root = Path(os.path.expanduser(root))
    if name:
        data = _load_torchvision(name, root, split, download)
        data = data if view is None else data.seen_by(view)
    else:
        data = _load_cached(root, split, view, hold_out, _list_noting(root, split, hold_out))
    if classes is None:
        return data
    unknown = [c for c in data.classes if c not in classes]
    if unknown:
        raise UserError(
            f'{root}: {split} has classes that are not trained on: {", ".join(unknown[:5])}; take them out, or add them'
            f' to the training split'
        )
    index = torch.tensor([classes.index(c) for c in data.classes])
    return replace(data, targets=index[data.targets], classes=classes)


class ImageFiles(Dataset):
    """The images of a split of a folder or a tar, decoded one by one and as they are, for timm's own loader.

    Args:
        root: as in `load_images`, as is what it raises; an image that cannot be decoded is found when its turn comes.
        split: as in `load_images`.
        channels: 1 for grey images, 3 for RGB.
        class_to_idx: the classes to take and their numbers. Default: all, in order.

    Raises:
        UserError: a compressed tar, which can only be read from its start.
    """

    def __init__(
        self, root: str | Path, split: str, channels: int = 3, class_to_idx: Mapping[str, int] | None = None
    ) -> None:
        listing = _list_noting(Path(os.path.expanduser(root)), split)
        self.class_to_idx = class_to_idx or {name: i for i, name in enumerate(listing.classes)}
        self.images = [image for image in listing.images if image.class_name in self.class_to_idx]
        self.source = listing.source
        if self.source.is_compressed:
            raise UserError(f"{root}: timm's loader would decompress this tar anew for each image; unpack it first")
        self.channels = channels
        self.transform = None  # which the loader sets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        image = self.images[i]
        ((_, data),) = self.source.read([image])
        name = f'{self.source.path}: {image.name}'
        pixels = to_channels(open_image(data, name), self.channels, name)
        return self.transform(pixels) if self.transform else pixels, self.class_to_idx[image.class_name]


def _list_noting(root: Path, split: str, hold_out: bool = True) -> Listing:
    """Call `list_split`, and say in one line what is passed over."""
    listing = list_split(root, split, hold_out)
    for note in listing.notes:
        _logger.warning(note)
    return listing


def list_classes(root: str | Path, split: str = 'train') -> list[str]:
    """List the classes of a folder or a tar, in order; nothing is decoded.

    Raises:
        MissingFileError, UserError: as in `load_images`.
    """
    return list_split(root, split).classes


def _load_torchvision(name: str, root: Path, split: str, download: bool) -> ImageData:
    look_up('data set', name, _TORCHVISION, 'or give a folder')
    look_up('split', split, (*TRAIN_SPLITS, *EVAL_SPLITS), f'of {name}')
    try:
        # torchvision checks the MD5 of each of its files before it unpickles them
        data = _TORCHVISION[name](root, train=split in TRAIN_SPLITS, download=download)
    except (RuntimeError, OSError) as e:  # it is not there; no network, no disk
        call = f'torchvision.datasets.{_TORCHVISION[name].__name__}({str(root)!r}, download=True)'
        raise MissingFileError(
            f'{root}: {name} is not there or damaged ({e}); {call} fetches it where there is a network'
        ) from e
    return ImageData(torch.from_numpy(data.data), torch.tensor(data.targets), data.classes)


def _load_cached(root: Path, split: str, view: View | None, hold_out: bool, listing: Listing) -> ImageData:
    place = os.fsencode(root.resolve())  # a name need not be UTF-8
    key = hashlib.sha256(place + f'\n{split}\n{hold_out}\n{view}'.encode()).hexdigest()[:16]
    stem = root.resolve().stem[:40].encode(errors='replace').decode()
    path = cache_dir() / f'{stem}-{split}-{key}.safetensors'
    fingerprint = listing.fingerprint()
    data = _read_cache(path, fingerprint, view)
    if data is None:
        index = {name: i for i, name in enumerate(listing.classes)}
        targets = torch.tensor([index[image.class_name] for image in listing.images])
        data = ImageData(_decode(listing, view, str(root)), targets, listing.classes, view)
        _write_cache(path, fingerprint, data)
    return data


def _decode(listing: Listing, view: View | None, where: str) -> torch.Tensor:
    """Decode the images of `listing`, of which a bounded share is held beside the result."""

    def decode(item: tuple[int, Image.Image]) -> np.ndarray:
        i, image = item
        name = f'{where}: {listing.images[i].name}'
        return np.atleast_3d(to_channels(image, 3, name) if view is None else view(image, name))

    out = None
    with (
        ThreadPoolExecutor() as pool,
        progress(total=len(listing.images), desc=f'decoding {where}', unit='image') as bar,
    ):
        for chunk in _chunks(listing, view, where):
            for (i, _), image in zip(chunk, pool.map(decode, chunk), strict=True):
                if out is None:
                    first = i
                    out = np.empty((len(listing.images), *image.shape), np.uint8)
                elif image.shape != out.shape[1:]:
                    (h, w), (height, width) = out.shape[1:3], image.shape[:2]
                    first, other = (listing.images[j].name for j in (first, i))
                    raise UserError(
                        f'{where}: images of mixed size: {first} is {w}x{h}, {other} is {width}x{height}; name the'
                        " model's view, which resizes them"
                    )
                out[i] = image
            bar.update(len(chunk))
    return torch.from_numpy(out)


def _chunks(listing: Listing, view: View | None, where: str) -> Iterator[list[tuple[int, Image.Image]]]:
    """Open images until they would be too many, or too many pixels or bytes to decode and bring to size at a time."""
    chunk, pixels, size = [], 0, 0
    for i, blob in listing.source.read(listing.images):
        image = open_image(blob, f'{where}: {listing.images[i].name}')
        own = image.width * image.height if view is None else view.pixels(image)
        pixels, size = pixels + own, size + len(blob)
        if chunk and (len(chunk) == 1024 or pixels > MAX_PIXELS or size > MAX_PIXELS):
            yield chunk
            chunk, pixels, size = [], own, len(blob)
        chunk.append((i, image))
    yield chunk


def _digest(images: torch.Tensor, targets: torch.Tensor) -> str:
    digest = hashlib.sha256(images.numpy())
    digest.update(targets.numpy())
    return digest.hexdigest()


def _read_cache(path: Path, fingerprint: str, view: View | None) -> ImageData | None:
    """Return the cached data, or None where there is none to be trusted."""
    try:
        if not path.exists():
            return None
        with safe_open(path, 'pt') as f:
            meta = f.metadata() or {}
            if meta.get('version') != CACHE_VERSION or meta.get('fingerprint') != fingerprint:
                raise ValueError('the images or the format changed')
            images, targets = f.get_tensor('images'), f.get_tensor('targets')
        if _digest(images, targets) != meta['sha256']:
            raise ValueError('its checksum is wrong')
        return ImageData(images, targets, json.loads(meta['classes']), view)
    except Exception as e:  # a damaged header raises safetensors' own kinds
        _logger.warning(f'{path}: decoding again, {e}')
        return None


def _write_cache(path: Path, fingerprint: str, data: ImageData) -> None:
    meta = dict(
        version=CACHE_VERSION,
        fingerprint=fingerprint,
        classes=json.dumps(data.classes),
        sha256=_digest(data.images, data.targets),
    )
    try:
        with suppress(OSError):
            for left in path.parent.glob('.*.safetensors.*.tmp'):  # killed writers', of any data
                remove_leftovers(path.with_name(left.name[1:].rsplit('.', 2)[0]))
        with replacing(path) as temp:
            save_file(dict(images=data.images, targets=data.targets), temp, metadata=meta)
    except Exception as e:  # of any kind: it costs the next run a decoding, no more
        _logger.warning(f'{path}: not cached ({e}); TIMM_POOLATTN_CACHE names another folder')
