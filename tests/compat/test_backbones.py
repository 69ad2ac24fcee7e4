"""Our networks below fastai's head, torchvision's detectors, and whatever takes maps by `out_indices`."""

from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from timm_poolattn.explain.attention import find_gates

from ..test_readmes import ROOT, blocks

pytestmark = pytest.mark.compat
README = ROOT / 'timm_poolattn' / 'models' / 'README.md'


def snippet(word: str) -> str:
    (code,) = (block for block in blocks(README, 'python') if word in block)
    return code


def gate_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    found = {f'{g}.{n}': p for g, gate in find_gates(model).items() for n, p in gate.named_parameters()}
    assert found
    return found


def step(model: nn.Module, loss: torch.Tensor) -> None:
    """One step of SGD: every parameter of a gate gets a finite gradient, and most one that is not zero."""
    loss.backward()
    assert loss.isfinite()
    gates = gate_parameters(model)
    assert not [name for name, p in gates.items() if p.grad is None or not p.grad.isfinite().all()]
    dead = [name for name, p in gates.items() if not p.grad.any()]  # behind a ReLU that is shut for these images
    assert len(dead) < len(gates) / 3, dead
    torch.optim.SGD(model.parameters(), 0.01).step()
    assert all(p.isfinite().all() for p in model.parameters())


DETECTORS = {
    'retinanet': (RetinaNet, dict(num_classes=3)),
    'fcos': (FCOS, dict(num_classes=3)),
    'faster_rcnn': (FasterRCNN, dict(num_classes=3)),
}


@pytest.mark.parametrize('detector', DETECTORS)
@pytest.mark.parametrize(
    'name, indices, channels, strides',
    [
        ('resnet20_saam', (0, 1, 2), [16, 32, 64], [1, 2, 4]),
        ('resnet20_fa', (1, 2), [32, 64], [2, 4]),
        ('resnet50_spem', (2, 3, 4), [512, 1024, 2048], [8, 16, 32]),
        ('resnet50_fa', (1, 2, 3, 4), [256, 512, 1024, 2048], [4, 8, 16, 32]),
    ],
)
def test_a_detector_trains(detector, name, indices, channels, strides):
    space = {}
    exec(snippet('RetinaNet'), space)
    # timm's own ResNet starts with branches of zeros, whose gates have a gradient of zero
    backbone = space['Pyramid'](name, out_indices=indices, **dict(zero_init_last=False) if '50' in name else {})
    assert backbone.body.feature_info.channels() == channels
    images = torch.rand(2, 3, 64, 64)
    assert [m.shape[2:] for m in backbone(images).values()] == [(64 // s, 64 // s) for s in strides]
    ratios = (1.0,) if detector == 'fcos' else (0.5, 1.0, 2.0)
    anchors = AnchorGenerator(tuple((8 * s,) for s in strides), (ratios,) * len(strides))
    kind, kwargs = DETECTORS[detector]
    key = 'rpn_anchor_generator' if kind is FasterRCNN else 'anchor_generator'
    if kind is FasterRCNN:
        names = [str(i) for i in range(len(indices))]
        kwargs = dict(kwargs, box_roi_pool=MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2))
    model = kind(backbone, min_size=64, max_size=64, **{key: anchors}, **kwargs).train()
    target = dict(boxes=torch.tensor([[8.0, 8.0, 40.0, 56.0]]), labels=torch.tensor([1]))
    step(model, sum(model(list(images), [target, target]).values()))
    found = model.eval()(list(images))
    assert all(one.keys() == {'boxes', 'labels', 'scores'} and one['scores'].isfinite().all() for one in found)


@pytest.mark.parametrize('name', ['resnet20_saam', 'resnet56_spem', 'resnext29_fa', 'vgg19_fase', 'inception_v4_fa'])
def test_maps_by_out_indices(name):
    """mmpretrain's `TIMMBackbone` passes them on, negative ones too; a decoder trains on what comes."""
    model = timm.create_model(name, features_only=True, out_indices=(-2, -1))
    whole = timm.create_model(name, features_only=True)
    assert model.feature_info.channels() == whole.feature_info.channels()[-2:]
    maps = model(torch.randn(2, 3, 64, 64))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    step(model, sum(m.square().mean() for m in maps))


@pytest.mark.parametrize('name', ['resnet20_saam', 'resnet20_spem', 'resnet20_fa.cifar100', 'resnet50_saam'])
def test_fastai_trains(name, image_folder):
    """Its `vision_learner`: pretrained weights and their mean and std, a step of one_cycle, and a prediction."""
    pytest.importorskip('fastai')
    from fastai.vision.all import Callback, ImageDataLoaders, Normalize, Resize, vision_learner

    class Gradients(Callback):
        def after_backward(self):
            gates = gate_parameters(self.learn.model)
            assert not [n for n, p in gates.items() if p.grad is None or not p.grad.isfinite().all()]
            self.learn.seen = len(gates)

    pretrained = name != 'resnet50_saam'
    dls = ImageDataLoaders.from_folder(image_folder, valid='test', item_tfms=Resize(32), bs=8, num_workers=0)
    learn = vision_learner(dls, name, pretrained=pretrained, cbs=Gradients())
    with learn.no_bar(), learn.no_logging():
        learn.unfreeze()
        learn.fit_one_cycle(1, 1e-3)
    assert learn.seen
    if pretrained:
        (norm,) = dls.after_batch.fs.filter(lambda f: isinstance(f, Normalize))
        mean = timm.get_pretrained_cfg(name).mean
        torch.testing.assert_close(norm.mean.flatten().cpu(), torch.tensor(mean))
    label, _, probabilities = learn.predict(next(Path(image_folder).rglob('*.png')))
    assert label in ('cat', 'dog') and probabilities.sum().item() == pytest.approx(1)


def test_snippets_of_the_readme(image_folder, monkeypatch):
    """fastai's and smp's run as they are; the detector's is above."""
    pytest.importorskip('fastai')
    pytest.importorskip('segmentation_models_pytorch')
    image_folder.joinpath('train').rename(image_folder.parent / 'photos')
    monkeypatch.chdir(image_folder.parent)
    for word in ('smp.Unet', 'vision_learner'):
        exec(snippet(word), {})
