"""The packaged counts are what counting gives."""

import json
from pathlib import Path

import pytest
import timm

from timm_poolattn.models import FAMILIES
from timm_poolattn.report import counts, model_list
from timm_poolattn.report.counts import count_model, countable, look_up_count
from timm_poolattn.report.model_list import list_models
from timm_poolattn.utils import released

PACKAGED = json.loads(Path(counts.__file__).with_name('counts.json').read_text())
SAMPLE = ['resnet20_saam', 'resnet56_fase', 'resnet83_spem', 'vgg19_se', 'resnext29_fa']


def test_every_model_and_row_is_there():
    assert list(PACKAGED) == list(countable()), 'python -m timm_poolattn.report.counts'
    for family in FAMILIES:
        of_family = [row['model'] for row in list_models() if row['family'] == family]
        assert of_family == timm.list_models(module=family)
        assert [row['model'] for row in list_models('resnet*_saam') if row['family'] == family] == timm.list_models(
            'resnet*_saam', module=family
        )


@pytest.mark.parametrize('name', SAMPLE)
def test_sample(name):
    assert PACKAGED[name] == count_model(model_name=name)


@pytest.mark.slow
def test_all():
    assert {key: count_model(**args) for key, args in countable().items()} == PACKAGED


def test_what_is_not_in_the_file_is_counted():
    args = dict(model_name='resnet20_saam', gate_kwargs=dict(kernel_size=7))
    assert look_up_count(**args) == count_model(**args)
    more = look_up_count(**args)['parameters'] - PACKAGED['resnet20_saam']['parameters']
    assert more == 9 * (7 * 7 - 5 * 5)


def test_list_marks_weights(tmp_path, monkeypatch):
    folders = {name: tmp_path / name for name in released()}
    folders['resnet20.cifar10'].mkdir()
    (folders['resnet20.cifar10'] / 'model.safetensors').touch()
    monkeypatch.setattr(model_list, 'released', lambda: folders)
    trained = list_models(trained=True)
    weights = {f'{row["model"]}.{tag}': where for row in trained for tag, where in row['weights'].items()}
    assert weights == {name: 'packaged' if name == 'resnet20.cifar10' else 'download' for name in folders}
    assert all(row['top1'].keys() == row['weights'].keys() for row in trained)
    assert len(list_models()) > len(trained) > 0
