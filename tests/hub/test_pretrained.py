"""Every release folder of the repository, used as its users will: by name, without a network."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import timm_poolattn
from timm_poolattn.data import load_images
from timm_poolattn.hub import model_card, verify
from timm_poolattn.hub.releases import without_gradient
from timm_poolattn.inference import evaluate, load_pretrained, predict
from timm_poolattn.models import _registry, multiply_adds, save_model
from timm_poolattn.papers import DATASETS, model_args, table_rows
from timm_poolattn.utils import UserError, released

#: The papers have no such row.
UNPRINTED = ('resnet20_fa.cifar100', 'resnet20_spem.cifar10', 'resnet20_spem.cifar100')
RELEASED = released()
EMBEDDED = ['resnet20_fa.cifar10', 'resnet20_saam.cifar10', 'resnet20_spem.cifar10']


def test_the_embedded_models_are_there():
    assert set(EMBEDDED) <= set(RELEASED)
    assert set(EMBEDDED) <= set(timm.list_pretrained('resnet20*'))


@pytest.mark.parametrize('name', RELEASED)
class TestRelease:
    def test_what_gets_no_gradient_is_said(self, name, cifar10_mini):
        data = load_images(cifar10_mini.with_name(f'{name.partition(".")[2]}-mini.tar'), 'test')
        said = json.loads((RELEASED[name] / 'results.json').read_text())['without_gradient']
        assert without_gradient(timm.create_model(name, pretrained=True), data) == said

    def test_folder(self, name):
        folder = RELEASED[name]
        tag = name.partition('.')[2]
        assert sorted(str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file()) == [
            f'.eval_results/{tag}.yaml',
            'README.md',
            'config.json',
            'model.safetensors',
            'results.json',
        ]
        results = json.loads((folder / 'results.json').read_text())
        config = json.loads((folder / 'config.json').read_text())
        arch, _, tag = name.partition('.')
        assert (results['model'], results['tag'], config['architecture']) == (arch, tag, arch)
        assert len(config['label_names']) == config['num_classes'] == DATASETS[tag]['num_classes']
        assert results['last_epoch_top1'] == results['curve'][-1]['eval_top1']
        assert results['curve'][-1]['epoch'] + 1 == results['epochs'] and results['test']['images'] == 10000
        rounding = 0.3 if results['arguments'].get('amp') else 0.05  # of bfloat16: a release is measured in float32
        assert results['test']['top1'] == pytest.approx(results['last_epoch_top1'], abs=rounding)
        keys = (
            'gate',
            'multiply_adds',
            'released_by',
            'arguments',
            'options',
            'seed',
            'versions',
            'hardware',
            'best_top1',
        )
        for key in (*keys, 'wall_time_s'):
            assert key in results

    def test_floor(self, name):
        if name in EMBEDDED:
            assert json.loads((RELEASED[name] / 'results.json').read_text())['test']['top1'] >= 90.5

    def test_pretrained(self, name):
        arch, _, tag = name.partition('.')
        weights = load_file(RELEASED[name] / 'model.safetensors')
        for spelled in (name, arch) if tag == 'cifar10' else (name,):
            model = timm.create_model(spelled, pretrained=True)
            assert all(w.equal(weights[k]) for k, w in model.state_dict().items())
        assert model.num_classes == DATASETS[tag]['num_classes']
        assert model.pretrained_cfg['label_names']

    def test_new_head(self, name):
        model = timm.create_model(name, pretrained=True, num_classes=7).eval()
        weights = load_file(RELEASED[name] / 'model.safetensors')
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
        assert all(w.equal(weights[k]) for k, w in model.state_dict().items() if not k.startswith('head.fc'))

    def test_grayscale(self, name):
        model = timm.create_model(name, pretrained=True, in_chans=1).eval()
        weights = load_file(RELEASED[name] / 'model.safetensors')
        torch.testing.assert_close(model.conv1.weight, weights['conv1.weight'].sum(1, keepdim=True))
        assert model(torch.randn(2, 1, 32, 32)).shape == (2, DATASETS[name.partition('.')[2]]['num_classes'])

    def test_features_only(self, name):
        model = timm.create_model(name, pretrained=True, features_only=True)
        assert len(model(torch.randn(2, 3, 32, 32))) == 3

    def test_accuracy_on_real_images(self, name, cifar10_mini):
        if not name.endswith('.cifar10'):
            pytest.skip('not CIFAR-10')
        claimed = json.loads((RELEASED[name] / 'results.json').read_text())['test']['top1']
        measured = evaluate(load_pretrained(name), load_images(cifar10_mini, 'test'))
        assert measured['images'] == 1000
        assert measured['top1'] == pytest.approx(claimed, abs=3)  # three standard deviations of 1,000 images

    def test_parameters_are_the_papers(self, name):
        kinds = [dict(model_name=name), dict(model_name=name, flavour='fa')][: 2 if '_fa' in name else 1]
        exact = {r['params_exact'] for r in table_rows() if model_args(r) in kinds and 'params_exact' in r}
        results = json.loads((RELEASED[name] / 'results.json').read_text())
        assert results['parameters'] in exact or (not exact and name in UNPRINTED)
        assert results['multiply_adds'] == multiply_adds(timm.create_model(name))

    def test_is_sound(self, name):
        assert all(check.ok for check in verify(name))
        results = json.loads((RELEASED[name] / 'results.json').read_text())
        card = (RELEASED[name] / 'README.md').read_text()
        assert card == str(model_card(results))  # generated, never edited: `python -m timm_poolattn.hub`


def test_the_photo_of_a_cat():
    skimage = pytest.importorskip('skimage')
    path = f'{skimage.__path__[0]}/data/chelsea.png'
    (result,) = predict(load_pretrained('resnet20_saam'), [path])
    assert result['predictions'][0]['label'] == 'cat'


@pytest.mark.parametrize(
    'name, found',
    [
        ('resnet326_srm', 'near models have: resnet'),
        ('resnet20_saam.tiny_imagenet', 'it has them as resnet20_saam.cifar10, resnet20_saam.cifar100'),
        ('resnet32_spem.cifar100', 'near models have: resnet20_spem.cifar100'),
    ],
)
def test_without_weights(name, found):
    with pytest.raises(UserError, match=f'^{re.escape(name)} has no weights yet; {found}'):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize('text', ['{"a', '{}', '[]'])
def test_a_damaged_folder_is_named(tmp_path, monkeypatch, text):
    path = tmp_path / 'hub_configs' / 'resnet20_saam.cifar10' / 'config.json'
    path.parent.mkdir(parents=True)
    path.write_text(text)
    monkeypatch.setattr(_registry, 'released', lambda: {path.parent.name: path.parent})
    with pytest.raises(UserError, match=rf'^{path}: not of a release \(.*\); release it again, or remove the folder'):
        _registry.read_default_cfgs(['resnet20_saam'], lambda side: side // 4)


def test_a_release_of_own_data_has_a_name(tmp_path, monkeypatch):
    """In hub_configs, its tag is one of timm's, and the arguments of its config.json build it."""
    model = timm.create_model('resnet20_saam', num_classes=3, global_pool='max').eval()
    save_model(model, tmp_path / 'hub_configs' / 'resnet20_saam.pets', ['cat', 'dog', 'eel'])
    package = Path(timm_poolattn.__file__).parent
    (tmp_path / 'timm_poolattn').symlink_to(package)
    code = (
        'import sys, timm, torch\n'
        'from pathlib import Path\n'
        'sys.path.insert(0, sys.argv[1])\n'
        'import timm_poolattn\n'
        "model = timm.create_model('resnet20_saam.pets', pretrained=True).eval()\n"
        "print(model.pretrained_cfg['label_names'], model(torch.ones(1, 3, 32, 32)).tolist())"
    )
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    done = subprocess.run(
        [sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True, env=env, cwd=tmp_path, check=True
    )
    expected = model(torch.ones(1, 3, 32, 32)).tolist()
    assert done.stdout.strip() == f"('cat', 'dog', 'eel') {expected}"


def test_model_args_of_the_papers_rows_name_models():
    for row in table_rows():
        assert timm.is_model(model_args(row)['model_name'].split('.')[0])
