"""How a file becomes the pixels that a model sees: one way, for training, evaluation, prediction and explanation."""

import io
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import create_transform, resolve_data_config
from torch import nn

from ..utils import MissingFileError, UserError, look_up

#: timm's names of ways to resize.
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
#: timm's names of ways to crop in evaluation.
CROP_MODES = ('center', 'squash', 'border')
#: The largest image that is decoded or resized to, in pixels, and the largest file. They bound the decoder's memory.
MAX_PIXELS = 2**26
MAX_BYTES = 2**28
_WARNINGS = threading.Lock()  # catch_warnings is not for threads
_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262


@dataclass(frozen=True)
class View:
    """Bring an image to a model's size, as timm's evaluation does.

    Args:
        input_size: (C, H, W) of the model.
        crop_pct: share of the resized image's side that the crop keeps.
        crop_mode: one of `CROP_MODES`.
        interpolation: of the resizing, one of `INTERPOLATIONS`.
        mean: colour of 'border', in [0, 1].
    """

    input_size: tuple[int, int, int]
    crop_pct: float = 1.0
    crop_mode: str = 'center'
    interpolation: str = 'bicubic'
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        """Refuse what no image can be brought to.

        Raises:
            UserError: one of them.
        """
        if len(self.input_size) != 3 or not all(type(n) is int and n > 0 for n in self.input_size):
            raise UserError(f'input_size is {self.input_size}, and must be channels, height and width')
        if not (isinstance(self.crop_pct, int | float) and 0 < self.crop_pct <= 1):
            raise UserError(f'crop_pct is {self.crop_pct!r}, and must be over 0 and at most 1')
        if (side := max(self.input_size[1:]) / self.crop_pct) ** 2 > MAX_PIXELS:
            raise UserError(f'images would be resized to {side:.0f}x{side:.0f}; {MAX_PIXELS:,} pixels are the most')
        look_up('interpolation', str(self.interpolation), INTERPOLATIONS)
        look_up('crop_mode', str(self.crop_mode), CROP_MODES)  # timm takes any other for 'center'

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> 'View':
        """Take the view from what timm's `resolve_data_config` returns."""
        mean = dict(mean=tuple(config['mean'])) if config['crop_mode'] == 'border' else {}
        how = {k: config[k] for k in ('crop_pct', 'crop_mode', 'interpolation')}
        return cls(tuple(config['input_size']), **how, **mean)

    def __call__(self, image: Image.Image, name: str = 'image') -> np.ndarray:
        """Return `image`, of any size and mode, as (H, W, C) uint8.

        Raises:
            UserError: `name` cannot be decoded, or is so elongated that it would be resized to over `MAX_PIXELS`.
        """
        if self.pixels(image) > MAX_PIXELS:
            size = f'{image.width}x{image.height}'
            raise UserError(f'{name}: {size} pixels are too elongated to be resized for a model; crop the image')
        return self._transform(to_channels(image, self.input_size[0], name)).permute(1, 2, 0).numpy()

    def pixels(self, image: Image.Image) -> float:
        """Return the most pixels that bringing `image` to size holds: its own, or those of what it is resized to."""
        side = max(self.input_size[1:]) / self.crop_pct
        longer = max(image.size) / min(image.size) if self.crop_mode == 'center' else 1
        return max(image.width * image.height, side**2 * longer)

    @cached_property
    def _transform(self) -> Callable[[Image.Image], torch.Tensor]:
        return create_transform(
            self.input_size,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            interpolation=self.interpolation,
            mean=self.mean,
            normalize=False,
        )


def open_image(file: str | Path | bytes, name: str = '') -> Image.Image:
    """Read the header of an image file of any size and mode; its pixels are decoded when they are asked for.

    Args:
        file: a path, or the bytes of a file.
        name: for messages. Default: the path.

    Raises:
        MissingFileError: no such file.
        UserError: a file that is no image, or of more than `MAX_BYTES` or `MAX_PIXELS`.
    """
    name = name or str(file)
    if not isinstance(file, bytes):
        file = _read_bytes(Path(file))
    try:
        with _WARNINGS, warnings.catch_warnings():
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # the limit below is less
            image = Image.open(io.BytesIO(file))
    except Image.DecompressionBombError as e:
        raise UserError(f'{name}: more than {MAX_PIXELS:,} pixels; make the image smaller') from e
    except Exception as e:  # Pillow raises a dozen kinds
        raise _undecodable(name, e) from e
    if image.format == 'EPS':
        raise UserError(f'{name}: an EPS file is a program, which Ghostscript would run; save it as PNG')
    if image.width * image.height > MAX_PIXELS:
        size = f'{image.width}x{image.height}'
        raise UserError(f'{name}: {size} are more than {MAX_PIXELS:,} pixels; make the image smaller')
    return image


def _read_bytes(path: Path) -> bytes:
    if not os.path.exists(path):  # also of a name that is too long, or in a folder that may not be read
        raise MissingFileError(f'{path}: no such file')
    if not path.is_file():
        raise UserError(f'{path}: not a file; name an image')
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f'{path}: more than {MAX_BYTES >> 20} MiB; make the image smaller')
    try:
        return path.read_bytes()
    except OSError as e:
        raise UserError(f'{path}: cannot be read ({e.strerror})') from e


def _undecodable(name: str, e: Exception) -> UserError:
    reason = 'no format that Pillow knows' if isinstance(e, UnidentifiedImageError) else ' '.join(str(e).split())[:200]
    return UserError(f'{name} cannot be decoded as an image ({reason}); repair or remove it')


def read_image(path: str | Path, channels: int = 3) -> Image.Image:
    """Decode an image file of any size and mode, as `to_channels` says.

    Raises:
        MissingFileError, UserError: as `open_image` and `to_channels`.
    """
    return to_channels(open_image(path), channels, str(path))


def to_channels(image: Image.Image, channels: int, name: str = 'image') -> Image.Image:
    """Return an image upright, in 8-bit grey for one channel and in RGB for three.

    Of 16 bits the upper eight are kept. Floats in [0, 1] are scaled. Alpha is dropped, as timm does: a transparent
    pixel shows its colour. Of several frames the first is taken.

    Raises:
        UserError: `name` cannot be decoded, has values whose range is not known, or `channels` are others.
    """
    if channels not in (1, 3):
        raise UserError(f'the model wants {channels} channels; images are read as 1 (grey) or 3 (RGB)')
    mode = 'L' if channels == 1 else 'RGB'
    try:
        upright = _to_8_bits(ImageOps.exif_transpose(image), image.format, getattr(image, 'tag_v2', {}))
        upright.info.pop('transparency', None)  # which Pillow warns of
        return upright if upright.mode == mode else upright.convert(mode)
    except UserError as e:
        raise UserError(f'{name}: {e}') from e
    except Exception as e:  # Pillow raises a dozen kinds
        raise _undecodable(name, e) from e


def _to_8_bits(image: Image.Image, file_format: str | None, tiff: Mapping[int, Any]) -> Image.Image:
    """Scale the modes that Pillow's `convert` clips."""
    if image.mode.startswith('I;16') or (image.mode == 'I' and file_format in ('PNG', 'PPM')):
        pixels = np.asarray(image) >> (tiff.get(_TIFF_BITS, (16,))[0] - 8)
        if tiff.get(_TIFF_PHOTOMETRIC) == 0:  # white is zero, which Pillow sees to in 8 bits alone
            pixels = 255 - pixels
    elif image.mode == 'F':
        pixels = np.array(image)
        low, high = pixels.min(), pixels.max()
        if not (low >= 0 and high <= 1):  # or NaN
            raise UserError(f'float values from {low:g} to {high:g}; only [0, 1] has a known range, save it in 8 bits')
        pixels *= 255
        np.rint(pixels, out=pixels)
    elif image.mode == 'I':
        raise UserError('32-bit integers, whose range is not known; save it in 8 or 16 bits')
    else:
        return image
    return Image.fromarray(pixels.astype(np.uint8))


def evaluation_config(model: nn.Module) -> dict[str, Any]:
    """Return how `model` is given images, in timm's names: with its size for tests, where it has one.

    A model that was created with other `in_chans` than its weights' has their mean and std averaged.
    """
    config = resolve_data_config(model=model, use_test_size=True)  # as timm's validate.py
    channels, *size = config['input_size']
    if (own := getattr(model, 'in_chans', channels)) != channels:
        config['input_size'] = (own, *size)
        config.update({key: (fmean(config[key]),) * own for key in ('mean', 'std')})
    return config
