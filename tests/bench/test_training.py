"""The benchmarks run and print what they say; no time is asserted."""

import json

import pytest
import torch
from click.testing import CliRunner

from timm_poolattn.bench import training as bench
from timm_poolattn.bench.networks import plain_name
from timm_poolattn.cli import main


def run(*args, code=0):
    result = CliRunner().invoke(main, ['bench', *map(str, args)])
    assert result.exit_code == code, result.output
    return result.stdout


def test_loader(image_folder, monkeypatch):
    monkeypatch.setattr(bench.bench_loader, '__kwdefaults__', {**bench.bench_loader.__kwdefaults__, 'seconds': 0.1})
    args = ['loader', '--data-dir', image_folder, '--batch-size', 4, '--workers', 0]
    rows = json.loads(run(*args, '--json'))
    assert [row['loader'] for row in rows] == ['resident', 'timm, 0 workers']
    assert rows[0]['ratio'] == 1 and all(row['images_per_s'] > 0 for row in rows)
    assert run(*args).splitlines()[0].startswith('resident ')
    with pytest.raises(FileNotFoundError, match='no checkout of cifar10-airbench'):
        bench.bench_loader(image_folder, airbench=image_folder, workers=0)


def test_rate_is_images_over_time(monkeypatch):
    """A clock that moves a second for each batch: whole epochs, or from the second batch on."""
    now = [0.0]
    monkeypatch.setattr(bench.time, 'perf_counter', lambda: now[0])

    def loader():
        for _ in range(5):
            now[0] += 1
            yield torch.empty(10), None

    class Loader:
        __iter__ = lambda self: loader()  # noqa: E731

    device = torch.device('cpu')
    assert bench._rate(Loader(), 7, device, by_epoch=True) == 100 / 10  # 2 epochs
    assert bench._rate(Loader(), 2.5, device, by_epoch=False) == 30 / 3


def test_train():
    args = ['train', 'resnet20_spem', '--mode', 'eager', '--mode', 'autocast', '--batch-size', 2, '--steps', 1]
    rows = json.loads(run(*args, '--json'))
    assert [(row['model'], row['mode']) for row in rows] == [
        (model, mode) for model in ('resnet20_spem', 'resnet20') for mode in ('eager', 'autocast')
    ]
    gated, _, plain, _ = rows
    # 3 passes of 2 operations for each multiply-add (41 million, of which the stem's input needs no gradient), 2 images
    assert gated['gflop'] == plain['gflop'] == pytest.approx(2 * 3 * 2 * 0.0413, rel=0.02)
    assert gated['gbytes'] > plain['gbytes'] and gated['peak_mb'] > plain['peak_mb']
    assert all(row['images_per_s'] > 0 and row['floor_images_per_s'] > 0 for row in rows)
    assert len(run(*args).splitlines()) == 5


def test_the_backbone_of_a_gated_model():
    names = ['resnet56_saam', 'vgg19_fa.cifar100', 'inception_v4_se', 'resnext29_fase', 'resnet164', 'resnet50']
    plain = ['resnet56', 'cifar_vgg19.cifar100', 'cifar_inception_v4', 'resnext29', None, None]
    assert [plain_name(name) for name in names] == plain


def test_unknown_mode():
    with pytest.raises(ValueError, match="unknown mode 'fast'; choose from eager, channels_last, autocast, compiled"):
        bench.bench_train(['resnet20'], modes=['fast'])
