"""What the figures are drawn from, and that every kind is drawn; how they look, no assertion can say."""

import numpy as np
import pytest
import timm
import torch
from captum.attr import LayerGradCam
from matplotlib.figure import Figure
from PIL import Image

import timm_poolattn
from timm_poolattn.explain.figures import _map_rows, explain, explain_figure, grad_cam, plain_text, save
from timm_poolattn.utils import UserError

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
    classes = model(x)[0].topk(2).indices.tolist()  # for others the map may be 0 all over
    cams = grad_cam(model, x, classes)
    a = model.forward_features(x).detach().requires_grad_()
    for cam, c in zip(cams, classes, strict=True):
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
    assert done.stdout == f'1 figure in {out}: photo.explain.png\n' and not done.stderr
    with Image.open(out / 'photo.explain.png') as image:
        assert image.width == 14 * 130


def test_images_of_the_same_name_do_not_overwrite_each_other(photo, tmp_path):
    photos = [tmp_path / name for name in ('a/x/photo.png', 'b/x/photo.jpg', 'b/x/photo.png', 'b/x/photo-2.jpg')]
    for path in photos:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('L', (9, 9)).save(path)
    written = explain([*photos, photos[0]], 'resnet20_fa', tmp_path / 'figures')
    assert len(set(written)) == 4 and all(path.is_file() for path in written)


def test_figures_stand_beside_the_images(photo, tmp_path):
    """A figure replaces an earlier one, and nothing else: no image, no file of another's making."""
    (tmp_path / 'photo.png').write_bytes(b'mine')
    before = photo.read_bytes()
    (figure,) = explain([photo], 'resnet20_fa', tmp_path)
    assert figure == tmp_path / 'photo.explain.png' and figure.stat().st_size > 10_000
    assert (tmp_path / 'photo.png').read_bytes() == b'mine' and photo.read_bytes() == before
    assert explain([photo], 'resnet20_fa', tmp_path) == [figure]
    with pytest.raises(UserError, match='would replace this image'):
        explain([photo, figure], 'resnet20_fa', tmp_path)
    Image.new('L', (9, 9)).save(figure)
    foreign = figure.read_bytes()
    for of in (photo, tmp_path / 'photo.jpg'):
        with pytest.raises(UserError, match='no figure of explain; move it'):
            explain([of], 'resnet20_fa', tmp_path)
    figure.unlink()
    figure.symlink_to(photo)
    with pytest.raises(UserError, match='would replace this image'):
        explain([photo], 'resnet20_fa', tmp_path)
    assert photo.read_bytes() == before and len(foreign) < 1000


def test_no_image_has_the_name_of_another_figures_temporary_file(photo, tmp_path):
    (tmp_path / '.photo.explain.tmp.png').write_bytes(b'mine')
    explain([photo], 'resnet20_fa', tmp_path)
    assert (tmp_path / '.photo.explain.tmp.png').read_bytes() == b'mine'
    assert {path.name for path in tmp_path.glob('.*')} == {'.photo.explain.tmp.png'}


def test_mistakes(photo, tmp_path):
    out = tmp_path / 'figures'
    assert 'nowhere.jpg: no such file' in fails('explain', photo, 'nowhere.jpg', '--model', 'resnet20_saam', '-o', out)
    assert 'resnet326_fa has no weights yet' in fails('explain', photo, '--model', 'resnet326_fa', '-o', out)
    assert not out.exists()
    with pytest.raises(UserError, match='cannot be written'):
        explain([photo], 'resnet20_fa', photo)
    with pytest.raises(UserError, match=r'a figure is \.png, \.svg or \.pdf'):
        save(Figure(), tmp_path / 'x.docx')


def test_a_broken_image_does_not_stop_the_others(photo, tmp_path):
    out = tmp_path / 'figures'
    (tmp_path / 'text.jpg').write_text('no image')
    message = fails('explain', tmp_path / 'text.jpg', photo, '--model', 'resnet20_fa', '-o', out)
    assert 'text.jpg cannot be decoded as an image' in message and '1 of 2 images are drawn' in message
    assert [path.name for path in out.iterdir()] == ['photo.explain.png']


@pytest.mark.parametrize(
    'text, printed',
    [
        ('US$1_$5', r'US\$1_\$5'),
        ('two\nlines', 'two lines'),
        ('caf\udce9.png', 'caf?.png'),  # a byte of a file name that is no UTF-8
        ('x' * 100, 'x' * 29 + '…' + 'x' * 30),
    ],
)
def test_names_are_text(text, printed):
    assert plain_text(text) == printed


def test_a_caption_stands_above_the_maps_however_many():
    for blocks in (3, 60):
        height, draw = _map_rows([(str(i), np.ones((4, 8, 8))) for i in range(blocks)], np.ones((8, 8)), 'SAAM', 'path')
        figure = Figure((7.5, height))
        draw(figure.subfigures())
        figure.draw_without_rendering()
        caption = figure.subfigs[0].texts[0].get_window_extent()
        assert all(ax.title.get_window_extent().y1 < caption.y0 for ax in figure.axes)


def renamed(model, names):
    model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': names}
    return model


def test_a_comparison_is_a_row_a_model(tmp_path):
    """Each says whose classes its Grad-CAMs are of. A name may be long, and hold what matplotlib reads as a formula."""
    names = [f'US$1_$ a class of a long name {i}' for i in range(100)]
    models = {
        'mine.cifar10': timm.create_model('resnet20_saam2'),
        'other.cifar100': renamed(timm.create_model('resnet20_sge', num_classes=100), names),
        'plain': timm.create_model('resnet20'),
        'one class': timm.create_model('resnet20_fase', num_classes=1),
    }
    figure = explain_figure(models, Image.effect_noise((3000, 40), 80), 'a $photo$.jpg')
    save(figure, tmp_path / 'figure.png')
    with Image.open(tmp_path / 'figure.png') as written:
        assert written.size == (14 * 130, pytest.approx((1.75 + 2.3 * 4) * 130, abs=1))
    says = texts(figure)
    assert {f'Grad-CAM, classes most probable to {n}' for n in ('mine.cifar10', 'other.cifar100', 'one class')} <= says
    assert {r'a \$photo\$.jpg', 'no gates', 'plain', 'Grad-CAM, classes most probable to mine.cifar10'} <= says
    assert 'SAAM: score map V of each block, 8 of 9, mean of 2 paths (number: its peak over its mean)' in says
    assert any(text.startswith(r'US\$1_\$ a') and len(text) < 25 for text in says)


def test_grey_and_damaged_models():
    grey = timm.create_model('resnet20_spem', in_chans=1)
    grey.pretrained_cfg = {**grey.pretrained_cfg, 'input_size': (1, 32, 32), 'mean': (0.5,), 'std': (0.25,)}
    explain_figure({'grey': grey}, Image.new('RGB', (32, 32)))
    damaged = timm.create_model('resnet20_spem')
    torch.nn.init.constant_(damaged.get_classifier().weight, torch.nan)
    with pytest.raises(UserError, match='damaged: its outputs are not finite'):
        explain_figure({'damaged': damaged}, Image.new('RGB', (32, 32)))


@pytest.mark.parametrize('name', ['test_vit', 'swin_tiny_patch4_window7_224'])
def test_a_model_without_maps_of_channels(name):
    model = timm.create_model(name)
    with pytest.raises(UserError, match='no map of channels for Grad-CAM'):
        grad_cam(model, torch.randn(1, *model.default_cfg['input_size']), [0])


def test_a_model_without_gates(photo, tmp_path):
    from timm.models import save_for_hf

    save_for_hf(timm.create_model('resnet20', num_classes=2), tmp_path / 'plain', safe_serialization=True)
    plain, out = f'local-dir:{tmp_path / "plain"}', tmp_path / 'figures'
    assert f'{plain} has no gates to explain' in fails('explain', photo, '--model', plain, '-o', out)
    run('explain', photo, '--model', 'resnet20_fa', '--compare', plain, '-o', out)  # as a baseline it may stand beside
    assert (out / 'photo.explain.png').is_file()
