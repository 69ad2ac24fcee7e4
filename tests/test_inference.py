import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from timm_poolattn.inference import calibration_error, class_names, evaluate, load_data, model_input, predict, view_of
from timm_poolattn.utils import UserError


@pytest.mark.parametrize('in_chans', [1, 3])
def test_model_input_is_timms(in_chans):
    """For `predict` and `explain` alike; a grey model takes a colour image, and the other way round."""
    cfg = dict(input_size=(in_chans, 32, 32), mean=(0.4,) * in_chans, std=(0.2,) * in_chans, crop_pct=0.9)
    model = timm.create_model('resnet20', in_chans=in_chans, pretrained_cfg_overlay=cfg)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
    wanted = create_transform(**resolve_data_config(model=model))(image.convert('L' if in_chans == 1 else 'RGB'))
    torch.testing.assert_close(model_input(model, image), wanted[None], rtol=0, atol=1e-6)
    grey = image.convert('L')
    assert model_input(model, grey).shape == (1, in_chans, 32, 32)


def test_other_channels_than_the_weights():
    model = timm.create_model('resnet20_saam.cifar10', pretrained=True, in_chans=1).eval()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8))
    cfg = model.pretrained_cfg
    wanted = (torch.from_numpy(np.asarray(image).copy()) / 255 - sum(cfg['mean']) / 3) / (sum(cfg['std']) / 3)
    torch.testing.assert_close(model_input(model, image), wanted[None, None])


def test_a_size_for_tests_is_taken():
    """As timm's validate.py does: most of timm's ImageNet weights have one."""
    cfg = dict(test_input_size=(3, 40, 40), test_crop_pct=1.0, crop_pct=0.9)
    model = timm.create_model('resnet20', pretrained_cfg_overlay=cfg)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
    wanted = create_transform(**resolve_data_config(model=model, use_test_size=True))(image)
    assert wanted.shape == (3, 40, 40) and view_of(model).crop_pct == 1
    torch.testing.assert_close(model_input(model, image), wanted[None], rtol=0, atol=1e-6)


def test_model_input_names_what_it_refuses():
    with pytest.raises(UserError, match=r'wall\.png: 100000x1 pixels are too elongated'):
        model_input(timm.create_model('resnet20'), Image.new('RGB', (100_000, 1)), 'wall.png')


def test_calibration_error_is_the_papers_equation():
    """Eq. 3 of Guo et al. (2017) written out bin by bin: sum of |B_m| / n * |acc(B_m) - conf(B_m)|."""
    confidence = torch.rand(500, dtype=torch.float64).clamp(0.1)
    confidence[:3] = torch.tensor([1 / 15, 2 / 15, 1.0])  # the edges belong to the bin below them
    hit = torch.rand(500) < confidence
    total = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if inside.any():
            gap = hit[inside].double().mean() - confidence[inside].mean()
            total += inside.sum().item() / 500 * gap.abs().item()
    assert calibration_error(confidence, hit) == pytest.approx(100 * total, rel=1e-9)


def test_calibration_error_extremes():
    sure = torch.ones(10)
    assert calibration_error(sure, torch.ones(10, dtype=torch.bool)) == 0
    assert calibration_error(sure, torch.zeros(10, dtype=torch.bool)) == 100
    half = torch.arange(10) % 2 == 0
    assert calibration_error(torch.full((10,), 0.5), half) == 0  # right as often as it says
    assert calibration_error(torch.full((10,), 0.9), half) == pytest.approx(40, rel=1e-6)


@pytest.mark.parametrize('classes', [2, 12])
def test_a_new_head_has_other_classes(image_folder, classes):
    """Its config still names those of the weights."""
    model = timm.create_model('resnet20_saam', pretrained=True, num_classes=classes).eval()
    assert class_names(model) == [str(i) for i in range(classes)]
    (row,) = predict(model, [next((image_folder / 'test' / 'cat').iterdir())], topk=classes)
    assert {p['label'] for p in row['predictions']} == set(class_names(model))
    data = load_data(model, image_folder, 'test')
    if classes == 2:  # the data's, in order
        assert evaluate(model, data)['images'] == 8
    else:
        with pytest.raises(UserError, match='does not name its 12 classes, and the data have 2: which of them are'):
            evaluate(model, data)
