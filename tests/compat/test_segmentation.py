"""Our networks as encoders of segmentation_models_pytorch's U-Net."""

import pytest
import torch
from torch.nn import functional as F

import timm_poolattn  # noqa: F401  registers the models

smp = pytest.importorskip('segmentation_models_pytorch')
pytestmark = pytest.mark.compat


@pytest.mark.parametrize(
    'name, depth, channels, side',
    [
        ('resnet20_saam', 2, [16, 32, 64], 32),  # sizes 1, 1/2, 1/4: a U-Net of two steps
        ('resnet20_fa', 2, [16, 32, 64], 32),
        ('resnet20_spem.tiny_imagenet', 3, [3, 16, 32, 64], 64),  # 1/2, 1/4, 1/8
        ('resnext29_fa', 2, [256, 512, 1024], 16),
        ('vgg19_fase', 5, [3, 64, 128, 256, 512, 512], 32),
        ('resnet50_saam', 5, [3, 64, 256, 512, 1024, 2048], 64),
    ],
)
def test_unet_trains(name, depth, channels, side):
    decoder_channels = (64, 32, 32, 16, 16)[:depth]
    model = smp.Unet(
        f'tu-{name}', encoder_weights=None, encoder_depth=depth, decoder_channels=decoder_channels, classes=2
    )
    assert model.encoder.out_channels == channels
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    images, masks = torch.randn(2, 3, side, side), torch.randint(2, (2, side, side))
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        output = model(images)
        assert output.shape == (2, 2, side, side)
        losses.append(F.cross_entropy(output, masks))
        losses[-1].backward()
        optimizer.step()
    used = [n for n, p in model.named_parameters() if p.grad is None]
    assert all('.head.' in n or '.fc.' in n for n in used), used
    assert losses[-1] < losses[0]
