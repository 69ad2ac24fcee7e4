import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils import parametrizations, prune

from timm_poolattn import CifarResNet
from timm_poolattn.layers import GATES, REWEIGHT_FORMS
from timm_poolattn.papers import DATASETS

NAMES = timm.list_models(module='cifar_resnet')


def test_every_gate_on_every_depth():
    gates = ['', *(f'_{gate}' for gate in GATES), '_fa', '_fase']
    depths = (20, 32, 44, 56, 110, 83, 164, 245, 326)
    assert sorted(NAMES) == sorted(f'resnet{d}{g}' for d in depths for g in gates)
    tagged = timm.list_models(include_tags=True, module='cifar_resnet')
    assert sorted(tagged) == sorted(f'{name}.{tag}' for name in NAMES for tag in DATASETS)


@pytest.mark.parametrize('flavour', ['saam', 'fa', 'spem'])
@pytest.mark.parametrize('block', ['basic', 'bottleneck'])
def test_flavours(flavour, block):
    model = CifarResNet(20, block=block, flavour=flavour)
    kernels = [s.shortcut[0].kernel_size[0] if isinstance(s.shortcut, nn.Sequential) else None for s in model.stages]
    kernel = 3 if flavour == 'fa' else 1
    first = kernel if block == 'bottleneck' or flavour == 'saam' else None
    assert kernels == [first, kernel, kernel]


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(depth=57), r'depth=57 must be 6n\+2 with basic blocks; nearest are 56 and 62'),
        (dict(depth=3), r'nearest are 8 and 14'),
        (
            dict(depth=165, block='bottleneck'),
            r'depth=165 must be 9n\+2 with bottleneck blocks; nearest are 164 and 173',
        ),
        (dict(gate='foo'), "unknown gate 'foo'; choose from se,.*; or None, for CifarResNet"),
        (dict(gate_kwargs=dict(rd_ratio=1 / 8)), 'are of a channel gate, and gate=None is none'),
        (dict(gate='fa', gate_kwargs=dict(rd_ratio=1 / 8)), "are of a channel gate, and gate='fa' is none"),
        (dict(gate='se', gate_kwargs=dict(rd_ratio=1 / 32)), 'SEModule: .* leaves no hidden channel of 16; 1/16 does'),
        (dict(gate='se2', gate_kwargs=dict(rd_ratio=1 / 32)), 'ChannelAttn: .* leaves no hidden channel of 16'),
        (dict(gate='cbam', gate_kwargs=dict(rd_ratio=1 / 32)), 'CBAM: .* leaves no hidden channel of 16'),
        (dict(gate='saam', gate_kwargs=dict(rd_ratio=0)), 'SAAM: .* leaves no hidden channel of 16'),
        (dict(gate='sge', gate_kwargs=dict(groups=32)), 'SGE: groups=32 must divide channels=16'),
        (dict(flavour='foo'), "unknown flavour 'foo'; choose from saam, fa, spem"),
        (dict(block='foo'), "unknown block 'foo'"),
    ],
)
def test_constructor_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CifarResNet(**kwargs)


def test_any_other_depth():
    basic, bottleneck = CifarResNet(26, gate='saam'), CifarResNet(29, block='bottleneck', gate='spem')
    assert [len(stage.blocks) for stage in basic.stages] == [4, 4, 4]
    assert [len(stage.blocks) for stage in bottleneck.stages] == [3, 3, 3]


def test_no_weight_decay_is_the_saam_papers():
    """Every parameter decays, 1-d ones too, but those of the SAAM paper's gates."""

    def undecayed(name, **kwargs):
        model = timm.create_model(name, **kwargs)
        optimizer = create_optimizer_v2(model, 'momentum', lr=0.1, weight_decay=1e-4, filter_bias_and_bn=False)
        assert not optimizer.defaults['nesterov']
        ids = {id(p) for g in optimizer.param_groups if g['weight_decay'] == 0 for p in g['params']}
        return model, {n for n, p in model.named_parameters() if id(p) in ids}

    model, names = undecayed('resnet20_saam')
    assert names == {n for n, _ in model.named_parameters() if '.gate.' in n} and len(names) == 9 * 3
    assert undecayed('resnet20_se')[1]
    for name in ('resnet20', 'resnet20_fase', 'resnet83_spem', 'resnet20_spem'):
        assert not undecayed(name)[1]


def test_tiny_imagenet_form():
    model = timm.create_model('resnet56_fa.tiny_imagenet')
    assert model.num_classes == 200 and model.conv1.stride == (2, 2)
    assert model.forward_features(torch.randn(1, 3, 64, 64)).shape == (1, 64, 8, 8)
    assert [info['reduction'] for info in model.feature_info] == [2, 4, 8]


def entered(model: nn.Module, size: int = 32) -> list[str]:
    """Names of modules, in order of their first call."""
    order: dict[str, None] = {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: order.setdefault(name))
    model.eval()(torch.randn(1, 3, size, size))
    return list(order)


def test_k_is_known_before_its_block_runs():
    """k_i depends on X_i and earlier k only (Eq. 2), never on U_i: where a block may be skipped, it comes first."""
    model = timm.create_model('resnet20_fa')
    model.set_skip_threshold(1e-9)
    order = entered(model)
    assert order.index('stages.1.fa') < order.index('stages.1.blocks.0')
    assert order.index('stages.1.blocks.2.fa') < order.index('stages.1.blocks.2')


@pytest.mark.parametrize('name', ['resnet20_fa', 'resnet20_fase', 'resnext29_fa', 'vgg19_fa', 'inception_v4_fa'])
def test_a_module_is_called_before_its_children(name):
    """torchinfo counts the parameters of a child twice that runs first."""
    order = {name: i for i, name in enumerate(entered(timm.create_model(name)))}
    parents = {name: '.'.join(name.split('.')[:-1]) for name in order if name}
    assert len(order) > 50 and all(order[parent] < order[name] for name, parent in parents.items() if parent in order)


def test_fa_wiring():
    """A stage by Eq. 2-9 and Fig. 4, written out."""
    model = timm.create_model('resnet20_fa').eval()
    stage = model.stages[1]
    x = torch.randn(2, 16, 32, 32)
    matched = stage.shortcut(x)
    k_stage = stage.fa.focus(matched)
    b0, b1, b2 = stage.blocks
    x1 = b0(x, matched)
    k1 = b1.fa.focus(x1)
    x2 = x1 + (b1(x1, x1) - x1) * k1[..., None, None]
    k2 = b2.fa.association(torch.cat([k1, b2.fa.focus(x2)], dim=1))
    x3 = x2 + (b2(x2, x2) - x2) * k2[..., None, None]
    expected = matched + (x3 - matched) * k_stage[..., None, None]
    ks = []
    torch.testing.assert_close(stage(x, ks), expected)
    torch.testing.assert_close(ks, [k_stage])


@pytest.mark.parametrize('reweight', REWEIGHT_FORMS)
def test_ablations_by_create_model(reweight):
    model = timm.create_model('resnet83_spem', depth=20, gate_kwargs=dict(reweight=reweight)).eval()
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)


# The SPEM authors' published network, written out from its layout: parameter names and shapes as in their checkpoints.


def authors_state_dict(n):
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    sd = {}

    def bn(name, c):
        sd.update({f'{name}.weight': rand(c).abs() + 0.5, f'{name}.bias': rand(c) * 0.1})
        sd.update({f'{name}.running_mean': rand(c) * 0.1, f'{name}.running_var': rand(c).abs() + 0.5})
        sd[f'{name}.num_batches_tracked'] = torch.tensor(7)

    def conv(name, out, inp, k):
        sd[f'{name}.weight'] = rand(out, inp, k, k) / (inp * k * k) ** 0.5

    conv('conv1', 16, 3, 3)
    bn('bn1', 16)
    inp = 16
    for s, width in enumerate((16, 32, 64), 1):
        for i in range(n):
            b = f'layer{s}.{i}'
            for j, (o, c, k) in enumerate(((width, inp, 1), (width, width, 3), (4 * width, width, 1)), 1):
                conv(f'{b}.conv{j}', o, c, k)
                bn(f'{b}.bn{j}', o)
            for name in ('w1', 'b1', 'w2', 'b2'):
                sd[f'{b}.{name}'] = rand(1, 4 * width, 1, 1)
            sd[f'{b}.p'] = rand(2)
            if i == 0:
                conv(f'{b}.downsample.0', 4 * width, inp, 1)
                bn(f'{b}.downsample.1', 4 * width)
            inp = 4 * width
    sd.update({'fc.weight': rand(10, 256) / 16, 'fc.bias': rand(10)})
    return sd


def authors_forward(sd, x, n):
    F = nn.functional

    def bn(x, name):
        stats = (sd[f'{name}.running_mean'], sd[f'{name}.running_var'])
        return F.batch_norm(x, *stats, sd[f'{name}.weight'], sd[f'{name}.bias'])

    x = F.conv2d(x, sd['conv1.weight'], padding=1)
    x = bn(x, 'bn1').relu()
    for s in (1, 2, 3):
        for i in range(n):
            b, stride = f'layer{s}.{i}', 2 if s > 1 and i == 0 else 1
            out = bn(F.conv2d(x, sd[f'{b}.conv1.weight']), f'{b}.bn1').relu()
            out = bn(F.conv2d(out, sd[f'{b}.conv2.weight'], stride=stride, padding=1), f'{b}.bn2').relu()
            out = bn(F.conv2d(out, sd[f'{b}.conv3.weight']), f'{b}.bn3')
            largest = F.adaptive_max_pool2d(out, 1) * sd[f'{b}.w2'] + sd[f'{b}.b2']
            smallest = -F.adaptive_max_pool2d(-out, 1) * sd[f'{b}.w2'] + sd[f'{b}.b2']
            share = sd[f'{b}.p'] ** 2 / (sd[f'{b}.p'] ** 2).sum()
            mix = (share[0] * largest + share[1] * smallest) * sd[f'{b}.w1'] + sd[f'{b}.b1']
            out = out * (largest + smallest).sigmoid() * mix.sigmoid()
            if i == 0:
                x = bn(F.conv2d(x, sd[f'{b}.downsample.0.weight'], stride=stride), f'{b}.downsample.1')
            x = (out + x).relu()
    return F.linear(x.mean((2, 3)), sd['fc.weight'], sd['fc.bias'])


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_authors_checkpoint_gives_the_same_logits(tmp_path, prefix):
    n = 2
    sd = authors_state_dict(n)
    path = tmp_path / 'model_best.pth'
    torch.save({'state_dict': {prefix + k: v for k, v in sd.items()}}, path)
    model = timm.create_model(
        'resnet164_spem',
        depth=20,
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(path)),
        gate_kwargs=dict(reweight='public'),
    ).eval()
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(model(x), authors_forward(sd, x, n), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['resnet20', 'resnet20_fa', 'resnet20_saam', 'resnet83_spem', 'resnext29_fase'])
def test_reparameterized_for_inference(name):
    model = timm.create_model(name)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    x = torch.randn(2, 3, 32, 32)
    folded = reparameterize_model(model).eval()  # timm's validate.py folds before eval()
    model.eval()
    norms = [name for name, m in folded.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(name == 'bn1' or '.shortcut.' in name for name in norms)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_what_cannot_be_folded_stays():
    """Weights that are made from others, and norms without statistics, beside a block that folds."""
    model = timm.create_model('resnet20_saam').eval()
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        model.train()(x)
        pruned, parametrised, untracked, *_ = (stage.blocks[0] for stage in model.stages)
        for i in (1, 2):
            prune.l1_unstructured(getattr(pruned, f'conv{i}'), 'weight', 0.5)
            parametrizations.weight_norm(getattr(parametrised, f'conv{i}'))
            norm = getattr(untracked, f'bn{i}')
            norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
        expected = model.eval()(x)
        reparameterize_model(model, inplace=True)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and '.bn' in name]
    assert norms == [f'stages.{s}.blocks.0.bn{i}' for s in range(3) for i in (1, 2)]
