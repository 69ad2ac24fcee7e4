"""`poolattn train --teacher`: targets that trained models give."""

import json
from dataclasses import replace

import pytest
import timm
import torch
from torch.nn import functional as F

from timm_poolattn.data import load_images
from timm_poolattn.hub.card import _flags
from timm_poolattn.report.rows import recipe_name
from timm_poolattn.training import read_curve, read_run, soft_targets
from timm_poolattn.utils import UserError, released

from .test_options import run  # noqa: F401  a fixture

TEACHERS = ('resnet20.cifar10', 'resnet20_saam.cifar10')


@pytest.fixture
def data(cifar10_few):
    return load_images(cifar10_few, 'train')


def probabilities(name, data):
    """Compute by timm alone what a model says of images."""
    model = timm.create_model(name, pretrained=True).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ('mean', 'std'))
    with torch.inference_mode():
        return model((data.images.permute(0, 3, 1, 2) / 255 - mean) / std).double().softmax(1)


def test_values(data):
    targets = soft_targets(TEACHERS, data, 10)
    expected = sum(probabilities(name, data) for name in TEACHERS) / 2
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets.double(), expected, rtol=1e-4, atol=1e-6)


def test_cache(data, monkeypatch, tmp_path):
    """A teacher is asked once for its images; a damaged file and a folder that cannot be written to are passed over."""
    monkeypatch.setenv('TIMM_POOLATTN_CACHE', str(tmp_path / 'cache'))
    first = soft_targets(TEACHERS, data, 10)
    files = sorted((tmp_path / 'cache').glob('resnet20*'))
    assert len(files) == 2
    with monkeypatch.context() as m:
        m.setattr('timm_poolattn.models.CifarResNet.forward', None)  # is not called
        assert torch.equal(soft_targets(TEACHERS, data, 10), first)
    files[0].write_bytes(files[0].read_bytes()[:100])
    assert torch.equal(soft_targets(TEACHERS, data, 10), first)
    assert files[0].stat().st_size > 100
    other = replace(data, images=data.images.flip(2))
    assert not torch.equal(soft_targets(TEACHERS, other, 10), first)
    (tmp_path / 'file').touch()
    monkeypatch.setenv('TIMM_POOLATTN_CACHE', str(tmp_path / 'file'))
    assert torch.equal(soft_targets(TEACHERS, data, 10), first)


def test_classes(data):
    """Classes are the teacher's by name; those that the data lack get nothing, and more of the model's get 0."""
    shuffled = ['truck', 'cat', 'airplane']
    index = [data.classes.index(name) for name in shuffled]
    few = replace(data, classes=shuffled, targets=torch.zeros(len(data), dtype=torch.long))
    targets = soft_targets(TEACHERS[:1], few, 5)
    expected = probabilities(TEACHERS[0], data)[:, index]
    torch.testing.assert_close(targets[:, :3].double(), expected / expected.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)
    assert (targets[:, 3:] == 0).all() and targets.shape == (len(data), 5)


def test_training(run, data):  # noqa: F811
    """The loss of the first update is the cross entropy with these targets, without smoothing; the run says so."""
    options = ['--model', 'resnet20.cifar10', '--pretrained', '-b', 40, '--no-aug']
    folder = run(*options, teachers=TEACHERS)
    model = timm.create_model('resnet20.cifar10', pretrained=True).train()
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ('mean', 'std'))
    output = model((data.images.permute(0, 3, 1, 2) / 255 - mean) / std)
    (row,) = read_curve(folder)
    assert row['train_loss'] == pytest.approx(
        F.cross_entropy(output, soft_targets(TEACHERS, data, 10)).item(), rel=1e-3
    )
    facts = read_run(folder).record
    assert facts['options']['teacher'] == list(TEACHERS)
    releases = [json.loads((released()[name] / 'results.json').read_text()) for name in TEACHERS]
    assert facts['teacher_weights'] == [release['weights']['data_sha256'] for release in releases]
    flags = '--resident --penalty-weight 0.1 --teacher resnet20.cifar10 --teacher resnet20_saam.cifar10'
    assert _flags(facts['options']) == flags
    assert recipe_name(facts) == 'own recipe, taught by 2 models'


def test_arguments_say_what_was_done(run, tmp_path, cifar10_few):  # noqa: F811
    """Smoothing is off and recorded so; a teacher's folder without its place; evaluation is on the classes."""
    folder = released()['resnet20.cifar10']
    options = ['--model', 'resnet20.cifar10', '-b', 40, '--smoothing', 0.2, '--val-split', 'train', '--pretrained']
    done = read_run(run(*options, teachers=[f'local-dir:{folder}']))
    assert done.args['smoothing'] == done.record['arguments']['smoothing'] == 0
    assert done.record['options']['teacher'] == ['local-dir:resnet20.cifar10']


@pytest.mark.parametrize(
    ('teacher', 'options', 'message'),
    [
        ('resnet20_sam.cifar10', [], 'resnet20_saam.cifar10'),
        ('resnet164_spem.cifar10', [], 'resnet164_spem'),
        ('resnet20.cifar100', [], 'not trained on the classes'),
        ('resnet20.cifar10', ['--mixup', '0.2'], 'mixup'),
        ('resnet20.cifar10', ['--bce-loss'], 'leave out --bce-loss'),
        ('resnet20.cifar10', ['--aa', 'rand-m9-mstd0.5'], 'resident loader'),
        ('resnet20.cifar10', ['--input-size', '3', '24', '24'], 'leave out --input-size, --crop-pct'),
        ('resnet20.cifar10', ['--crop-pct', '0.875'], 'leave out --input-size, --crop-pct'),
    ],
)
def test_mistakes(run, teacher, options, message):  # noqa: F811
    with pytest.raises(UserError, match=message):
        run(*options, teachers=[teacher])
