import csv
import json
from argparse import Namespace

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from timm.utils import CheckpointSaver

from timm_poolattn.data import load_images
from timm_poolattn.hub import paper_top1, release
from timm_poolattn.inference import evaluate


@pytest.fixture
def run_dir(tmp_path, image_folder):
    """What `poolattn train` leaves, the checkpoint written by timm's own saver."""
    folder = tmp_path / 'run'
    folder.mkdir()
    args = dict(model='resnet20_saam', num_classes=2, model_kwargs={}, mean=None, std=None, dataset='')
    args.update(data_dir=str(image_folder), val_split='test')
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    model = timm.create_model('resnet20_saam', num_classes=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    saver = CheckpointSaver(model, optimizer, Namespace(**args), checkpoint_dir=folder, recovery_dir=folder)
    saver.save_checkpoint(0, 50.0)
    for p in model.parameters():
        p.data.add_(0.01)
    saver.save_checkpoint(1, 40.0)
    rows = [dict(epoch=0, train_loss=0.7, eval_top1=50.0), dict(epoch=1, train_loss=0.6, eval_top1=40.0)]
    with open(folder / 'summary.csv', 'w', newline='') as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    run = dict(
        arguments=dict(model='resnet20_saam', lr=0.1), options=dict(crop_padding=2), seed=7, versions=dict(timm='x')
    )
    (folder / 'run.json').write_text(json.dumps({**run, 'hardware': 'a CPU', 'wall_time_s': 120}))
    return folder, model


def test_release_folder(run_dir, tmp_path, image_folder):
    run_dir, model = run_dir
    out = tmp_path / 'hub_configs'
    folder = release(run_dir, 'cifar10', out=out)
    assert folder == out / 'resnet20_saam.cifar10'
    assert sorted(p.name for p in folder.iterdir()) == ['README.md', 'config.json', 'model.safetensors', 'results.json']
    weights = load_file(folder / 'model.safetensors')
    assert weights.keys() == model.state_dict().keys()
    assert all(w.equal(weights[k]) for k, w in model.state_dict().items())  # the last epoch's, not the best's

    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert loaded.pretrained_cfg['label_names'] == ['cat', 'dog'] and loaded.num_classes == 2
    results = json.loads((folder / 'results.json').read_text())
    assert results['test'] == evaluate(loaded, load_images(image_folder, 'test'))
    assert (results['last_epoch_top1'], results['best_top1'], results['best_epoch']) == (40, 50, 0)
    assert (results['epochs'], results['seed'], results['hardware']) == (2, 7, 'a CPU')
    assert results['parameters'] == sum(p.numel() for p in model.parameters())
    assert [row['train_loss'] for row in results['curve']] == [0.7, 0.6]
    assert str(tmp_path) not in ''.join(p.read_text() for p in folder.iterdir() if p.suffix != '.safetensors')

    card = ModelCard.load(folder / 'README.md')
    assert card.data.library_name == 'timm' and card.data.license == 'apache-2.0'
    (result,) = card.data.eval_results
    assert result.metric_value == results['test']['top1'] and result.dataset_name == 'CIFAR-10'
    assert f'| {results["test"]["top1"]:.2f} |' in card.text and '| 92.60 |' in card.text
    recipe = yaml.safe_load(card.text.split('```yaml')[1].split('```')[0])
    assert recipe == dict(model='resnet20_saam', lr=0.1, crop_padding=2)


def test_release_again_replaces_whole(run_dir, tmp_path):
    run_dir, _ = run_dir
    out = tmp_path / 'hub_configs'
    folder = release(run_dir, 'cifar10', out=out)
    (folder / 'stale.txt').write_text('')
    release(run_dir, 'cifar10', out=out)
    assert not (folder / 'stale.txt').exists() and [p.name for p in out.iterdir()] == [folder.name]


def test_a_failed_release_leaves_nothing(run_dir, tmp_path, image_folder):
    run_dir, _ = run_dir
    out = tmp_path / 'hub_configs'
    folder = release(run_dir, 'cifar10', out=out)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    (run_dir / 'summary.csv').write_text('epoch\n0\n')
    with pytest.raises(KeyError):
        release(run_dir, 'cifar10', out=out)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before and len(list(out.iterdir())) == 1


def test_mistakes(run_dir, tmp_path):
    run_dir, _ = run_dir
    with pytest.raises(ValueError, match="unknown tag 'cifar'"):
        release(run_dir, 'cifar', out=tmp_path)
    with pytest.raises(FileNotFoundError, match=r'no args\.yaml; is it the output folder'):
        release(tmp_path, 'cifar10', out=tmp_path)


def test_no_pickle_is_loaded(run_dir, tmp_path):
    run_dir, _ = run_dir

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / 'evil'), 'w'))

    torch.save({'state_dict': Evil()}, run_dir / 'last.pth.tar')
    with pytest.raises(Exception, match='Weights only load failed'):
        release(run_dir, 'cifar10', out=tmp_path / 'hub_configs')
    assert not (tmp_path / 'evil').exists()


def test_paper_top1():
    assert paper_top1('resnet20_saam', 'cifar10') == 92.6
    assert paper_top1('resnet20_fa', 'cifar10') == 92.68  # printed as an error of 7.32
    assert paper_top1('resnet20_spem', 'cifar10') is None
