"""What decoding holds beside the data is bounded, and a path that cannot be is a mistake of the user's."""

import subprocess
import sys
import tarfile

import pytest
from PIL import Image

from timm_poolattn.data import View, load_images, read_image
from timm_poolattn.utils import MissingFileError, UserError

_PEAK = """
import resource, sys
from timm_poolattn.data import View, load_images
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load_images(sys.argv[1], 'train', view=View((3, 224, 224)))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.slow
@pytest.mark.parametrize('size, mode', [((1300, 1), 'L'), ((1, 1300), 'RGB'), ((8000, 8000), 'L')])
def test_memory_beside_the_data(tmp_path, size, mode):
    """Small and large files that are large once they are decoded, or on the way to their size."""
    folder = tmp_path / 'train' / 'cat'
    folder.mkdir(parents=True)
    for i in range(6):
        Image.new(mode, size).save(folder / f'{i}.png')
    peak = subprocess.run([sys.executable, '-c', _PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(peak.stdout) < 1024  # MiB


def test_pixels_on_the_way():
    view = View((3, 224, 224))
    assert view.pixels(Image.new('L', (1000, 1))) == 224 * 224_000
    assert view.pixels(Image.new('L', (1000, 500))) == 500_000
    assert View((3, 224, 224), crop_mode='squash').pixels(Image.new('L', (1000, 1))) == 224 * 224


def test_a_tar_cut_between_two_members(image_folder, tmp_path):
    """Nothing in what is left is damaged, but the end is missing."""
    path = tmp_path / 'pets.tar'
    with tarfile.open(path, 'w') as tar:
        tar.add(image_folder, arcname='.')
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1].offset
    path.write_bytes(path.read_bytes()[:last])
    with pytest.raises(UserError, match=r'pets.tar: cannot be read as a tar'):
        load_images(path, 'train')


@pytest.mark.parametrize('path', ['~nosuchuser/data', f'{"a" * 300}.png', 'a.png/b'])
def test_paths_that_cannot_be(path):
    with pytest.raises(MissingFileError, match='no such'):
        load_images(path, 'train')
    with pytest.raises(MissingFileError, match='no such file'):
        read_image(path)
