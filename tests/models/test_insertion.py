import copy
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock
from torch import nn
from torch.ao import quantization
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

import timm_poolattn
from timm_poolattn.layers import GATES, Focus, FocusAssociation
from timm_poolattn.models import FAMILIES, save_model
from timm_poolattn.models.insertion import InsertedGate, InsertedStage
from timm_poolattn.utils import UserError

from . import insertion_table
from .insertion_table import alpha_of, assert_same_state, gates_of, state_of
from .test_tools import Wrapper

#: One small model of each family, how many residual blocks it has, and how many of them FA gates.
MODELS = {
    'resnet18': (8, 4),
    'resnet26': (8, 4),
    'resnext26ts': (8, 4),
    'resnetv2_18': (8, 4),
    'regnetx_002': (13, 9),
    'regnety_002': (13, 9),
    'convnext_atto': (12, 8),
    'efficientnet_b0': (9, 9),
    'seresnet18': (8, 4),
}
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def create(name, **kwargs):
    """With batch norms that do something, as in a trained model."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **kwargs)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.1)
        if isinstance(getattr(m, 'gamma', None), nn.Parameter):  # ConvNeXt's layer scale starts at 1e-6
            nn.init.constant_(m.gamma, 0.5)
    return model.eval()


@pytest.mark.parametrize('gate', ['saam', 'fa'])
@pytest.mark.parametrize('name', MODELS)
def test_insertion_changes_nothing_and_removal_undoes_it(name, gate):
    model = create(name)
    keys, before = list(model.state_dict()), model(X)
    assert timm_poolattn.insert(model, gate) is model and not model.training
    gates = gates_of(model)
    assert len(gates) == MODELS[name][gate == 'fa']
    torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for module in gates:
            alpha_of(module).fill_(1.0)
    assert not torch.allclose(model(X), before, rtol=1e-2, atol=1e-2)
    assert timm_poolattn.remove(model) is model
    assert list(model.state_dict()) == keys and model(X).equal(before)


@pytest.mark.parametrize('gate', ['spem', 'saam', 'se', 'cbam', 'fa'])
def test_training_moves_the_gate(gate):
    model = timm_poolattn.insert(create('resnet18'), gate).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    gates = gates_of(model)
    start = [p.clone() for p in gates[-1].parameters() if p.ndim]
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.arange(4)).backward()
        optimizer.step()
    assert all(alpha_of(m) != 0 for m in gates)
    assert any(not p.equal(s) for p, s in zip([p for p in gates[-1].parameters() if p.ndim], start, strict=True))


def test_fa_wiring():
    """Runs of blocks by Eq. 2-9, written out: block 0 ungated, block 2 associated with k_1."""
    model = create('resnet50')
    stage = timm_poolattn.insert(model, 'fa', identity_init=False).layer1[0]
    assert isinstance(stage, InsertedStage) and [b.fa and b.fa.index for b in stage.blocks] == [None, 1, 2]
    assert [b.fa.index for b in model.layer3[0].blocks[1:]] == [1, 2, 3, 4, 5]
    x = torch.randn(2, 64, 16, 16)
    b0, b1, b2 = stage.blocks
    x1 = b0.block(x)
    k1 = b1.fa.focus(x1)
    x2 = x1 + (b1.block(x1) - x1) * k1[..., None, None]
    k2 = b2.fa.association(torch.cat([k1, b2.fa.focus(x2)], dim=1))
    x3 = x2 + (b2.block(x2) - x2) * k2[..., None, None]
    torch.testing.assert_close(model.layer1(x), x3, rtol=1e-4, atol=1e-4)


def test_runs_end_where_the_shape_changes():
    """The blocks of all stages side by side, in a network without timm's config."""
    blocks = [b for stage in (1, 2) for b in create('resnet18').get_submodule(f'layer{stage}')]
    model = nn.Sequential(nn.Conv2d(3, 64, 3), *blocks).eval()
    expected = model(X)
    timm_poolattn.insert(model, 'fa')
    assert [type(m) for m in model[1:]] == [InsertedStage, nn.Identity, InsertedStage, nn.Identity]
    assert [m.fc1.in_features for m in model.modules() if isinstance(m, Focus)] == [64, 128]
    assert model(X).equal(expected) and list(timm_poolattn.remove(model)[1:]) == blocks


@pytest.mark.parametrize(
    'name, gate',
    [('resnet18', 'spem'), ('resnet18', 'fa')]
    + [
        pytest.param(name, gate, marks=pytest.mark.slow)
        for name in ('resnetv2_18', 'resnext26ts', 'regnetx_002', 'convnext_atto', 'efficientnet_b0')
        for gate in ('spem', 'fa')
    ],
)
def test_a_model_as_any_other(name, gate):
    """Copied, saved and loaded, compiled, scripted, checkpointed, and read for features."""
    model = timm_poolattn.insert(create(name), gate)
    with torch.no_grad():
        for module in gates_of(model):
            alpha_of(module).fill_(0.5)
    expected = model(X)
    other = timm_poolattn.insert(create(name), gate)
    other.load_state_dict(model.state_dict())
    assert copy.deepcopy(model)(X).equal(expected) and other(X).equal(expected)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(X), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.jit.script(model)(X), expected, rtol=1e-4, atol=1e-4)
    final, intermediates = model.forward_intermediates(X)
    torch.testing.assert_close(final, model.forward_features(X), rtol=1e-4, atol=1e-4)
    assert [f.shape[1] for f in intermediates] == [info['num_chs'] for info in model.feature_info]
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)  # the blocks are run with their gates
    model.train()(X).sum().backward()
    assert all(alpha_of(module).grad is not None for module in gates_of(model))


def test_skipping():
    model = timm_poolattn.insert(create('resnet26'), 'fa', identity_init=False)
    plain = model(X)
    timm_poolattn.set_skip_threshold(model, 1.0)  # k < 1: only B_0 of each stage runs
    ran = []
    for m in model.modules():
        if hasattr(m, 'drop_path'):
            m.register_forward_hook(lambda m, args, out: ran.append(len(args[0])))
    model(X)
    assert ran == [2, 2, 2, 2]
    timm_poolattn.set_skip_threshold(model, 0)
    assert model(X).equal(plain)


def test_without_identity_init_and_with_arguments():
    model = create('resnet18')
    before = model(X)
    timm_poolattn.insert(model, 'spem', identity_init=False, fixed_lambda=0.3)
    assert not torch.allclose(model(X), before, rtol=1e-2, atol=1e-2)
    gates = [m.gate for m in model.modules() if isinstance(m, InsertedGate)]
    assert [len(g.gamma_exc) for g in gates] == [64, 64, 128, 128, 256, 256, 512, 512]
    assert all(g.fixed_lambda == 0.3 for g in gates)


def test_other_input_channels():
    model = timm_poolattn.insert(create('resnet18', in_chans=1), 'saam')
    assert model(X[:, :1]).shape == (2, 10)


@pytest.mark.parametrize('gate', ['saam', 'fa'])
def test_drop_path_stays(gate):
    model = timm.create_model('resnet18', drop_path_rate=0.5)
    rates = [m.drop_path.drop_prob for m in model.modules() if getattr(m, 'drop_path', None) is not None]
    timm_poolattn.insert(model, gate)
    assert rates == [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)] and len(rates) == 7


def test_init_weights_leaves_the_gates():
    model = timm_poolattn.insert(timm.create_model('resnet20'), 'saam')
    gates = [m for m in model.modules() if isinstance(m, InsertedGate)]
    before = copy.deepcopy([gate.state_dict() for gate in gates])
    model.init_weights()
    torch.testing.assert_close([gate.state_dict() for gate in gates], before, rtol=0, atol=0)


def test_the_penalty_is_found():
    from timm_poolattn.training import PenaltyTask

    model = timm_poolattn.insert(create('resnet18'), 'spem')
    assert PenaltyTask(model, nn.CrossEntropyLoss()).penalty().item() == 8 * 0.5


class Block(nn.Module):
    """A residual block of `width` channels, with its map seen by drop_path as `layout` has it."""

    def __init__(self, width=8, branches=1, channels_last=False):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.drop_path = None
        self.branches = branches
        self.channels_last = channels_last

    def forward(self, x):
        for _ in range(self.branches):
            u = self.conv(x)
            u = u.movedim(1, -1) if self.channels_last else u
            u = u if self.drop_path is None else self.drop_path(u)
            x = x + (u.movedim(-1, 1) if self.channels_last else u)
        return x


class Net(nn.Module):
    """Runs blocks as `order` says."""

    def __init__(self, blocks, order=None, size=None, **attributes):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.blocks = nn.Sequential(*blocks)
        self.order = order
        self.size = size
        vars(self).update(attributes)

    def forward(self, x):
        assert self.size in (None, x.shape[-1])
        x = self.stem(x)
        order = range(len(self.blocks)) if self.order is None else self.order(x) if callable(self.order) else self.order
        maps = [x]
        for i in order:
            maps.append(self.blocks[i](maps[-1]))
        return sum(maps) if getattr(self, 'dense', False) else maps[-1]


@pytest.mark.parametrize(
    'model, gate, why',
    [
        (lambda: timm.create_model('mambaout_femto'), 'spem', r'maps of \(2, 56, 56, 48\)'),
        (lambda: timm.create_model('mambaout_femto'), 'fa', r'maps of \(2, 56, 56, 48\)'),
        (lambda: timm.create_model('resnest14d'), 'saam', 'passes its input through drop_path'),
        (lambda: timm.create_model('edgenext_xx_small'), 'spem', r'stages\.1\.blocks\.1 has \(2, 1024, 48\)'),
        (lambda: Net([Block(channels_last=True)]), 'saam', r'maps of \(2, 224, 224, 8\)'),
        (lambda: Net([Block(channels_last=True)], size=32), 'saam', r'maps of \(2, 32, 32, 8\)'),
        (lambda: Net([Block(), Block(branches=2)]), 'se', r'blocks\.1 uses its drop_path for more than one branch'),
        (lambda: Net([Block(), Block(), Block()], order=(0, 1, 2, 1)), 'fa', 'used more than once'),
        (lambda: Net([Block(), Block()], dense=True), 'fa', 'other parts of it reach into its runs'),
        (
            lambda: Net([Block() for _ in range(3)], order=lambda x: (0, 1, 2) if len(x[0, 0]) > 64 else (0, 2, 1)),
            'fa',
            'another order at another image size',
        ),
        (lambda: Net([Block(), Block()], size=7), 'saam', 'takes no images'),
        (lambda: timm.create_model('test_vit'), 'fa', 'no residual blocks'),
        (
            lambda: timm.create_model('repvgg_a0'),
            'se',
            r'stages\.0\.1 loses its drop_path, .* when it is reparameterized',
        ),
        (lambda: checkpointed(timm.create_model('resnet18')), 'fa', r'its blocks are wrapped \(CheckpointWrapper\)'),
        (lambda: nn.Sequential(), 'saam', 'no residual blocks'),
    ],
)
@pytest.mark.parametrize('training', [True, False])
def test_what_does_not_fit_is_refused_and_unchanged(model, gate, why, training):
    model = model().train(training)
    for i, module in enumerate(model.modules()):
        module.training = module.training ^ (i % 3 == 1)
    before = state_of(model)
    with pytest.raises(UserError, match=f'cannot carry the gate: .*{why}'):
        timm_poolattn.insert(model, gate)
    assert_same_state(model, before)


def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch):
    model = timm.create_model('resnet18')
    before = state_of(model)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.testing, 'assert_close', interrupt)
    with pytest.raises(KeyboardInterrupt):
        timm_poolattn.insert(model, 'fa')
    monkeypatch.undo()
    assert_same_state(model, before)


def checkpointed(model):
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, BasicBlock | InsertedGate | InsertedStage))
    return model


@pytest.mark.parametrize('close', [torch.jit.script, torch.fx.symbolic_trace])
def test_code_that_is_fixed(close):
    """A graph calls what it saw: it is refused, not left without effect."""
    with pytest.raises(UserError, match='is scripted or traced'):
        timm_poolattn.insert(close(create('resnet18', drop_path_rate=0.1)), 'saam')
    with pytest.raises(UserError, match='is scripted or traced'):
        timm_poolattn.remove(close(timm_poolattn.insert(create('resnet18'), 'saam')))


@pytest.mark.parametrize('gate', ['saam', 'fa'])
def test_wrapped_blocks(gate):
    if gate == 'saam':  # FA's are refused
        model = checkpointed(create('resnet18'))
        before = state_of(model)
        assert len(gates_of(timm_poolattn.insert(model, gate))) == 8
        assert_same_state(timm_poolattn.remove(model), before)
    model = checkpointed(timm_poolattn.insert(create('resnet18'), gate))
    with pytest.raises(UserError, match='CheckpointWrapper wraps an inserted gate; unwrap it first'):
        timm_poolattn.remove(model)


@pytest.mark.parametrize('wrap', [lambda y: {'a': y}, lambda y: [(y, None, 'text')], lambda y: SimpleNamespace(y=y)])
def test_outputs_of_any_structure(wrap):
    model = create('resnet18')
    model.register_forward_hook(lambda m, args, out: wrap(out))
    assert len(gates_of(timm_poolattn.insert(model, 'fa'))) == 4


class OneHeight(nn.Module):
    """Brings images to one height first, as a detector does, and its blocks have `channels_last` maps or not."""

    def __init__(self, channels_last):
        super().__init__()
        self.net = Net([Block(channels_last=channels_last), Block(channels_last=channels_last)])

    def forward(self, x):
        return self.net(nn.functional.interpolate(x, (32, 32 * x.shape[3] // x.shape[2])))


@pytest.mark.parametrize('gate', ['saam', 'fa'])
def test_images_of_one_height(gate):
    model = OneHeight(channels_last=False).eval()
    expected = model(X)
    assert gates_of(timm_poolattn.insert(model, gate)) and model(X).equal(expected)
    if gate == 'saam':
        with pytest.raises(UserError, match=r'maps of \(2, 32, 32, 8\) and \(2, 32, 48, 8\)'):
            timm_poolattn.insert(OneHeight(channels_last=True), gate)


@pytest.mark.parametrize('name', ['resnet20', 'resnet56_se', 'resnet164_spem', 'resnext29', 'inception_v4_se'])
@pytest.mark.parametrize('features_only', [False, True])
def test_fa_in_our_own_networks_is_that_of_their_constructor(name, features_only):
    model = timm.create_model(name, features_only=features_only).eval()
    state, expected, modules = model.state_dict(), as_list(model(X)), repr(model)
    timm_poolattn.insert(model, 'fa')
    assert all(u.equal(v) for u, v in zip(as_list(model(X)), expected, strict=True))
    with pytest.raises(UserError, match='has inserted gates already'):
        timm_poolattn.insert(model, 'fa')
    arch, _, gate = name.partition('_')
    if not features_only and gate in ('', 'se') and arch != 'inception':
        flavour = dict(flavour=model.flavour)
        built = timm.create_model(f'{arch}_{"fase" if gate else "fa"}', **flavour)
        fas = {n: p.shape for n, p in model.named_parameters() if not n.endswith('alpha')}
        assert fas == {n: p.shape for n, p in built.named_parameters()}
    for module in model.modules():
        if isinstance(module, FocusAssociation):
            nn.init.ones_(alpha_of(module))
    assert not as_list(model(X))[-1].equal(expected[-1])
    sum(y.square().mean() for y in as_list(model.train()(X))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    timm_poolattn.set_skip_threshold(model, 0.5)
    timm_poolattn.remove(model.eval())
    assert repr(model) == modules and model.state_dict().keys() == state.keys()
    model.load_state_dict(state)


def as_list(output):
    return output if isinstance(output, list) else [output]


@pytest.mark.parametrize(
    ('name', 'why'),
    [
        ('resnet20_fa', 'CifarResNet has FA already'),
        ('resnet50_fa', 'FaResNet has FA already'),
        ('vgg19_se', r"CifarVgg gets FA when it is built: timm\.create_model\(name, gate='fa'\)"),
    ],
)
def test_own_networks_that_take_no_fa(name, why):
    with pytest.raises(UserError, match=why):
        timm_poolattn.insert(timm.create_model(name, device='meta'), 'fa')


def test_wrappers_in_our_own_networks():
    """FA and wrapped blocks: refused and unchanged, with a remedy; a channel gate comes out of them."""
    model = timm_poolattn.insert(create('resnet20'), 'saam')
    for stage in model.stages:
        stage.blocks = nn.ModuleList(map(Wrapper, stage.blocks))
    timm_poolattn.remove(model)
    modules, expected = repr(model), model(X)
    assert 'SAAM' not in modules
    with pytest.raises(UserError, match=r'its blocks are wrapped \(Wrapper\), insert FA before that'):
        timm_poolattn.insert(model, 'fa')
    assert repr(model) == modules and model(X).equal(expected)
    model = create('resnet20')
    model.stages[1] = checkpoint_wrapper(model.stages[1])
    with pytest.raises(UserError, match=r'its blocks are wrapped \(CheckpointWrapper\), insert FA before that'):
        timm_poolattn.insert(model, 'fa')
    model = create('resnet20')
    model.stages = nn.Sequential(*model.stages)
    with pytest.raises(UserError, match=r'its blocks are wrapped \(Sequential\), insert FA before that'):
        timm_poolattn.insert(model, 'fa')
    model = timm_poolattn.insert(create('resnet20'), 'fa')
    model.stages[0].blocks[1].fa = checkpoint_wrapper(model.stages[0].blocks[1].fa)
    modules = repr(model)
    with pytest.raises(UserError, match='CheckpointWrapper wraps an inserted gate; unwrap it first'):
        timm_poolattn.remove(model)
    assert repr(model) == modules


@pytest.mark.parametrize(('name', 'gate'), [('resnet18', 'saam'), ('resnet18', 'fa'), ('resnet20', 'fa')])
def test_a_config_cannot_say_them(name, gate, tmp_path):
    with pytest.raises(UserError, match=r'inserted gates cannot be said in a config\.json: save the state_dict'):
        save_model(timm_poolattn.insert(create(name), gate), tmp_path, list('abcdefghij'))
    assert not list(tmp_path.iterdir())


def test_stages_need_no_ks_once_fa_is_removed():
    model = timm_poolattn.insert(create('resnet20'), 'fa')
    assert model.stages.has_fa and not timm_poolattn.remove(model).stages.has_fa
    assert model.stages[2](model.stages[1](model.stages[0](model.forward_stem(X)))).equal(model.forward_features(X))


def test_a_skip_threshold_goes_with_the_gates():
    model = timm_poolattn.insert(create('resnet20'), 'fa')
    timm_poolattn.set_skip_threshold(model, 0.9)
    timm_poolattn.insert(timm_poolattn.remove(model), 'fa', identity_init=False)
    assert {stage.skip_threshold for stage in model.stages} == {0.0}


@pytest.mark.parametrize('gate', ['spem', 'fa'])
def test_modes_stay(gate):
    """Frozen batch norms of a model in training; gates are in their block's mode."""
    model = create('resnet18', drop_path_rate=0.1).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model.layer2.eval()
    before = state_of(model)
    timm_poolattn.insert(model, gate)
    own = {m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.Conv2d | timm.layers.DropPath)}
    assert {m.training for m in own if isinstance(m, nn.BatchNorm2d)} == {False}
    assert all(m.training == ('layer2' not in name) for name, m in model.named_modules() if m in gates_of(model))
    with torch.no_grad():
        model(X)
    assert_same_state(timm_poolattn.remove(model), before)


class AlwaysTrains(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(True)


@pytest.mark.parametrize('gate', ['saam', 'fa'])
@pytest.mark.parametrize('kind', ['norm', 'observer'])
def test_statistics_stay(kind, gate):
    """A norm that adapts in evaluation too, and observers of quantisation, forget the noise."""
    model = create('resnet18')
    if kind == 'norm':
        for norm in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]:
            norm.__class__ = AlwaysTrains
    else:
        model.qconfig = quantization.get_default_qat_qconfig('x86')
        quantization.prepare_qat(model.train(), inplace=True)
    before = state_of(model)
    with torch.no_grad():
        expected = copy.deepcopy(model)(X)
    timm_poolattn.insert(model, gate)
    now = timm_poolattn.remove(copy.deepcopy(model))
    assert_same_state(now, before)
    with torch.no_grad():
        torch.testing.assert_close(now(X), expected)


@pytest.mark.parametrize('gate', ['saam', 'fa'])
def test_under_another_default_device(gate):
    model = create('resnet18')
    with torch.device('meta'):
        timm_poolattn.insert(model, gate)
        assert gates_of(timm_poolattn.insert(create('resnet18'), gate))
    assert model(X).isfinite().all()


@pytest.mark.parametrize(
    'model, count',
    [
        (lambda: Net([Block(), Block()], size=32), 2),  # of one size
        (lambda: Net([Block(), Block()], order=(1, 0, 1)), 2),  # a block that runs twice has its gate twice
        (lambda: Net([Block(8) for _ in range(2)], pretrained_cfg=None), 2),
        (lambda: Net([Block(8) for _ in range(2)], pretrained_cfg={'input_size': (3, 40, 40)}), 2),
    ],
)
def test_other_networks(model, count):
    model = model().eval()
    x = torch.randn(2, 3, 32, 32)
    before, expected = state_of(model), model(x)
    assert len(gates_of(timm_poolattn.insert(model, 'spem'))) == count and model(x).equal(expected)
    model(x).sum().backward()
    assert all(alpha_of(gate).grad for gate in gates_of(model))
    assert_same_state(timm_poolattn.remove(model), before)


def test_the_table_has_every_family():
    text = insertion_table.README.read_text(encoding='utf-8')
    lines = text[text.index('<!-- insertion:') : text.index('<!-- /insertion -->')].splitlines()
    families = [family for family in timm.list_modules() if family not in FAMILIES]
    assert sorted(insertion_table.MODELS) == sorted(families)
    assert [line.split()[1] for line in lines if line.startswith('| ')][1:] == sorted(families)


@pytest.mark.parametrize(
    'family',
    [pytest.param(f, marks=[] if f in ('rexnet', 'vgg') else pytest.mark.slow) for f in insertion_table.MODELS],
)
def test_the_table_holds(family):
    assert insertion_table.row(family) in insertion_table.README.read_text(encoding='utf-8').splitlines()


class Scale(nn.Module):
    def __init__(self, channels, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def forward(self, x):
        return x * self.weight.sigmoid().view(1, -1, 1, 1)


def test_a_gate_of_ones_own(monkeypatch):
    for gate in ('scale', Scale):
        with pytest.raises(
            UserError, match=r"a gate of your own has a name after timm_poolattn\.layers\.GATES\['name'\]"
        ):
            timm_poolattn.insert(create('resnet18'), gate)
    monkeypatch.setitem(GATES, 'scale', Scale)
    model = create('resnet18')
    expected = model(X)
    timm_poolattn.insert(model, 'scale')
    assert sum(isinstance(m, Scale) for m in model.modules()) == 8 and torch.equal(model(X), expected)
    model = timm.create_model('resnet20', gate='scale', depth=8)
    assert sum(isinstance(m, Scale) for m in model.modules()) == 3
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('gate', ['saam', 'fa'])
def test_mistakes(gate):
    model = create('resnet18')
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="unknown gate 'foo'; choose from se,"):
        timm_poolattn.insert(model, 'foo')
    with pytest.raises(ValueError, match=r'rd_ratio=0\.001 leaves no hidden channel of 64; 1/64 does'):
        timm_poolattn.insert(model, gate, rd_ratio=0.001)
    with pytest.raises(ValueError, match='must divide channels=64'):
        timm_poolattn.insert(model, 'sge', groups=7)
    assert list(model.state_dict()) == keys
    timm_poolattn.insert(model, gate)
    with pytest.raises(ValueError, match='inserted gates already'):
        timm_poolattn.insert(model, 'saam')
    with pytest.raises(ValueError, match='nothing to skip'):
        timm_poolattn.set_skip_threshold(create('resnet18'), 0.5)
