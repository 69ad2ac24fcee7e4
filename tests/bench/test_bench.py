"""The benchmarks run and return what they say; no time is asserted."""

import json
import math
import tarfile

import pytest
import timm
import torch
from torch import nn

from timm_poolattn.bench.backbones import plain_args, plain_name
from timm_poolattn.bench.gates import bench_gates
from timm_poolattn.bench.loader import bench_loader, loading_rate
from timm_poolattn.bench.machine import describe_machine
from timm_poolattn.bench.memory import bytes_moved, peak_bytes
from timm_poolattn.bench.models import bench_models
from timm_poolattn.bench.skipping import bench_skip
from timm_poolattn.bench.step import bench_train
from timm_poolattn.bench.timer import median_ratio, time_in_turns
from timm_poolattn.data import load_images
from timm_poolattn.utils import MissingFileError, UserError


class TestTimer:
    def test_contenders_take_turns_after_a_warm_up(self):
        calls = []
        contenders = {name: lambda name=name: calls.append(name) for name in 'ab'}
        seconds = time_in_turns(contenders, repeats=3, warm_up=2)
        assert calls == ['a', 'b'] * 5
        assert {name: len(times) for name, times in seconds.items()} == dict(a=3, b=3)
        assert all(t >= 0 for times in seconds.values() for t in times)

    def test_a_ratio_is_of_the_same_turn(self):
        assert median_ratio([1, 20, 3], [1, 10, 1]) == 2


class TestMemory:
    def test_peak(self):
        def run():
            a = torch.ones(2**18)  # 1 MiB each
            b = a + 1
            del a
            b + 1

        assert peak_bytes(run) == pytest.approx(2 * 2**20, rel=1e-3)

    def test_moved(self):
        x = torch.ones(2**10)
        assert bytes_moved(lambda: x + x) == 3 * x.nbytes
        assert bytes_moved(lambda: x.view(2, -1)) == 0


class TestBackbones:
    def test_names(self):
        names = ['resnet56_saam', 'vgg19_fa.cifar100', 'inception_v4_se', 'resnext29_fase', 'resnet164', 'resnet50']
        plain = ['resnet56', 'cifar_vgg19.cifar100', 'cifar_inception_v4', 'resnext29', None, None]
        assert [plain_name(name) for name in names] == plain

    @pytest.mark.parametrize('name', ['resnet20_fa', 'resnet20_saam', 'resnet83_spem', 'vgg19_fa', 'resnet20'])
    def test_is_the_gated_network_without_its_gates(self, name):
        convs = [
            [m.weight.shape for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.shape[1] > 2]
            for model in (timm.create_model(name, device='meta'), timm.create_model(**plain_args(name), device='meta'))
        ]
        assert len(convs[1]) > 10 and [c for c in convs[0] if c in convs[1]] == convs[1]


def test_loader(image_folder, tmp_path):
    rows = bench_loader(image_folder, batch_size=4, workers=0, seconds=0.1)
    assert [row['loader'] for row in rows] == ['resident', 'timm, 0 workers']
    assert rows[0]['ratio'] == 1 and all(row['images_per_s'] > 0 for row in rows)
    with tarfile.open(tmp_path / 'data.tar', 'w') as tar:
        tar.add(image_folder, 'data')
    assert len(bench_loader(tmp_path / 'data.tar', batch_size=4, workers=0, seconds=0.1)) == 2
    with pytest.raises(MissingFileError, match='no checkout of cifar10-airbench'):
        bench_loader(image_folder, airbench=image_folder, workers=0)


def test_loading_rate_is_images_over_time():
    """A clock that moves a second for each batch: whole epochs, or from the second batch on."""
    now = [0.0]

    class Loader:
        def __iter__(self):
            for _ in range(5):
                now[0] += 1
                yield torch.empty(10), None

    assert loading_rate(Loader(), 7, by_epoch=True, clock=lambda: now[0]) == 100 / 10  # 2 epochs
    assert loading_rate(Loader(), 2.5, by_epoch=False, clock=lambda: now[0]) == 30 / 3


def test_train():
    rows = bench_train(['resnet20_spem'], modes=['eager', 'autocast'], batch_size=2, steps=1)
    assert [(row['model'], row['mode']) for row in rows] == [
        (model, mode) for model in ('resnet20_spem', 'resnet20') for mode in ('eager', 'autocast')
    ]
    gated, _, plain, _ = rows
    # 3 passes of 2 operations for each multiply-add (41 million, of which the stem's input needs no gradient), 2 images
    assert gated['gflop'] == plain['gflop'] == pytest.approx(2 * 3 * 2 * 0.0413, rel=0.02)
    assert gated['gbytes'] > plain['gbytes'] and gated['peak_mb'] > plain['peak_mb']
    assert all(row['images_per_s'] > 0 and row['floor_images_per_s'] > 0 for row in rows)


def test_models():
    result = bench_models(['resnet20_saam'], dtypes=['float32', 'bfloat16'], batch_size=2, repeats=1)
    assert describe_machine('cpu').items() <= result.items() and result['batch_size'] == 2 and result['fused_pool']
    cases = [(row['layout'], row['dtype'], row['model'], row['mode']) for row in result['rows']]
    assert cases == [
        (layout, dtype, model, 'eager')
        for layout in ('contiguous', 'channels_last')
        for dtype in ('float32', 'bfloat16')
        for model in ('resnet20', 'resnet20_saam')
    ]
    for plain, gated in zip(result['rows'][::2], result['rows'][1::2], strict=True):
        assert plain['training_to_plain'] == plain['inference_to_plain'] == plain['peak_to_plain'] == 1
        assert gated['parameters'] == 281051 and gated['peak_to_plain'] > 1 and gated['construct_s'] > 0
        assert all(math.isfinite(v) and v > 0 for v in gated.values() if isinstance(v, float))
    wide, half = (row['peak_mib'] for row in result['rows'][:4:2])
    assert half < wide  # autocast keeps half the bytes


@pytest.mark.slow
def test_models_compiled_and_folded():
    result = bench_models(
        ['resnet20_spem'], layouts=['channels_last'], compile=True, reparameterize=True, batch_size=2, repeats=1
    )
    rows = {(row['model'], row['mode']): row for row in result['rows']}
    assert len(rows) == 6
    for model in ('resnet20', 'resnet20_spem'):
        assert rows[model, 'compiled']['peak_mib'] > 0 and rows[model, 'compiled']['training_images_per_s'] > 0
        assert 'training_images_per_s' not in rows[model, 'reparameterized']


def test_gates():
    result = bench_gates(['resnet20'], ['spem', 'fa'], layouts=['channels_last'], batch_size=2, repeats=1)
    rows = {(r['gate'], r['channels'], r['dtype']): r for r in result['rows']}
    assert len(rows) == 4 * 3 * 2  # identity and se too; three stages; float32 and bfloat16
    assert {(r['channels'], r['size']) for r in result['rows']} == {(16, 32), (32, 16), (64, 8)}
    copy, se = rows['identity', 16, 'float32'], rows['se', 16, 'float32']
    assert copy['forward_moved'] == 2 and copy['forward_ms_to_identity'] == 1 == copy['forward_bandwidth_to_copy']
    assert se['forward_ms_to_se'] == 1 and se['forward_moved'] == pytest.approx(3, abs=0.1)
    assert all(r['peak_maps'] > 0 for r in rows.values())
    json.dumps(result)


def test_skip(image_folder):
    names = dict(pretrained_cfg_overlay=dict(label_names=['cat', 'dog']))
    model = timm.create_model('resnet20_fa', num_classes=2, **names).eval()
    data = load_images(image_folder, 'test')
    rows = bench_skip(model, data, [0.0, 1.0], repeats=1)
    assert [row['blocks_run'] for row in rows] == [1.0, pytest.approx(1 / 9)]  # the first has no k
    assert rows[0]['speedup'] == 1 and all(row['images_per_s'] > 0 for row in rows)
    assert all(m.skip_threshold == 0 for m in model.modules() if hasattr(m, 'skip_threshold'))
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    'measure, message',
    [
        (lambda: bench_train(['resnet20'], modes=['fast']), "unknown mode 'fast'"),
        (lambda: bench_train(['resnet20_sam']), "unknown model 'resnet20_sam'; nearest: resnet20_saam"),
        (lambda: bench_skip(timm.create_model('resnet18'), None), 'nothing to skip: the model has no FA gates'),
        (lambda: bench_models(['resnet20_sam']), "unknown model 'resnet20_sam'"),
        (lambda: bench_models(['resnet20'], dtypes=['int8']), "unknown dtype 'int8'; choose from float32, bfloat16"),
        (lambda: bench_models(['resnet20'], layouts=['nhwc']), "unknown layout 'nhwc'"),
        (lambda: bench_gates(gates=['foo']), "unknown gate 'foo'"),
    ],
)
def test_mistakes(measure, message):
    with pytest.raises(UserError, match=message):
        measure()


def test_spem_authors(tmp_path):
    with pytest.raises(MissingFileError, match=r'a checkout of github\.com/Qrange-group/SPEM'):
        bench_models(['resnet164_spem'], spem_authors=tmp_path)


def test_spem_authors_run_beside_their_model(tmp_path, monkeypatch):
    monkeypatch.setattr('timm_poolattn.bench.models._spem_authors', lambda path: torch.nn.Identity())
    with pytest.raises(UserError, match=r'runs beside --model resnet164_spem, and not beside resnet20\.cifar10'):
        bench_models(['resnet20.cifar10'], spem_authors=tmp_path)
