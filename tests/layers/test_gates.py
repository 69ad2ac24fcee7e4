"""What every gate must do besides its equation: timm's contract, shapes, dtypes, memory formats, errors."""

import pytest
import timm
import torch
from torch import nn

from timm_poolattn.layers import GATES, SAAM, SPEM, FocusAssociation, create_gate, fa_weight

OURS = ['spem', 'saam', 'saam4', 'srm', 'sge', 'cbam', 'eca']


@pytest.mark.parametrize('name', GATES)
@pytest.mark.parametrize('size', [(1, 1), (1, 7), (5, 3), (32, 32)])
@pytest.mark.parametrize('batch', [1, 3])
def test_shape(name, size, batch):
    gate = create_gate(name, 16).eval()
    x = torch.randn(batch, 16, *size)
    y = gate(x)
    assert y.shape == x.shape and y.isfinite().all()
    # the gate scales: with factors in (0, 1) all of these
    assert (y.abs() <= x.abs() + 1e-6).all()


@pytest.mark.parametrize('name', GATES)
@pytest.mark.parametrize('size', [(1, 1), (5, 3)])
def test_gradient_is_finite(name, size):
    gate = create_gate(name, 16)
    x = torch.randn(3, 16, *size, requires_grad=True)
    gate(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gate.parameters())


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('name', [*GATES, 'fa'])
def test_edges(name, dtype, training):
    """Constant and zero maps, which padded convolutions never give; one image, none, one position; in both layouts."""
    own = torch.float64 if dtype == torch.float64 else torch.float32
    gate = FocusAssociation(16, 1, dtype=own) if name == 'fa' else create_gate(name, 16, dtype=own)
    gate.train(training)
    constant = torch.randn(3, 16, 1, 1).expand(-1, -1, 5, 4)
    inputs = [constant, torch.zeros(3, 16, 5, 4), torch.randn(3, 16, 1, 1), torch.randn(0, 16, 5, 4)]
    if name != 'srm' or not training:  # its batch norm has one value for a channel then
        inputs.append(torch.randn(1, 16, 5, 4))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for x in inputs:
            x = x.to(dtype).clone(memory_format=memory_format).requires_grad_()
            gate.zero_grad()
            with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = fa_weight(x, 2 * x, gate(x, [])) if name == 'fa' else gate(x)
            assert y.shape == x.shape and y.isfinite().all()
            y.square().sum().backward()
            assert x.grad.isfinite().all()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in gate.parameters())


@pytest.mark.parametrize('name', [*GATES, 'fa'])
def test_edges_compiled(name):
    """One image, none, one position, and all equal, which is one value in every map."""
    gate = FocusAssociation(16, 1) if name == 'fa' else create_gate(name, 16)
    run = lambda x: fa_weight(x, 2 * x, gate(x, [])) if name == 'fa' else gate(x)  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(run, backend='aot_eager', fullgraph=True, dynamic=False)
    sizes = [(3, 16, 1, 1), (0, 16, 5, 4)] + [(1, 16, 5, 4)] * (name != 'srm')  # whose norm has one value then
    constant = torch.ones(3, 16, 5, 4)
    for x in [*map(torch.randn, sizes), constant]:
        steps = []
        for forward in (run, compiled):
            leaf = x.to(memory_format=torch.channels_last).requires_grad_()
            y = forward(leaf)
            steps.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *gate.parameters()])])
        if name == 'spem' and x is constant:  # whose gradient the modes give to other positions: see `max_min_pool`
            for step in steps:
                step[1] = step[1].sum((2, 3))
        torch.testing.assert_close(*steps)


@pytest.mark.parametrize('name', GATES)
def test_channels_last(name):
    gate = create_gate(name, 16).eval()
    x = torch.randn(2, 16, 6, 5)
    y = gate(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, gate(x))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('name', GATES)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(name, dtype):
    gate = create_gate(name, 16).eval()
    x = torch.randn(2, 16, 6, 5)
    with torch.autocast('cpu', dtype=dtype):
        y = gate(x.to(dtype))
    if name in OURS or name == 'saam2':
        assert y.dtype == dtype
    torch.testing.assert_close(y.float(), gate(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize('name', GATES)
def test_factory_kwargs(name):
    gate = create_gate(name, 16, device='meta', dtype=torch.float64)
    assert all(p.is_meta and p.dtype == torch.float64 for p in gate.parameters())


@pytest.mark.parametrize('name', [*GATES, 'fa'])
def test_reset_parameters(name):
    """What resets every module that can be, as for another fold, leaves nothing that was trained."""
    gate = FocusAssociation(16, 2, identity_init=True) if name == 'fa' else create_gate(name, 16, identity_init=True)
    for parameter in gate.parameters():
        torch.nn.init.constant_(parameter, 7)
    for module in gate.modules():
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()
    alpha = gate.fade_in.alpha if name == 'fa' else gate.alpha
    assert alpha == 0 and not any((parameter == 7).any() for parameter in gate.parameters())


@pytest.mark.parametrize('name', GATES)
@pytest.mark.filterwarnings('error::torch.jit.TracerWarning')
def test_a_trace_is_of_any_size(name):
    gate = create_gate(name, 16).eval()
    traced = torch.jit.trace(gate, torch.randn(2, 16, 4, 4))
    x = torch.randn(3, 16, 5, 7)
    torch.testing.assert_close(traced(x), gate(x))


@pytest.mark.parametrize('name', ['spem', 'fa'])
@pytest.mark.parametrize('alpha', [torch.tensor(0.25), torch.tensor([0.25])])
def test_an_older_alpha_loads(name, alpha):
    """Version 0.1 saved it without an axis, and that of FA under another name."""
    gate = FocusAssociation(16, 1, identity_init=True) if name == 'fa' else create_gate(name, 16, identity_init=True)
    state = {key: value for key, value in gate.state_dict().items() if not key.endswith('alpha')}
    holder = nn.Sequential(gate)
    holder.load_state_dict({f'0.{key}': value for key, value in {**state, 'alpha': alpha}.items()})
    assert (gate.fade_in if name == 'fa' else gate).alpha.tolist() == [0.25]


def test_saams_convolution_gets_the_layout_that_is_fast():
    gate, strides = SAAM(16), []
    gate.conv.register_forward_pre_hook(lambda module, args: strides.append(args[0].stride()))
    x = torch.randn(2, 16, 6, 5)
    for given in (x.clone().requires_grad_(), x):  # with and without a gradient
        gate(given)
    torch.export.export(gate, (x.clone().requires_grad_(),))
    assert strides == [(30, 1, 5, 1), (30, 30, 5, 1), (30, 30, 5, 1)]


@pytest.mark.parametrize('name', GATES)
def test_script_and_fx(name):
    gate = create_gate(name, 16).eval()
    x = torch.randn(2, 16, 6, 5)
    torch.testing.assert_close(torch.jit.script(gate)(x), gate(x))
    # to the last bit: what is left is much in a deep network of random weights
    torch.testing.assert_close(torch.fx.symbolic_trace(gate)(x), gate(x), rtol=0, atol=0)


@pytest.mark.parametrize('name', [name for name in OURS if name != 'eca'])  # which has no parameter of a channel
@pytest.mark.parametrize('channels', [1, 12])
def test_wrong_channels_are_refused(name, channels):
    """One channel could be broadcast to all of a gate's."""
    with pytest.raises((AssertionError, RuntimeError), match=str(channels)):
        create_gate(name, 16)(torch.randn(2, channels, 4, 4))


@pytest.mark.parametrize('attn_layer', [SPEM, SAAM])
def test_as_attn_layer_of_timm(attn_layer):
    plain = timm.create_model('resnet18')
    model = timm.create_model('resnet18', block_args=dict(attn_layer=attn_layer))
    gates = [m for m in model.modules() if isinstance(m, attn_layer)]
    widths = [64, 64, 128, 128, 256, 256, 512, 512]
    assert len(gates) == 8
    added = sum(4 * c + 2 if attn_layer is SPEM else c**2 // 2 + 25 for c in widths)
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(model) == count(plain) + added
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for g in gates for p in g.parameters())


@pytest.mark.parametrize('paths', [1, 2, 4])
def test_score_map_is_a_distribution(paths):
    v = SAAM(16, paths=paths).score_map(torch.randn(3, 16, 7, 5))
    assert v.shape == (3, paths, 7, 5) and (v >= 0).all()
    torch.testing.assert_close(v.sum((2, 3)), torch.ones(3, paths))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_saam_with_large_scores(dtype):
    gate = SAAM(16, dtype=dtype)
    torch.nn.init.constant_(gate.conv.weight, 30.0)
    x = torch.randn(2, 16, 6, 5).mul(1000).to(dtype)
    x[:, :, 2, 3] = 20000  # in float16 the scores around it overflow
    v = gate.score_map(x)
    assert v.isfinite().all()
    torch.testing.assert_close(v.float().sum((2, 3)), torch.ones(2, 1), atol=0.02, rtol=0)
    assert gate(x).isfinite().all()


def test_penalty_and_lambda():
    gate = SPEM(8)
    assert gate.penalty().item() == 0.5 and gate.pool_lambda().item() == 0.5
    with torch.no_grad():
        gate.p.copy_(torch.tensor([3.0, 1.0]))
    assert gate.penalty().item() == 10 and gate.pool_lambda().item() == pytest.approx(0.9)
    gate.penalty().backward()
    assert gate.p.grad.tolist() == [6, 2]
    gate.zero_grad()
    with torch.no_grad():
        gate.p.zero_()  # as pruning does
    gate.pool_lambda().backward()
    assert gate.pool_lambda().item() == 0.5 and gate.p.grad.tolist() == [0, 0]
    for p in ([1e-4, 2e-4], [100.0, 200.0]):  # squared, float16 does not hold either
        gate = SPEM(8, dtype=torch.float16)
        gate.p.data = torch.tensor(p, dtype=torch.float16)
        assert gate.pool_lambda().item() == pytest.approx(0.2, rel=0.01)
    fixed = SPEM(8, fixed_lambda=0.3)
    assert fixed.penalty().item() == 0 and fixed.pool_lambda().item() == pytest.approx(0.3)


@pytest.mark.parametrize(
    'kwargs, parameters',
    [
        (dict(), 4 * 64 + 2),
        (dict(reweight='unshared'), 6 * 64 + 2),
        (dict(reweight='none'), 2 * 64 + 2),
        (dict(reweight='public'), 4 * 64 + 2),
        (dict(fixed_lambda=0.5), 4 * 64),
    ],
)
def test_spem_parameters(kwargs, parameters):
    assert sum(p.numel() for p in SPEM(64, **kwargs).parameters()) == parameters


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: SPEM(8, fixed_lambda=1.5), r'fixed_lambda=1.5 must lie in \[0, 1\]'),
        (lambda: SPEM(8, reweight='h'), "unknown reweight 'h'; choose from sum"),
        (lambda: SAAM(8, kernel_size=4), 'kernel_size=4 must be odd'),
        (lambda: SAAM(8, kernel_size=-1), 'kernel_size=-1 must be odd and at least 1'),
        (lambda: SAAM(8, paths=0), 'paths=0 must be at least 1'),
        (lambda: create_gate('cbam', 8, kernel_size=-3), 'kernel_size=-3 must be odd and at least 1'),
        (lambda: create_gate('sge', 12), 'groups=8 must divide channels=12'),
        (lambda: create_gate('sge', 12, groups=0), 'groups=0 must divide channels=12, and be at least 1'),
        (lambda: create_gate('sge', 12, groups=-4), 'groups=-4 must divide channels=12, and be at least 1'),
        (lambda: create_gate('se', 16, rd_channels=0), 'SEModule: rd_channels=0 must be at least 1'),
        (lambda: create_gate('se2', 16, rd_channels=0), 'ChannelAttn: rd_channels=0 must be at least 1'),
        (lambda: create_gate('see', 12), "unknown gate 'see'; choose from se"),
        (lambda: FocusAssociation(8, 0), 'index=0 must be at least 1'),
        (lambda: FocusAssociation(8, 2, expand_ratio=0), 'expand_ratio=0 must be at least 1'),
    ],
)
def test_constructor_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize('channels', [49, 98, 103])
def test_the_ratio_that_an_error_recommends(channels):
    with pytest.raises(ValueError, match=f'leaves no hidden channel of {channels}; 1/{channels} does'):
        SAAM(channels, rd_ratio=0.9 / channels)
    assert SAAM(channels, rd_ratio=1 / channels).fc1.out_features == 1
    with pytest.raises(ValueError, match='rd_channels=0 must be at least 1'):
        SAAM(channels, rd_channels=0)


@pytest.mark.parametrize('use_mlp', [False, True])
def test_eca_is_timms(use_mlp):
    gate, timms = (make(64, use_mlp=use_mlp) for make in (GATES['eca'], timm.layers.EcaModule))
    gate.load_state_dict(timms.state_dict())
    x = torch.randn(2, 64, 8, 5)
    torch.testing.assert_close(gate(x), timms(x))
    torch.testing.assert_close(torch.jit.script(gate)(x), timms(x))
    assert gate(x[:0]).shape == (0, 64, 8, 5)


def test_focus_association_takes_the_earlier_k():
    first, third = FocusAssociation(8, 1), FocusAssociation(8, 3)
    x = torch.randn(2, 8, 4, 4)
    assert first.association is None and first(x, []).equal(first.focus(x))  # Eq. 4
    ks = [torch.rand(2, 1), torch.rand(2, 1)]
    torch.testing.assert_close(third(x, ks), third.association(torch.cat([*ks, third.focus(x)], dim=1)))  # Eq. 2
    with pytest.raises(AssertionError, match='i - 1 earlier k'):
        third(x, ks[:1])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_fa_autocast(dtype):
    gate = FocusAssociation(8, 1)
    x, u = torch.randn(2, 8, 4, 4).to(dtype), torch.randn(2, 8, 4, 4).to(dtype)
    with torch.autocast('cpu', dtype=dtype):
        assert fa_weight(x, u, gate(x, [])).dtype == dtype
