import io
import logging
import os
import pickle
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from timm_poolattn.data import images as source
from timm_poolattn.data import load_images
from timm_poolattn.utils import cache_dir


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


def test_real_images(cifar10_mini):
    data = load_images(cifar10_mini, 'train')
    assert data.images.shape == (2000, 32, 32, 3) and data.targets.bincount().tolist() == [200] * 10
    assert data.classes[3] == 'cat' and data.classes[-1] == 'truck'
    # CIFAR-10's statistics, which the models' default configs hold
    assert data.images.float().mean((0, 1, 2)).div(255).tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.02)


def test_grayscale(image_folder):
    data = load_images(image_folder, 'train', img_mode='L')
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
    with pytest.raises(FileNotFoundError, match=r'torch/cifar10 is not there or damaged.*--dataset-download'):
        load_images(tmp_path, 'train', name='torch/cifar10')
    monkeypatch.setattr('torchvision.datasets.CIFAR10._check_integrity', lambda self: True)
    monkeypatch.setattr('torchvision.datasets.cifar.check_integrity', lambda *_: True)
    data = load_images(tmp_path, 'train', name='torch/cifar10')
    assert data.images.shape == (20, 32, 32, 3) and data.classes == names
    assert np.array_equal(data.images[0].numpy(), pixels[0].reshape(3, 32, 32).transpose(1, 2, 0))
    assert load_images(tmp_path, 'test', name='torch/cifar10').targets.tolist() == [3, 1, 4, 1]


def test_errors(image_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere: no such folder or tar file'):
        load_images(tmp_path / 'nowhere', 'train')
    with pytest.raises(FileNotFoundError, match="no split 'holdout'; it holds test, train"):
        load_images(image_folder, 'holdout')
    with pytest.raises(ValueError, match="unknown data set 'torch/mnist'"):
        load_images(image_folder, 'train', name='torch/mnist')
    (tmp_path / 'a.txt').write_text('no tar')
    with pytest.raises(ValueError, match='neither a folder nor a tar file'):
        load_images(tmp_path / 'a.txt', 'train')
    (image_folder / 'train' / 'bird').mkdir()
    with pytest.raises(ValueError, match='no images in bird'):
        load_images(image_folder, 'train')
    assert not cache_files()


@pytest.mark.parametrize('as_tar', [False, True])
def test_a_broken_image_is_named(image_folder, tmp_path, as_tar):
    (image_folder / 'train' / 'dog' / '3.png').write_bytes(b'not a PNG')
    root = tar_of(image_folder, tmp_path / 'pets.tar') if as_tar else image_folder
    with pytest.raises(ValueError, match=r'dog/3.png cannot be decoded as an image'):
        load_images(root, 'train')
    assert not cache_files()


def test_a_truncated_image_is_named(image_folder):
    path = image_folder / 'train' / 'dog' / '3.png'
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r'dog/3.png cannot be decoded'):
        load_images(image_folder, 'train')


def test_resizing_is_timms_evaluation(image_folder):
    """Photos of any size and mode become what timm's own transform for evaluation makes of them."""
    from timm.data import create_transform

    folder = image_folder / 'train' / 'dog'
    noise = Image.open(folder / '0.png')
    for i, size in enumerate([(100, 40), (17, 90), (32, 33), (1, 1)]):
        noise.resize(size).convert('L' if i == 1 else 'RGB').save(folder / f'{i}.png')
    data = load_images(image_folder, 'train', size=24)
    assert data.images.shape == (16, 24, 24, 3)
    transform = create_transform((3, 24, 24), crop_pct=1.0, interpolation='bicubic', mean=(0,) * 3, std=(1,) * 3)
    for i in range(4):
        expected = transform(Image.open(folder / f'{i}.png').convert('RGB')).mul(255).round().to(torch.uint8)
        assert data.images[8 + i].permute(2, 0, 1).equal(expected)
    assert load_images(image_folder, 'test', size=32).images.equal(load_images(image_folder, 'test').images)


def test_classes_of_another_split(image_folder):
    shutil.rmtree(image_folder / 'test' / 'cat')
    assert load_images(image_folder, 'test').targets.tolist() == [0] * 4
    data = load_images(image_folder, 'test', classes=['cat', 'dog'])
    assert data.targets.tolist() == [1] * 4 and data.classes == ['cat', 'dog']
    with pytest.raises(ValueError, match='test has classes that are not trained on: dog'):
        load_images(image_folder, 'test', classes=['cat'])


def test_mixed_sizes_are_named(image_folder):
    Image.new('RGB', (40, 32)).save(image_folder / 'train' / 'dog' / '3.png')
    with pytest.raises(ValueError, match=r'mixed size: cat/0.png is 32x32, dog/3.png is 40x32'):
        load_images(image_folder, 'train')
    assert not cache_files()


def test_tar_members_are_never_extracted(image_folder, tmp_path):
    path = tar_of(image_folder, tmp_path / 'pets.tar')
    blob = (image_folder / 'train' / 'cat' / '0.png').read_bytes()
    with tarfile.open(path, 'a') as tar:
        info = tarfile.TarInfo('../train/cat/evil.png')
        info.size = len(blob)
        tar.addfile(info, io.BytesIO(blob))
        link = tarfile.TarInfo('train/cat/link.png')
        link.type, link.linkname = tarfile.SYMTYPE, '/etc/passwd'
        tar.addfile(link)
    assert len(load_images(path, 'train')) == 17  # the link is left out
    assert not (tmp_path.parent / 'train').exists()


class TestCache:
    def load_counting(self, root, monkeypatch):
        decoded = []
        decode = source._decode
        monkeypatch.setattr(source, '_decode', lambda *args: decoded.append(1) or decode(*args))
        data = load_images(root, 'train')
        monkeypatch.setattr(source, '_decode', decode)
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
        with caplog.at_level(logging.WARNING):
            assert len(load_images(image_folder, 'train')) == 16
        assert 'No space left on device' in caplog.text and not cache_files()

    def test_two_at_once(self, image_folder):
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda _: load_images(image_folder, 'train'), range(8)))
        assert all(r.images.equal(results[0].images) for r in results)
        assert len(cache_files()) == 1
