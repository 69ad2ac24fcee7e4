"""transformers reads our releases once timm_poolattn is imported."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image

from timm_poolattn.utils import released

from ..hub.conftest import hub  # noqa: F401  a Hub on this machine

transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.compat

NAME = 'resnet20_saam.cifar10'


@pytest.fixture(params=['resnet20_saam.cifar10', 'resnet20_fa.cifar100', 'resnet20_spem.cifar10'])
def folder(request):
    return released()[request.param]


def test_same_logits_and_label_names(folder):
    model, info = transformers.AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys'] and not info['mismatched_keys']
    images = torch.randn(4, 3, 32, 32)
    expected = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(images)
    torch.testing.assert_close(model.eval()(images).logits, expected)
    labels = json.loads((folder / 'config.json').read_text())['label_names']
    assert model.config.id2label == dict(enumerate(labels))


def test_pipeline():
    skimage = pytest.importorskip('skimage')
    classify = transformers.pipeline('image-classification', str(released()[NAME]))
    best = classify(f'{skimage.__path__[0]}/data/chelsea.png')[0]
    assert best['label'] == 'cat' and best['score'] > 0.5


def test_saved_again(folder, tmp_path):
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again(images).logits, model(images).logits)


def test_new_classes():
    model = transformers.AutoModelForImageClassification.from_pretrained(
        released()[NAME], num_labels=3, ignore_mismatched_sizes=True
    )
    assert model(torch.randn(2, 3, 32, 32)).logits.shape == (2, 3)


def test_trainer(tmp_path):
    pytest.importorskip('accelerate')
    model = transformers.AutoModelForImageClassification.from_pretrained(released()[NAME])
    before = {name: p.clone() for name, p in model.named_parameters()}
    rows = [dict(pixel_values=torch.randn(3, 32, 32), labels=i % 10) for i in range(8)]
    args = transformers.TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to=[], save_strategy='no'
    )
    transformers.Trainer(model, args, train_dataset=rows).train()
    assert all(not p.equal(before[name]) for name, p in model.named_parameters() if 'conv' in name)


def test_without_the_import():
    """What the card quotes."""
    code = (
        f'from transformers import AutoModelForImageClassification as M\nM.from_pretrained({str(released()[NAME])!r})'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    said = done.stderr.splitlines()[-1].replace(timm.__version__, '1.0.31')
    assert done.returncode and said.startswith('ImportError: ')
    assert said in (released()[NAME] / 'README.md').read_text().splitlines()


def test_from_a_hub_repository(hub, folder, tmp_path):  # noqa: F811
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}
    hub.add(f'org/{folder.name}', files)
    model = transformers.AutoModelForImageClassification.from_pretrained(f'org/{folder.name}').eval()
    images = torch.randn(4, 3, 32, 32)
    expected = timm.create_model(f'hf-hub:org/{folder.name}', pretrained=True).eval()(images)
    torch.testing.assert_close(model(images).logits, expected)
    photo = tmp_path / 'photo.png'
    Image.fromarray(torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8).numpy()).save(photo)
    (best, *_) = transformers.pipeline('image-classification', f'org/{folder.name}')(str(photo))
    assert best['label'] in json.loads(files['config.json'])['label_names']
