"""One's own photos, from fine-tuning to the Hub and back, under a tag of their own."""

import json
import re

import pytest
import timm
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard
from PIL import Image

from timm_poolattn.cli import main
from timm_poolattn.training import finetune


@pytest.fixture
def photos(tmp_path):
    """Cats dark, dogs bright, 60x80, eight to train and four to test on of each."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (('train', 8), ('test', 4)):
        for name, low in (('cat', 0), ('dog', 128)):
            folder = tmp_path / 'pets' / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(low, low + 128, (12, 16, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).resize((80, 60)).save(folder / f'{i}.png')
    return tmp_path / 'pets'


def poolattn(*args):
    result = CliRunner().invoke(main, [*map(str, args)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_from_photos_to_the_hub_and_back(hub, train_script, photos, tmp_path):
    argv = ['--epochs', '2', '--batch-size', '8', '--output', str(tmp_path), '--experiment', 'run', '--workers', '0']
    finetune(photos, ['--model', 'resnet20_saam.cifar10', *argv], timm_script=train_script)
    poolattn('hub', 'release', tmp_path / 'run', '--tag', 'photos', '--out', tmp_path / 'out')
    folder = tmp_path / 'out' / 'resnet20_saam.photos'
    results = json.loads((folder / 'results.json').read_text())
    assert results['test']['top1'] == results['last_epoch_top1'] and results['test']['images'] == 8
    card = ModelCard.load(folder / 'README.md')
    assert ' held-out images, single view' in card.text and 'test images' not in card.text
    assert card.data.eval_results[0].dataset_split == 'validation'
    assert card.data.datasets is None and 'The first weights are those of `resnet20_saam.cifar10`' in card.text

    poolattn('hub', 'publish', folder, '--org', 'org')
    name = 'hf-hub:org/resnet20_saam.photos'
    for target in (folder, name):
        checks = json.loads(poolattn('hub', 'verify', target, '--data-dir', photos, '--json'))
        assert all(check['ok'] for check in checks) and checks[-1]['name'] == 'accuracy', checks
    published = hub.repos['org/resnet20_saam.photos'].head['README.md'].data.decode()
    assert re.findall(r"'([^']*/resnet20_saam.photos)'", published) == [name, 'org/resnet20_saam.photos']
    model = timm.create_model(name, pretrained=True).eval()
    assert model.pretrained_cfg['label_names'] == ['cat', 'dog']
    images = torch.randn(2, 3, 32, 32)
    ours = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    torch.testing.assert_close(model(images), ours(images), rtol=0, atol=0)
    said = json.loads(poolattn('validate', '--model', name, '--data-dir', photos, '--json'))
    assert said['top1'] == results['test']['top1']
    image = photos / 'test' / 'dog' / '0.png'
    (row,) = json.loads(poolattn('predict', image, '--model', name, '--json'))
    assert {p['label'] for p in row['predictions']} == {'cat', 'dog'}
