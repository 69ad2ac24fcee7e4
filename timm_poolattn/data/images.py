"""Where images come from: torchvision's CIFAR folders, a folder of images by class, a tar of the same.

All of them become one `ImageData` in memory. Decoding a folder or a tar happens once, into a cache.
"""

import hashlib
import io
import json
import logging
import os
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from timm.data.readers.img_extensions import get_img_extensions
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, resize
from tqdm import tqdm

from ..utils import cache_dir

_logger = logging.getLogger(__name__)

#: Raised with the layout of the cache file; a cache of another version is built anew.
CACHE_VERSION = '1'
_TORCHVISION = {'torch/cifar10': CIFAR10, 'torch/cifar100': CIFAR100}
_TRAIN_SPLITS = ('train', 'training')
_EVAL_SPLITS = ('validation', 'val', 'valid', 'eval', 'evaluation', 'test')


@dataclass
class ImageData:
    """A split of a data set, decoded.

    Attributes:
        images: uint8, (N, H, W, C).
        targets: int64, (N,), indices into `classes`.
        classes: class names, in order.
    """

    images: torch.Tensor
    targets: torch.Tensor
    classes: list[str]

    def __len__(self) -> int:
        return len(self.images)


@dataclass
class _Listing:
    """The images of a split as (name, class, size, mtime in ns), in the order in which they are numbered."""

    classes: list[str]
    files: list[tuple[str, str, int, int]]

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([self.classes, self.files]).encode()).hexdigest()


def load_images(
    root: str | Path,
    split: str,
    *,
    name: str = '',
    download: bool = False,
    img_mode: str = 'RGB',
    size: int | None = None,
    classes: list[str] | None = None,
) -> ImageData:
    """Read one split of a data set into memory.

    Args:
        root: a folder with a folder for each split, a tar of such a folder, or torchvision's root. Of a folder with
            the classes right in it, a fifth of each class is held out for evaluation.
        split: 'train', 'validation' or any of their usual synonyms ('test' is one of validation's).
        name: 'torch/cifar10' or 'torch/cifar100' for torchvision's CIFAR files; '' for a folder or a tar.
        download: let torchvision download CIFAR into `root`.
        img_mode: PIL's mode to decode to, 'RGB' or 'L'. Default: 'RGB'.
        size: resize images that are not size x size: the shorter side to `size`, then the square at the centre, as
            timm's evaluation does. Default: as they are, which must be one size.
        classes: what the targets are indices into, where the split may hold a few of them only. Default: its own.

    Raises:
        FileNotFoundError: no `root`, or no such split in it.
        ValueError: a class without images or beyond `classes`, an image that cannot be decoded, images of mixed size,
            an unknown `name`.
    """
    data = _load(Path(root).expanduser(), split, name, download, img_mode, size)
    if classes is None:
        return data
    unknown = [c for c in data.classes if c not in classes]
    if unknown:
        raise ValueError(f'{root}: {split} has classes that are not trained on: {", ".join(unknown[:5])}')
    index = torch.tensor([classes.index(c) for c in data.classes])
    return ImageData(data.images, index[data.targets], classes)


def _load(root: Path, split: str, name: str, download: bool, img_mode: str, size: int | None) -> ImageData:
    if name:
        return _load_torchvision(name, root, split, download, img_mode)
    if root.is_dir():
        listing, base = _list_folder(root, split)
        read = lambda: ((i, (base / name).read_bytes()) for i, (name, *_) in enumerate(listing.files))  # noqa: E731
        return _load_cached(base, split, img_mode, size, listing, read)
    with _open_tar(root) as tar:
        members = {m.name: m for m in tar if m.isfile()}
        listing = _list_tar(root, members, split)
        # in the archive's order, for a compressed one can only be read forwards
        order = sorted(enumerate(members[name] for name, *_ in listing.files), key=lambda item: item[1].offset)
        read = lambda: ((i, tar.extractfile(member).read()) for i, member in order)  # noqa: E731
        return _load_cached(root, split, img_mode, size, listing, read)


def list_classes(root: str | Path, split: str = 'train') -> list[str]:
    """The classes of a folder or a tar, in order; nothing is decoded.

    Args:
        root: as in `load_images`.
        split: as in `load_images`. Default: 'train'.

    Raises:
        FileNotFoundError, ValueError: as in `load_images`.
    """
    root = Path(root).expanduser()
    if root.is_dir():
        return _list_folder(root, split)[0].classes
    with _open_tar(root) as tar:
        return _list_tar(root, {m.name: m for m in tar if m.isfile()}, split).classes


def _open_tar(root: Path) -> tarfile.TarFile:
    if not root.exists():
        raise FileNotFoundError(f'{root}: no such folder or tar file')
    if not tarfile.is_tarfile(root):
        raise ValueError(f'{root}: neither a folder nor a tar file')
    return tarfile.open(root)


def _load_torchvision(name: str, root: Path, split: str, download: bool, img_mode: str) -> ImageData:
    if name not in _TORCHVISION:
        raise ValueError(f'unknown data set {name!r}; choose from {", ".join(_TORCHVISION)}, or give a folder')
    if img_mode != 'RGB':
        raise ValueError(f'{name} is read as RGB only, not {img_mode!r}; for other modes use a folder of its images')
    try:
        # torchvision checks the MD5 of each of its files before it unpickles them
        data = _TORCHVISION[name](root, train=split in _TRAIN_SPLITS, download=download)
    except RuntimeError as e:
        raise FileNotFoundError(f'{root}: {name} is not there or damaged ({e}); --dataset-download fetches it') from e
    return ImageData(torch.from_numpy(data.data), torch.tensor(data.targets), data.classes)


def _match_split(split: str, present: Iterable[str], where: Path) -> str:
    present = sorted(present)
    synonyms = next((s for s in (_TRAIN_SPLITS, _EVAL_SPLITS) if split in s), ())
    for candidate in (split, *synonyms):
        if candidate in present:
            return candidate
    raise FileNotFoundError(
        f'{where}: no split {split!r}; it holds {", ".join(present) or "no folders"}.'
        f' A data set is a folder (or tar) of splits such as train/ and test/, each with one folder for each class'
    )


def _check_classes(classes: set[str], files: list[tuple[str, str, int, int]], where: str) -> _Listing:
    empty = classes - {f[1] for f in files}
    if empty or not classes:
        raise ValueError(f'{where}: no images in {", ".join(sorted(empty)) or "it"}; remove or fill the class folder')
    return _Listing(sorted(classes), sorted(files))


def _list_folder(root: Path, split: str) -> tuple[_Listing, Path]:
    folders = [p for p in root.iterdir() if p.is_dir() and not p.name.startswith('.')]
    extensions = get_img_extensions(as_set=True)
    splits = {*_TRAIN_SPLITS, *_EVAL_SPLITS}
    hold_out = split in splits and not splits & {p.name for p in folders}
    hold_out = hold_out and any(p.suffix.lower() in extensions for folder in folders for p in folder.iterdir())
    base = root if hold_out else root / _match_split(split, (p.name for p in folders), root)
    classes = {p.name for p in base.iterdir() if p.is_dir() and not p.name.startswith('.')}
    files = []
    for class_name in classes:
        for folder, _, names in os.walk(base / class_name, followlinks=True):
            for file_name in names:
                path = Path(folder, file_name)
                if path.suffix.lower() in extensions:
                    stat = path.stat()
                    files.append((path.relative_to(base).as_posix(), class_name, stat.st_size, stat.st_mtime_ns))
    if hold_out:
        files = _hold_out(files, split in _TRAIN_SPLITS, base)
    return _check_classes(classes, files, str(base)), base


def _hold_out(files: list[tuple[str, str, int, int]], training: bool, where: Path) -> list[tuple[str, str, int, int]]:
    """Every fifth image of each class for evaluation, at least one, the others for training.

    They are taken in the order of their names' hashes, so that it does not depend on how the names are sorted.
    """
    kept = []
    for class_name in sorted({f[1] for f in files}):
        mine = sorted((f for f in files if f[1] == class_name), key=lambda f: hashlib.sha256(f[0].encode()).digest())
        if len(mine) < 2:
            raise ValueError(f'{where}: {class_name} has one image; one to train on and one to evaluate are the least')
        count = max(1, len(mine) // 5)
        kept += mine[count:] if training else mine[:count]
    return kept


def _list_tar(root: Path, members: dict[str, tarfile.TarInfo], split: str) -> _Listing:
    # .../<split>/<class>/<image>: members are read in place and never extracted, so their paths cannot do harm
    extensions = get_img_extensions(as_set=True)
    parts = {n: n.split('/') for n in members if os.path.splitext(n)[1].lower() in extensions and n.count('/') >= 2}
    split = _match_split(split, {p[-3] for p in parts.values()}, root)
    mtime = root.stat().st_mtime_ns
    files = [(n, p[-2], members[n].size, mtime) for n, p in parts.items() if p[-3] == split]
    return _check_classes({f[1] for f in files}, files, f'{root}: {split}')


def _load_cached(base: Path, split: str, img_mode: str, size: int | None, listing: _Listing, read) -> ImageData:
    key = hashlib.sha256(f'{base.resolve()}\n{split}\n{img_mode}\n{size}'.encode()).hexdigest()[:16]
    path = cache_dir() / f'{base.stem}-{split}-{key}.safetensors'
    fingerprint = listing.fingerprint()
    data = _read_cache(path, fingerprint)
    if data is None:
        images = _decode(read(), listing, img_mode, size, str(base))
        index = {name: i for i, name in enumerate(listing.classes)}
        data = ImageData(images, torch.tensor([index[f[1]] for f in listing.files]), listing.classes)
        _write_cache(path, fingerprint, data)
    return data


def _decode(
    blobs: Iterator[tuple[int, bytes]], listing: _Listing, img_mode: str, size: int | None, where: str
) -> torch.Tensor:
    """Images from the bytes of each file, which come with its index in `listing`."""

    def decode(item: tuple[int, bytes]) -> np.ndarray:
        i, blob = item
        try:
            with Image.open(io.BytesIO(blob)) as image:
                if size:
                    image = ImageOps.exif_transpose(image)
                image = image.convert(img_mode)
                if size:
                    image = center_crop(resize(image, size, InterpolationMode.BICUBIC), [size, size])
                return np.asarray(image)
        except Exception as e:  # PIL raises a dozen kinds
            name = listing.files[i][0]
            raise ValueError(f'{where}: {name} cannot be decoded as an image ({e}); repair or remove it') from e

    out = None
    chunks = iter(lambda: list(islice(blobs, 1024)), [])
    with (
        ThreadPoolExecutor() as pool,
        tqdm(total=len(listing.files), desc=f'decoding {where}', unit='image', delay=1) as progress,
    ):
        for chunk in chunks:
            for (i, _), image in zip(chunk, pool.map(decode, chunk), strict=True):
                name = listing.files[i][0]
                if out is None:
                    first, shape = name, image.shape
                    out = np.empty((len(listing.files), *shape), np.uint8)
                elif image.shape != shape:
                    raise ValueError(
                        f'{where}: images of mixed size: {first} is {shape[1]}x{shape[0]}, {name} is'
                        f' {image.shape[1]}x{image.shape[0]}; --img-size resizes them to one'
                    )
                out[i] = image
            progress.update(len(chunk))
    out = torch.from_numpy(out)
    return out if out.ndim == 4 else out.unsqueeze(-1)


def _digest(images: torch.Tensor, targets: torch.Tensor) -> str:
    return hashlib.sha256(images.numpy().tobytes() + targets.numpy().tobytes()).hexdigest()


def _read_cache(path: Path, fingerprint: str) -> ImageData | None:
    """The cached data, or None where there is none to be trusted."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, 'pt') as f:
            meta = f.metadata() or {}
            if meta.get('version') != CACHE_VERSION or meta.get('fingerprint') != fingerprint:
                raise ValueError('the images or the format changed')
            images, targets = f.get_tensor('images'), f.get_tensor('targets')
        if _digest(images, targets) != meta['sha256']:
            raise ValueError('its checksum is wrong')
        return ImageData(images, targets, json.loads(meta['classes']))
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
    temp = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temp = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix='.tmp')
        os.close(handle)
        save_file(dict(images=data.images, targets=data.targets), temp, metadata=meta)
        os.replace(temp, path)
    except OSError as e:  # a full or read-only disk costs the next run a decoding, no more
        _logger.warning(f'{path}: not cached ({e}); TIMM_POOLATTN_CACHE names another folder')
    finally:
        if temp and os.path.exists(temp):
            os.unlink(temp)
