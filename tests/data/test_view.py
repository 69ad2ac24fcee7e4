"""The same image, however it is stored, is the same pixels."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from timm_poolattn.data import View, read_image
from timm_poolattn.data.view import open_image
from timm_poolattn.utils import MissingFileError, UserError

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOUR = np.stack([GREY, GREY.T, 255 - GREY], 2)


def png_header(width: int, height: int) -> bytes:
    chunk = b'IHDR' + struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + struct.pack('>I', 13) + chunk + struct.pack('>I', zlib.crc32(chunk)) + b'\0\0\0\0IDAT'


@pytest.mark.parametrize(
    'suffix, pixels',
    [
        ('png', GREY),
        ('png', GREY.astype(np.uint16) * 257),
        ('png', GREY.astype(np.uint16) << 8),
        ('pgm', GREY.astype(np.uint16) * 257),
        ('tif', GREY.astype(np.uint16) * 257),
        ('tif', GREY.astype('>u2') * 257),
        ('tif', (GREY / 255).astype(np.float32)),
    ],
)
def test_grey_of_any_depth(tmp_path, suffix, pixels):
    path = tmp_path / f'a.{suffix}'
    Image.fromarray(pixels).save(path)
    assert np.array_equal(read_image(path, 1), GREY)
    assert np.array_equal(read_image(path, 3), np.stack([GREY] * 3, 2))


def test_white_is_zero_in_16_bits(tmp_path):
    Image.fromarray((255 - GREY).astype(np.uint16) * 257).save(tmp_path / 'a.tif', tiffinfo={262: 0})
    assert np.array_equal(read_image(tmp_path / 'a.tif', 1), GREY)


@pytest.mark.parametrize(
    'pixels, reason',
    [
        (GREY.astype(np.float32), r'float values from 0 to 255; only \[0, 1\]'),
        (np.full((4, 4), np.nan, np.float32), 'float values from nan to nan'),
        (np.full((4, 4), -0.5, np.float32), 'float values from -0.5'),
        (GREY.astype(np.int32), '32-bit integers'),
    ],
)
def test_values_without_a_range_are_refused(tmp_path, pixels, reason):
    Image.fromarray(pixels).save(tmp_path / 'a.tif')
    with pytest.raises(UserError, match=rf'a\.tif: {reason}'):
        read_image(tmp_path / 'a.tif')


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'RGBA', 'LA', 'RGB', 'CMYK', 'YCbCr', 'LAB'])
def test_modes_are_pillows(tmp_path, mode):
    image = Image.fromarray(COLOUR).convert(mode) if mode != 'LAB' else Image.new('LAB', (16, 16), (50, 10, 20))
    path = tmp_path / ('a.tif' if mode in ('CMYK', 'YCbCr', 'LAB') else 'a.png')
    image.save(path, compression='tiff_lzw' if mode == 'YCbCr' else None)  # Pillow 12.3 cannot read its own raw ones
    assert np.array_equal(read_image(path), Image.open(path).convert('RGB'))


def test_alpha_is_dropped(tmp_path):
    Image.fromarray(np.dstack([COLOUR, np.zeros_like(GREY)])).save(tmp_path / 'a.png')
    assert np.array_equal(read_image(tmp_path / 'a.png'), COLOUR)


@pytest.mark.filterwarnings('error')
def test_transparency_of_a_palette_is_dropped(tmp_path):
    image = Image.fromarray(COLOUR).quantize(16)
    image.save(tmp_path / 'a.png', transparency=bytes(range(16)))
    assert np.array_equal(read_image(tmp_path / 'a.png'), image.convert('RGB'))


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'tif'])
@pytest.mark.parametrize('depth', [8, 16])
def test_upright(tmp_path, suffix, depth):
    if suffix == 'jpg' and depth == 16:
        return
    exif = Image.Exif()
    exif[274] = 6
    tall = np.repeat(np.repeat(GREY[:2], 8, 0), 8, 1)  # blocks of one colour, which JPEG keeps
    pixels = tall if depth == 8 else tall.astype(np.uint16) * 257
    Image.fromarray(pixels).save(tmp_path / f'a.{suffix}', exif=exif)
    assert np.abs(np.asarray(read_image(tmp_path / f'a.{suffix}', 1), int) - np.rot90(tall, -1)).max() <= 1


def test_first_of_several_frames(tmp_path):
    frames = [Image.fromarray(COLOUR).quantize(), Image.new('P', (16, 16))]
    frames[0].save(tmp_path / 'a.gif', save_all=True, append_images=frames[1:])
    assert np.array_equal(read_image(tmp_path / 'a.gif'), frames[0].convert('RGB'))


@pytest.mark.parametrize('size', [(100, 40), (17, 90), (33, 46), (32, 32), (1, 1), (300, 45)])
@pytest.mark.parametrize('crop_mode', ['center', 'squash', 'border'])
@pytest.mark.parametrize('crop_pct, input_size', [(1.0, (3, 32, 32)), (0.95, (3, 32, 32)), (0.9, (3, 24, 40))])
def test_view_is_timms_evaluation(size, crop_mode, crop_pct, input_size):
    image = Image.fromarray(COLOUR).resize(size)
    config = dict(input_size=input_size, crop_pct=crop_pct, crop_mode=crop_mode, interpolation='bicubic')
    config.update(mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.2))
    expected = create_transform(**config)(image)
    pixels = torch.from_numpy(View.of(config)(image)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(config[k]).view(3, 1, 1) for k in ('mean', 'std'))
    assert pixels.sub(mean).div(std).equal(expected)


def test_what_timm_would_take_for_the_default_is_refused():
    for key, value in (('crop_mode', 'boarder'), ('interpolation', 'cubic')):
        with pytest.raises(UserError, match=f'unknown {key} {value!r}; '):
            View((3, 32, 32), **{key: value})


def test_bounds(tmp_path):
    """What would take gigabytes is refused by the header alone, or before it is resized."""
    for width, height in [(12_000, 12_000), (60_000, 60_000), (2**31 - 1, 1)]:
        (tmp_path / 'bomb.png').write_bytes(png_header(width, height))
        with pytest.raises(UserError, match=r'bomb\.png: .*more than 67,108,864 pixels'):
            read_image(tmp_path / 'bomb.png')
    Image.new('RGB', (60_000, 1)).save(tmp_path / 'thin.png')
    with pytest.raises(UserError, match=r'thin\.png: 60000x1 pixels are too elongated'):
        View((3, 224, 224))(open_image(tmp_path / 'thin.png'), 'thin.png')
    with open(tmp_path / 'large.png', 'wb') as f:
        f.truncate(2**33)  # sparse
    with pytest.raises(UserError, match=r'large\.png: more than 256 MiB'):
        read_image(tmp_path / 'large.png')


def test_errors(tmp_path):
    with pytest.raises(MissingFileError, match=r'nowhere\.png: no such file'):
        read_image(tmp_path / 'nowhere.png')
    with pytest.raises(UserError, match='not a file'):
        read_image(tmp_path)
    (tmp_path / 'a.png').write_text('text')
    with pytest.raises(UserError, match=r'a\.png cannot be decoded as an image \(no format that Pillow knows\)'):
        read_image(tmp_path / 'a.png')
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / 'b.png')
    (tmp_path / 'b.png').write_bytes((tmp_path / 'b.png').read_bytes()[:3000])
    with pytest.raises(UserError, match=r'b\.png cannot be decoded as an image \(.*truncated'):
        read_image(tmp_path / 'b.png')
    Image.new('RGB', (8, 8)).save(tmp_path / 'c.eps')
    with pytest.raises(UserError, match=r'c\.eps: an EPS file is a program'):
        read_image(tmp_path / 'c.eps')
    with pytest.raises(UserError, match='wants 4 channels'):
        View((4, 8, 8))(Image.new('RGB', (8, 8)))
