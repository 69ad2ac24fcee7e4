import os
import tarfile
from pathlib import Path, PurePosixPath

os.environ.setdefault('OMP_NUM_THREADS', '1')  # before torch: the cores belong to the test processes of `pytest -n`

import pytest
import torch
import torch.jit._builtins
from PIL import Image

import timm_poolattn  # noqa: F401  registers the models
from timm_poolattn.papers import DATASETS
from timm_poolattn.training import find_train_script

os.environ['HF_HUB_OFFLINE'] = '1'  # no test reaches for a network

# TorchScript knows an operator by its id(). torch.ao.quantization defines four operators twice and frees the first;
# an object that gets such an id later is taken for the operator, and torch.jit.script fails now and then.
_OPERATORS, _register = [], torch.jit._builtins._register_builtin


def _register_and_keep(operator: object, name: str) -> None:
    _OPERATORS.append(operator)
    _register(operator, name)


torch.jit._builtins._register_builtin = _register_and_keep


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('TIMM_POOLATTN_CACHE', str(tmp_path / 'cache'))
    torch.manual_seed(0)


#: 2,000 training and 1,000 test images of CIFAR-10.
MINI = Path(__file__).parents[2] / 'shared' / 'data' / 'cifar10-mini.tar'


@pytest.fixture(scope='session')
def cifar10_mini() -> Path:
    """A tar of real images, where it is at hand."""
    if not MINI.is_file():
        pytest.skip(f'no {MINI.name} in shared/data beside the checkout')
    return MINI


@pytest.fixture(scope='session')
def train_script() -> Path:
    """timm's train.py, where it is at hand."""
    script = os.environ.get('TIMM_TRAIN_SCRIPT')
    checkouts = [p / 'pytorch-image-models' / 'train.py' for p in Path(__file__).parents[1:3]]
    for path in [Path(script)] if script else checkouts:
        if path.is_file():
            return find_train_script(path)
    pytest.skip("timm's train.py is not at hand: set TIMM_TRAIN_SCRIPT, or put a checkout beside this one")


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """A data set of two classes, eight training and four test images a class, 32x32: cats dark, dogs bright."""
    root = tmp_path / 'pets'
    generator = torch.Generator().manual_seed(0)
    for split, count in (('train', 8), ('test', 4)):
        for class_name, low in (('cat', 0), ('dog', 128)):
            folder = root / split / class_name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(low, low + 128, (32, 32, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f'{i}.png')
    return root


@pytest.fixture(scope='session')
def cifar10_few(tmp_path_factory) -> Path:
    """A folder with the classes of CIFAR-10, four training and two test images each: real ones where they are at hand.

    Else noise, around a colour of the class's own.
    """
    root = tmp_path_factory.mktemp('data') / 'cifar10-few'
    generator = torch.Generator().manual_seed(0)
    colors = torch.rand(10, 3, generator=generator)
    for split, count in (('train', 4), ('test', 2)):
        for name, color in zip(DATASETS['cifar10']['classes'], colors, strict=True):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = (color * 200 + torch.rand(32, 32, 3, generator=generator) * 55).byte()
                Image.fromarray(pixels.numpy()).save(folder / f'{i}.png')
    if MINI.is_file():
        with tarfile.open(MINI) as tar:
            members = sorted(filter(tarfile.TarInfo.isfile, tar), key=lambda member: member.name)
            for path in sorted(root.rglob('*.png')):
                of_class = [m for m in members if PurePosixPath(m.name).parts[-3:-1] == path.parts[-3:-1]]
                path.write_bytes(tar.extractfile(of_class[int(path.stem)]).read())
    return root
