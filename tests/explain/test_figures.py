"""What the figures are drawn from, and that every kind is drawn; how they look, no assertion can say."""

import numpy as np
import pytest
import timm
import torch
from captum.attr import LayerGradCam
from PIL import Image

import timm_poolattn
from timm_poolattn.explain.figures import explain, explain_figure, grad_cam, save

from ..cli.test_cli import fails, run


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / 'photo.jpg'
    Image.effect_noise((60, 40), 80).convert('RGB').save(path)
    return path


def texts(figure):
    return {text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, 'get_text'))}


def test_grad_cam_is_the_papers():
    """Selvaraju et al., Eq. 1-2: channels of the map weighted by their mean gradients, the positive part."""
    model = timm.create_model('resnet20_fa', pretrained=True).eval()
    x = torch.randn(1, 3, 32, 32)
    cams = grad_cam(model, x, [3, 5])
    a = model.forward_features(x).detach().requires_grad_()
    for cam, c in zip(cams, (3, 5), strict=True):
        (grad,) = torch.autograd.grad(model.forward_head(a)[0, c], a)
        expected = (grad.mean((2, 3), keepdim=True) * a).sum(1, keepdim=True).relu()
        expected = torch.nn.functional.interpolate(expected, (32, 32), mode='bilinear')[0, 0]
        np.testing.assert_allclose(cam, (expected / expected.max()).detach(), atol=1e-5)


def test_grad_cam_leaves_the_model_as_it_was(monkeypatch):
    model = timm.create_model('resnet20_saam').train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    grad_cam(model, torch.randn(1, 3, 32, 32), [0])
    monkeypatch.setattr(LayerGradCam, 'attribute', lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        grad_cam(model, torch.randn(1, 3, 32, 32), [0])
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_grad_cam_of_a_map_with_room(monkeypatch):
    """VGG-19 ends in a single position for 32x32 images, which would light up everywhere."""
    cam = grad_cam(timm.create_model('vgg19_fa'), torch.randn(1, 3, 32, 32), [0])[0]
    assert cam.std() > 0


@pytest.mark.parametrize(
    'name, says',
    [
        (
            'resnet20_spem',
            {r'SPEM: learned $\lambda$ of each block, the weight of max against min pooling', 'block 2.2'},
        ),
        ('resnet20_saam2', {'path 1', '2.2', 'SAAM: weights of the channels'}),
        ('resnet20_cbam', {'CBAM: weights of the channels', '2.2'}),
        ('resnet20_sge', {'group 7', '2.2'}),
        ('resnet20_fa', {'FA: k, how much of each block is used', 'stage 2', 'whole stage'}),
        ('vgg19_fase', {'FA: k, how much of each block is used', 'SE: weights of the channels', 'stem'}),
    ],
)
def test_every_gate(name, says, tmp_path):
    image = Image.effect_noise((60, 40), 80)
    figure = explain_figure({name: timm.create_model(name)}, image, 'title')
    assert says | {name, 'title', 'image, 60x40', 'as the model sees it, 32x32', 'prediction'} <= texts(figure)
    assert 'stage 0' not in texts(figure)
    with Image.open(save(figure, tmp_path / 'figure.png')) as written:
        assert written.width == 975
    assert not list(tmp_path.glob('.*'))


def test_skipped_blocks_are_marked():
    model = timm.create_model('resnet20_fa')
    assert 'skipped' not in texts(explain_figure({'fa': model}, Image.new('RGB', (32, 32))))
    model.set_skip_threshold(1.0)
    assert 'skipped' in texts(explain_figure({'fa': model}, Image.new('RGB', (32, 32))))


def test_gates_inserted_into_timms_models():
    model = timm_poolattn.insert(timm.create_model('test_resnet'), 'saam')
    assert 'SAAM: weights of the channels' in texts(explain_figure({'mine': model}, Image.new('RGB', (32, 32))))


def test_command(photo, tmp_path):
    out = tmp_path / 'figures'
    done = run('explain', photo, '--model', 'resnet20_saam', '--compare', 'resnet20_fa', '-o', out)
    assert done.stdout == f'1 figure in {out}: photo.png\n'
    with Image.open(out / 'photo.png') as image:
        assert image.width == 2 * 975


def test_images_of_the_same_name_do_not_overwrite_each_other(photo, tmp_path):
    other = tmp_path / 'other' / 'photo.jpg'
    other.parent.mkdir()
    photo.rename(tmp_path / 'photo.png')
    Image.new('L', (9, 9)).save(other)
    written = explain([tmp_path / 'photo.png', other], 'resnet20_fa', tmp_path / 'figures')
    assert len(set(written)) == 2 and all(path.is_file() for path in written)


def test_mistakes(photo, tmp_path):
    out = tmp_path / 'figures'
    (tmp_path / 'text.jpg').write_text('no image')
    mistakes = fails('explain', photo, tmp_path / 'text.jpg', '--model', 'resnet20_saam', '-o', out)
    assert 'text.jpg: cannot be read as an image (not an image)' in mistakes
    assert 'nowhere.jpg: no such file' in fails('explain', 'nowhere.jpg', '--model', 'resnet20_saam', '-o', out)
    assert 'resnet56_fa has no weights yet' in fails('explain', photo, '--model', 'resnet56_fa', '-o', out)
    assert not out.exists()


def test_a_model_without_gates(photo, tmp_path):
    from timm.models import save_for_hf

    save_for_hf(timm.create_model('resnet20', num_classes=2), tmp_path / 'plain', safe_serialization=True)
    plain, out = f'local-dir:{tmp_path / "plain"}', tmp_path / 'figures'
    assert f'{plain} has no gates to explain' in fails('explain', photo, '--model', plain, '-o', out)
    run('explain', photo, '--model', 'resnet20_fa', '--compare', plain, '-o', out)  # as a baseline it may stand beside
    assert (out / 'photo.png').is_file()
