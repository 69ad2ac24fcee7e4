import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from timm_poolattn.data import ImageFiles, View, load_images
from timm_poolattn.data import images as source
from timm_poolattn.utils import UserError, cache_dir


def tar_of(folder, path, mode='w', prefix=''):
    with tarfile.open(path, mode) as tar:
        tar.add(folder, arcname=prefix or '.')
    return path


def cache_files():
    return sorted(cache_dir().glob('*')) if cache_dir().exists() else []


def test_folder(image_folder):
    data = load_images(image_folder, 'train')
    assert data.images.shape == (16, 32, 32, 3) and data.images.dtype == torch.uint8
    assert data.classes == ['cat', 'dog'] and data.targets.tolist() == [0] * 8 + [1] * 8
    path = image_folder / 'train' / 'dog' / '0.png'
    assert np.array_equal(data.images[8].numpy(), np.asarray(Image.open(path)))


@pytest.mark.parametrize('split', ['test', 'validation', 'val', 'eval'])
def test_evaluation_synonyms(image_folder, split):
    assert len(load_images(image_folder, split)) == 8


@pytest.mark.parametrize('mode, prefix', [('w', ''), ('w:gz', 'pets'), ('w', 'a/b')])
def test_tar_is_the_same_as_its_folder(image_folder, tmp_path, mode, prefix):
    folder = load_images(image_folder, 'train')
    tar = load_images(tar_of(image_folder, tmp_path / 'pets.tar', mode, prefix), 'train')
    assert tar.images.equal(folder.images) and tar.targets.equal(folder.targets) and tar.classes == folder.classes


def test_one_by_one_for_timms_loader(image_folder, tmp_path):
    """The same images and targets as all at once: of a folder, of a tar, and of one that is held out from."""
    for root in (image_folder, tar_of(image_folder, tmp_path / 'pets.tar'), image_folder / 'train'):
        for split in ('train', 'validation'):
            files, data = ImageFiles(root, split), load_images(root, split)
            assert len(files) == len(data) and [target for _, target in files] == data.targets.tolist()
            assert np.array_equal([np.asarray(pixels) for pixels, _ in files], data.images)
    dogs = ImageFiles(image_folder, 'test', channels=1, class_to_idx={'dog': 7})
    assert len(dogs) == 4 and dogs[0][0].mode == 'L' and dogs[0][1] == 7
    for mode in ('w:gz', 'w:bz2', 'w:xz'):
        with pytest.raises(UserError, match='decompress this tar anew for each image; unpack it first'):
            ImageFiles(tar_of(image_folder, tmp_path / 'pets.tar.z', mode), 'train')


def test_real_images(cifar10_mini):
    data = load_images(cifar10_mini, 'train')
    assert data.images.shape == (2000, 32, 32, 3) and data.targets.bincount().tolist() == [200] * 10
    assert data.classes[3] == 'cat' and data.classes[-1] == 'truck'
    # CIFAR-10's statistics, which the models' default configs hold
    assert data.images.float().mean((0, 1, 2)).div(255).tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.02)


def test_grayscale(image_folder):
    data = load_images(image_folder, 'train', view=View((1, 32, 32)))
    assert data.images.shape == (16, 32, 32, 1)


def test_torchvision_cifar(tmp_path, monkeypatch):
    """torchvision's own files of CIFAR-10, small; its checksums are of the full ones."""
    base = tmp_path / 'cifar-10-batches-py'
    base.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), np.uint8)
    for name in [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch']:
        (base / name).write_bytes(pickle.dumps({'data': pixels, 'labels': [3, 1, 4, 1]}))
    names = [*'abcdefghij']
    (base / 'batches.meta').write_bytes(pickle.dumps({'label_names': names}))
    with pytest.raises(FileNotFoundError, match=r'torch/cifar10 is not there or damaged.*CIFAR10\(.*, download=True\)'):
        load_images(tmp_path, 'train', name='torch/cifar10')
    for files in ('train_list', 'test_list'):
        monkeypatch.setattr(CIFAR10, files, [[name, None] for name, _ in getattr(CIFAR10, files)])
    monkeypatch.setattr(CIFAR10, 'meta', dict(CIFAR10.meta, md5=None))
    data = load_images(tmp_path, 'train', name='torch/cifar10')
    assert data.images.shape == (20, 32, 32, 3) and data.classes == names
    assert np.array_equal(data.images[0].numpy(), pixels[0].reshape(3, 32, 32).transpose(1, 2, 0))
    assert load_images(tmp_path, 'test', name='torch/cifar10').targets.tolist() == [3, 1, 4, 1]
    with pytest.raises(UserError, match="unknown split 'trian'; "):
        load_images(tmp_path, 'trian', name='torch/cifar10')


def test_errors(image_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere: no such folder or tar file'):
        load_images(tmp_path / 'nowhere', 'train')
    with pytest.raises(FileNotFoundError, match="no split 'holdout'; it holds test, train"):
        load_images(image_folder, 'holdout')
    with pytest.raises(UserError, match="unknown data set 'torch/mnist'"):
        load_images(image_folder, 'train', name='torch/mnist')
    (tmp_path / 'a.txt').write_text('no tar')
    with pytest.raises(UserError, match='neither a folder nor a tar file'):
        load_images(tmp_path / 'a.txt', 'train')
    (image_folder / 'train' / 'bird').mkdir()
    with pytest.raises(UserError, match=r'no images .* in bird'):
        load_images(image_folder, 'train')
    assert not cache_files()


@pytest.mark.parametrize('as_tar', [False, True])
def test_a_broken_image_is_named(image_folder, tmp_path, as_tar):
    (image_folder / 'train' / 'dog' / '3.png').write_bytes(b'not a PNG')
    root = tar_of(image_folder, tmp_path / 'pets.tar') if as_tar else image_folder
    with pytest.raises(UserError, match=r'dog/3.png cannot be decoded as an image'):
        load_images(root, 'train')
    assert not cache_files()


def test_a_truncated_image_is_named(image_folder):
    path = image_folder / 'train' / 'dog' / '3.png'
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r'dog/3.png cannot be decoded'):
        load_images(image_folder, 'train')


def test_resizing_is_timms_evaluation(image_folder):
    """Photos of any size and mode become what timm's own transform for evaluation makes of them."""
    from timm.data import create_transform

    folder = image_folder / 'train' / 'dog'
    noise = Image.open(folder / '0.png')
    for i, size in enumerate([(100, 40), (17, 90), (32, 33), (1, 1)]):
        noise.resize(size).convert('L' if i == 1 else 'RGB').save(folder / f'{i}.png')
    data = load_images(image_folder, 'train', view=View((3, 24, 24)))
    assert data.images.shape == (16, 24, 24, 3)
    transform = create_transform((3, 24, 24), crop_pct=1.0, interpolation='bicubic', mean=(0,) * 3, std=(1,) * 3)
    for i in range(4):
        expected = transform(Image.open(folder / f'{i}.png').convert('RGB')).mul(255).round().to(torch.uint8)
        assert data.images[8 + i].permute(2, 0, 1).equal(expected)
    same = load_images(image_folder, 'test', view=View((3, 32, 32)))
    assert same.images.equal(load_images(image_folder, 'test').images)


def test_classes_of_another_split(image_folder):
    shutil.rmtree(image_folder / 'test' / 'cat')
    assert load_images(image_folder, 'test').targets.tolist() == [0] * 4
    data = load_images(image_folder, 'test', classes=['cat', 'dog'])
    assert data.targets.tolist() == [1] * 4 and data.classes == ['cat', 'dog']
    with pytest.raises(UserError, match='test has classes that are not trained on: dog'):
        load_images(image_folder, 'test', classes=['cat'])


def test_mixed_sizes_are_named(image_folder):
    Image.new('RGB', (40, 32)).save(image_folder / 'train' / 'dog' / '3.png')
    with pytest.raises(UserError, match=r'mixed size: cat/0.png is 32x32, dog/3.png is 40x32'):
        load_images(image_folder, 'train')
    assert not cache_files()


def test_images_as_they_are_get_a_models_size_once(image_folder):
    view = View((3, 24, 24), crop_pct=0.9)
    read = load_images(image_folder, 'test', view=view)
    assert load_images(image_folder, 'test').seen_by(view).images.equal(read.images)
    assert read.seen_by(view) is read
    with pytest.raises(UserError, match='were read for'):
        read.seen_by(View((3, 32, 32)))


@pytest.mark.slow
def test_memory_beside_the_data_is_bounded(tmp_path):
    """100 photos of 4 megapixels are 1.6 GB as Pillow holds them; under 1 GB is held at a time."""
    resource = pytest.importorskip('resource')
    folder = tmp_path / 'photos' / 'train' / 'sky'
    folder.mkdir(parents=True)
    Image.new('RGB', (2000, 2000), (40, 90, 200)).save(folder / '0.png')
    for i in range(1, 100):
        os.link(folder / '0.png', folder / f'{i}.png')
    code = f"""
import resource
from timm_poolattn.data import View, load_images
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(load_images({str(tmp_path / 'photos')!r}, 'train', view=View((3, 32, 32))).images.shape)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    shape, grown = run.stdout.splitlines()
    assert shape == 'torch.Size([100, 32, 32, 3])'
    assert int(grown) * (1 if sys.platform == 'darwin' else 1024) < 2**30 and resource


class TestCache:
    def load_counting(self, root, monkeypatch):
        decoded = []
        open_image = source.open_image
        monkeypatch.setattr(source, 'open_image', lambda *args: decoded.append(1) or open_image(*args))
        data = load_images(root, 'train')
        monkeypatch.setattr(source, 'open_image', open_image)
        return data, bool(decoded)

    def test_decodes_once(self, image_folder, monkeypatch):
        first, decoded = self.load_counting(image_folder, monkeypatch)
        assert decoded
        second, decoded = self.load_counting(image_folder, monkeypatch)
        assert not decoded and second.images.equal(first.images) and second.classes == first.classes
        assert [p.suffix for p in cache_files()] == ['.safetensors']

    @pytest.mark.parametrize('change', ['bytes', 'added', 'removed', 'version', 'truncated', 'flipped', 'garbage'])
    def test_is_checked_before_it_is_trusted(self, image_folder, monkeypatch, caplog, change):
        self.load_counting(image_folder, monkeypatch)
        (cache,) = cache_files()
        folder = image_folder / 'train' / 'cat'
        blob = bytearray(cache.read_bytes())
        if change == 'bytes':
            Image.new('RGB', (32, 32)).save(folder / '0.png')
        elif change == 'added':
            shutil.copy(folder / '0.png', folder / '9.png')
        elif change == 'removed':
            os.unlink(folder / '0.png')
        elif change == 'version':
            monkeypatch.setattr(source, 'CACHE_VERSION', 'next')
        elif change == 'truncated':
            cache.write_bytes(blob[:-100])
        elif change == 'flipped':
            blob[-300] ^= 1
            cache.write_bytes(blob)
        elif change == 'garbage':
            cache.write_bytes(b'\xff' * 100)
        with caplog.at_level(logging.WARNING):
            data, decoded = self.load_counting(image_folder, monkeypatch)
        assert decoded and 'decoding again' in caplog.text
        assert len(data) == {'added': 17, 'removed': 15}.get(change, 16)
        if change == 'bytes':
            assert data.images[0].eq(0).all()
        assert not self.load_counting(image_folder, monkeypatch)[1]  # and it is whole again

    def test_nothing_half_written(self, image_folder, monkeypatch, caplog):
        def full_disk(*args, **kwargs):
            raise OSError(28, 'No space left on device')

        monkeypatch.setattr(source, 'save_file', full_disk)
        assert len(load_images(image_folder, 'train')) == 16
        assert 'No space left on device' in caplog.text and not cache_files()

    @pytest.mark.skipif(not Path('/dev/full').exists(), reason='Linux has a full disk at hand')
    def test_a_full_disk_stops_nothing(self, image_folder, monkeypatch, caplog):
        """What safetensors raises of a real full disk is no OSError."""
        save = source.save_file
        monkeypatch.setattr(source, 'save_file', lambda tensors, _, **options: save(tensors, '/dev/full', **options))
        assert len(load_images(image_folder, 'train')) == 16
        assert 'not cached' in caplog.text and not cache_files()

    @pytest.mark.parametrize('place', ['file', 'below a file', 'folder in its place'])
    def test_no_place_stops_nothing(self, image_folder, monkeypatch, caplog, place):
        if place == 'folder in its place':
            load_images(image_folder, 'train')
            (path,) = cache_files()
            path.unlink()
            path.mkdir()
        else:
            file = image_folder / 'file'
            file.touch()
            monkeypatch.setenv('TIMM_POOLATTN_CACHE', str(file if place == 'file' else file / 'cache'))
        assert len(load_images(image_folder, 'train')) == 16

    def test_a_killed_writer_leaves_nothing_for_good(self, image_folder):
        """A process killed as it writes: what it left goes with the next cache that is written, of any data."""
        save = source.save_file

        def save_and_die(*args, **options):
            save(*args, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        pid = os.fork()
        if not pid:
            with suppress(BaseException):
                source.save_file = save_and_die
                load_images(image_folder, 'train')
            os._exit(1)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        assert [p.suffix for p in cache_files()] == ['.tmp']
        load_images(image_folder, 'test')
        assert [p.suffix for p in cache_files()] == ['.safetensors']

    def test_two_at_once(self, image_folder):
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda _: load_images(image_folder, 'train'), range(8)))
        assert all(r.images.equal(results[0].images) for r in results)
        assert len(cache_files()) == 1


def test_a_root_that_is_no_utf8(image_folder):
    root = image_folder.parent / os.fsdecode(b'caf\xe9')
    image_folder.rename(root)
    for _ in range(2):  # the second time from the cache
        assert len(load_images(root, 'test', view=View((3, 8, 8)))) == 8
