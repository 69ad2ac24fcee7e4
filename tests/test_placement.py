"""Nothing stays behind on the CPU when a model runs on CUDA. No card is needed: fake tensors have a device and no data.

Backward passes need a driver, so what has a gradient of its own is no part of this.
"""

import pytest
import timm
import torch
from torch._subclasses import FakeTensorMode

from timm_poolattn.data import BatchErasing, ImageData, ResidentDataset, ResidentLoader
from timm_poolattn.layers import GATES, SPEM, create_gate
from timm_poolattn.layers.spem import REWEIGHT_FORMS

CUDA = torch.device('cuda', 0)


@pytest.fixture
def fake():
    with FakeTensorMode() as mode:
        yield mode


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('name', GATES)
def test_gates(fake, name, train):
    gate = create_gate(name, 16, device='cuda').train(train)
    assert gate(torch.randn(2, 16, 6, 5, device='cuda', requires_grad=train)).device == CUDA


@pytest.mark.parametrize('reweight', REWEIGHT_FORMS)
@pytest.mark.parametrize('fixed_lambda', [None, 0.3])
def test_spem(fake, reweight, fixed_lambda):
    gate = SPEM(16, reweight=reweight, fixed_lambda=fixed_lambda, device='cuda')
    assert gate(torch.randn(2, 16, 6, 5, device='cuda')).device == CUDA and gate.penalty().device == CUDA


@pytest.mark.parametrize('name', ['resnet20_fa', 'resnet20_cbam', 'resnext29_fa', 'inception_v4_fa', 'resnet50_spem'])
def test_models(fake, name, monkeypatch):
    """Whole networks, FA's blocks among them; the rates of drop path are the one thing timm computes with tensors."""
    monkeypatch.setattr(
        'timm_poolattn.models.cifar_resnet.calculate_drop_path_rates',
        lambda rate, depths, **_: [[0.0] * n for n in depths],
    )
    model = timm.create_model(name, device='cuda')
    assert model(torch.randn(2, *model.pretrained_cfg['input_size'], device='cuda')).device == CUDA


@pytest.mark.parametrize('is_training', [True, False])
def test_resident_loader(fake, is_training, monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda function: function)
    images = torch.zeros(20, 8, 8, 3, dtype=torch.uint8)
    data = ResidentDataset(ImageData(images, torch.zeros(20, dtype=torch.long), list('ab')))
    facts = dict(mean=(0.5,) * 3, std=(0.2,) * 3, is_training=is_training, device='cuda')
    batches = list(ResidentLoader(data, (3, 8, 8), 10, erasing=BatchErasing(0.5, 'pixel'), **facts))
    assert len(batches) == 2
    assert all(input.device == target.device == CUDA and input.shape == (10, 3, 8, 8) for input, target in batches)
