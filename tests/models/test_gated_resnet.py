import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import EcaModule
from timm.models import group_parameters
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from timm_poolattn import FaResNet
from timm_poolattn.layers import SAAM, SPEM, FocusAssociation, IdentityInit
from timm_poolattn.utils import UserError

from .insertion_table import alpha_of

NAMES = timm.list_models(module='gated_resnet')
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
#: Of every length of stage that the real ones have, but the longest.
SMALL = dict(layers=(3, 1, 2, 1))


def backbone(path, name='resnet50', **kwargs):
    """timm's, with batch norms that do something, and its weights in a file."""
    model = ResNet(Bottleneck, **kwargs) if kwargs else timm.create_model(name)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.running_mean, std=0.1)
    save_file(model.state_dict(), path)
    return model.eval()


def test_names():
    gates = ('fa', 'saam', 'spem')
    assert [f'{b}_{g}' for b in ('resnet50', 'resnext50_32x4d') for g in gates] == NAMES
    assert timm.list_models('resnet50_s*m', module='gated_resnet') == ['resnet50_saam', 'resnet50_spem']


@pytest.mark.parametrize('name', NAMES)
def test_is_timms_resnet_and_its_gates(name):
    """The gates of the papers on C = 256, 512, 1024, 2048, with 3, 4, 6, 3 blocks, and nothing else."""
    plain, _, gate = name.rpartition('_')
    with torch.device('meta'):
        model, plain = timm.create_model(name), timm.create_model(plain)
    stages = list(zip((256, 512, 1024, 2048), (3, 4, 6, 3), strict=True))

    def fa(c, i):  # the focus and the association of block or stage i
        return c * (c // 4) + c // 4 + c // 4 + 1 + (i > 1) * (i * 4 * i + 4 * i + 4 * i + 1)

    expected = dict(
        spem=sum(n * (4 * c + 2) for c, n in stages),
        saam=sum(n * (c * c // 2 + 25) for c, n in stages),
        fa=sum(fa(c, i) for c, n in stages for i in range(1, n)) + sum(fa(stages[s][0], s) for s in (1, 2, 3)),
    )
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert isinstance(model, ResNet) and model.gate == gate
    assert count(model) - count(plain) == expected[gate]
    for key in ('input_size', 'num_classes', 'first_conv', 'classifier', 'mean', 'std', 'pool_size'):
        assert model.pretrained_cfg[key] == plain.pretrained_cfg[key]
    assert model.feature_info == plain.feature_info and model.get_classifier(name_only=True) == 'fc'


@pytest.mark.parametrize('name', [*NAMES[:3], pytest.param(NAMES[3], marks=pytest.mark.slow)])
def test_starts_from_the_plain_backbone(name, tmp_path):
    path = tmp_path / 'plain.safetensors'
    plain = backbone(path, name.rpartition('_')[0])
    kwargs = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    model = timm.create_model(name, identity_init=True, **kwargs).eval()
    torch.testing.assert_close(model(X), plain(X), rtol=1e-4, atol=1e-4)
    # training then moves the gates
    model.train()(X).square().sum().backward()
    gates = [m for m in model.modules() if isinstance(m, IdentityInit | FocusAssociation)]
    assert len(gates) == (12 + 3 if name.endswith('fa') else 16) and all(alpha_of(m).grad != 0 for m in gates)
    # new classes on the old features
    assert timm.create_model(name, num_classes=7, in_chans=1, **kwargs)(X[:, :1]).shape == (2, 7)


def test_without_identity_init_the_gates_are_the_papers(tmp_path):
    path = tmp_path / 'plain.safetensors'
    plain = backbone(path, layers=SMALL['layers'])
    kwargs = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **SMALL)
    model = timm.create_model('resnet50_spem', gate_kwargs=dict(reweight='max'), **kwargs).eval()
    assert model.layer1[0].se.reweight == 'max' and isinstance(model.layer1[0].se, SPEM)
    assert isinstance(timm.create_model('resnet50_saam', **SMALL).layer1[0].se, SAAM)
    weights = model.state_dict()
    assert all(weights[name].equal(weight) for name, weight in plain.state_dict().items())
    assert not torch.allclose(model(X), plain(X), rtol=1e-2, atol=1e-2)


def test_timms_arguments_of_blocks():
    """FA lies over blocks, which may have a gate of timm's in them; a gate in the blocks leaves no room for another."""
    model = timm.create_model('resnet50_fa', block_args=dict(attn_layer='eca'), **SMALL)
    assert isinstance(model.layer1.blocks[0].se, EcaModule)
    with pytest.raises(UserError, match=r"block_args: its attn_layer .* gate='saam'"):
        timm.create_model('resnet50_saam', block_args=dict(attn_layer='eca'), **SMALL)


def test_fa_takes_the_weights_of_a_network_with_se(tmp_path):
    plain = timm.create_model('seresnet50', layers=SMALL['layers']).state_dict()
    save_file(plain, tmp_path / 'se.safetensors')
    kwargs = dict(gate='fase', gate_kwargs=dict(rd_ratio=1 / 16, rd_divisor=8), **SMALL)
    overlay = dict(file=str(tmp_path / 'se.safetensors'))
    weights = timm.create_model('resnet50_fa', pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).state_dict()
    for name in ('se.fc1.weight', 'conv2.weight', 'bn3.running_var'):
        assert weights[f'layer3.blocks.1.{name}'].equal(plain[f'layer3.1.{name}'])
    assert weights['layer3.shortcut.1.weight'].equal(plain['layer3.0.downsample.1.weight'])


@pytest.mark.parametrize('gate', ['saam', 'fa'])
def test_checkpoints(gate, tmp_path):
    name, path = f'resnet50_{gate}', tmp_path / 'own.safetensors'
    model = timm.create_model(name, identity_init=True, **SMALL).eval()
    for module in model.modules():
        if hasattr(module, 'alpha'):
            nn.init.constant_(module.alpha, 0.7)
    save_file(model.state_dict(), path)
    kwargs = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **SMALL)
    assert timm.create_model(name, identity_init=True, **kwargs).eval()(X).equal(model(X))
    with pytest.raises(RuntimeError, match='Unexpected key'):  # the papers' gates have no alpha
        timm.create_model(name, **kwargs)
    plain = backbone(path, layers=SMALL['layers']).state_dict()
    del plain['layer1.0.conv2.weight']
    save_file(plain, path)
    with pytest.raises(RuntimeError, match='Missing key'):
        timm.create_model(name, **kwargs)


def test_fa_wiring():
    """Blocks and stages by Eq. 2-9 and Fig. 4, written out."""
    model = timm.create_model('resnet50_fa', **SMALL).eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
    x = model.maxpool(model.act1(model.bn1(model.conv1(X))))
    b0, b1, b2 = model.layer1.blocks  # the benchmark stage has no gate of its own
    x1 = b0(x, model.layer1.shortcut(x))
    k1 = b1.fa.focus(x1)
    x2 = x1 + (b1(x1, x1) - x1) * k1[..., None, None]
    k2 = b2.fa.association(torch.cat([k1, b2.fa.focus(x2)], dim=1))
    x = x2 + (b2(x2, x2) - x2) * k2[..., None, None]
    ks = []
    for layer in (model.layer2, model.layer3, model.layer4):
        matched = layer.shortcut(x)
        k = layer.fa.focus(matched)
        if ks:
            k = layer.fa.association(torch.cat([*ks, k], dim=1))
        ks.append(k)
        u = layer.blocks[0](x, matched)
        for block in list(layer.blocks)[1:]:
            u = u + (block(u, u) - u) * block.fa.focus(u)[..., None, None]
        x = matched + (u - matched) * k[..., None, None]
    torch.testing.assert_close(model.forward_features(X), x, rtol=1e-4, atol=1e-4)
    final, intermediates = model.forward_intermediates(X)
    assert final.equal(intermediates[-1])
    torch.testing.assert_close(final, x, rtol=1e-4, atol=1e-4)


def test_fa_as_any_of_timms():
    model = timm.create_model('resnet50_fa', drop_path_rate=0.1, **SMALL).eval()
    expected = model(X)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(X), expected)
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert len(groups) == (1 + 4 if coarse else 1 + 7) + 1  # stem, stages or blocks, head
    model.set_skip_threshold(1.0)
    ran = []
    for m in model.modules():
        if isinstance(m, Bottleneck):
            m.register_forward_hook(lambda *_: ran.append(1))
    model(X)
    assert len(ran) == 1  # B_0 of the benchmark stage: every k is below 1
    model.set_skip_threshold(0)
    assert model(X).equal(expected)


def test_mistakes():
    with pytest.raises(ValueError, match=r"unknown gate 'foo'; choose from se,.* for GatedResNet"):
        timm.create_model('resnet50_spem', gate='foo')
    with pytest.raises(ValueError, match="unknown gate 'spem'; choose from fa, fase; for FaResNet"):
        FaResNet((1, 1, 1, 1), gate='spem')
    with pytest.raises(ValueError, match=r'SAAM: rd_ratio=0\.001 leaves no hidden channel of 256; 1/256 does'):
        timm.create_model('resnet50_saam', gate_kwargs=dict(rd_ratio=0.001))
    with pytest.raises(ValueError, match="are of a channel gate, and gate='fa' is none"):
        timm.create_model('resnet50_fa', gate_kwargs=dict(rd_ratio=0.5))
