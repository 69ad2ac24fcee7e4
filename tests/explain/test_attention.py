import numpy as np
import pytest
import timm
import torch
from timm.layers import SEModule
from timm.layers.cbam import CbamModule
from torch.nn import functional as F

import timm_poolattn
from timm_poolattn.explain import attention_trace
from timm_poolattn.layers import CBAM, GATES, SAAM, SGE, SPEM, FocusAssociation


def randomized(name, **kwargs):
    """A model whose gates do something: zero-initialised scales would make them constants."""
    model = timm.create_model(name, **kwargs)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model


def images(model, count=2):
    return torch.randn(count, *model.pretrained_cfg['input_size'])


def seen(model, x, kind):
    """Inputs and outputs of the gates of a class, by plain hooks."""
    calls = {}
    handles = [
        module.register_forward_hook(
            lambda m, args, out, name=name: calls.__setitem__(name, (args[0].clone(), out.clone()))
        )
        for name, module in model.named_modules()
        if isinstance(module, kind)
    ]
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize('gate', [*GATES, 'fa', 'fase'])
def test_leaves_the_model_as_it_was(gate):
    model = randomized(f'resnet20_{gate}').train()
    model.stages[1].eval()  # modes may differ from module to module
    x = images(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    trace = attention_trace(model, x)
    assert len(trace) == {'fa': 8, 'fase': 17}.get(gate, 9)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        before = model.eval()(x)
        attention_trace(model, x)
        assert torch.equal(model(x), before)


def test_hooks_are_removed_after_an_error():
    model = randomized('resnet20_saam').train()
    with pytest.raises(RuntimeError):
        attention_trace(model, torch.randn(2, 4, 32, 32))
    assert model.training and not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize('gate', sorted(set(GATES) - {'sge'}))
def test_weight_is_what_the_channels_were_multiplied_by(gate):
    model = randomized(f'resnet20_{gate}')
    x = images(model)
    trace = attention_trace(model, x)
    for name, (inside, out) in seen(model, x, tuple(type(model.get_submodule(n)) for n in trace)).items():
        if name not in trace:
            continue  # CBAM's own channel gate
        weight = torch.tensor(trace[name]['weight'])
        assert weight.shape == inside.shape[:2]
        assert trace[name]['gate'] == ('saam' if gate.startswith('saam') else gate)
        expected = inside * weight[:, :, None, None]
        if 'spatial' in trace[name]:
            expected = expected * torch.tensor(trace[name]['spatial'])
        torch.testing.assert_close(expected, out, rtol=1e-5, atol=1e-6)
        assert (weight >= 0).all() and (weight <= 1 + 1e-6).all()


def test_spem():
    model = randomized('resnet20_spem')
    x = images(model)
    trace = attention_trace(model, x)
    assert list(trace) == [f'stages.{s}.blocks.{b}.gate' for s in range(3) for b in range(3)]
    for name, (inside, _) in seen(model, x, SPEM).items():
        t = trace[name]
        p0, p1 = model.get_submodule(name).p.tolist()
        np.testing.assert_allclose(t['pool_lambda'], p0**2 / (p0**2 + p1**2), rtol=1e-6)
        assert t['pool_lambda'].shape == (2,) and ((t['pool_lambda'] >= 0) & (t['pool_lambda'] <= 1)).all()
        for extreme, position, f in (('f_max', 'argmax', torch.amax), ('f_min', 'argmin', torch.amin)):
            np.testing.assert_array_equal(t[extreme], f(inside, (2, 3)))
            row, column = torch.tensor(t[position]).unbind(-1)
            b, c = torch.meshgrid(torch.arange(2), torch.arange(inside.shape[1]), indexing='ij')
            np.testing.assert_array_equal(inside[b, c, row, column], t[extreme])


@pytest.mark.parametrize('gate, paths', [('saam', 1), ('saam2', 2), ('saam4', 4)])
def test_saam(gate, paths):
    model = randomized(f'resnet20_{gate}')
    x = images(model, 3)
    trace = attention_trace(model, x)
    for name, (inside, _) in seen(model, x, SAAM).items():
        v = trace[name]['score_map']
        assert v.shape == (3, paths, *inside.shape[2:]) and (v >= 0).all()
        np.testing.assert_allclose(v.sum((2, 3)), 1, rtol=1e-5)
        u = F.conv2d(inside.mean(1, keepdim=True), model.get_submodule(name).conv.weight.detach(), padding=2)
        np.testing.assert_allclose(v, u.flatten(2).softmax(2).view_as(u), rtol=1e-4, atol=1e-7)


def test_sge():
    model = randomized('resnet20_sge')
    x = images(model)
    trace = attention_trace(model, x)
    for name, (inside, out) in seen(model, x, SGE).items():
        spatial = torch.tensor(trace[name]['spatial'])
        assert spatial.shape == (2, 8, *inside.shape[2:])
        expected = (inside.unflatten(1, (8, -1)) * spatial[:, :, None]).flatten(1, 2)
        torch.testing.assert_close(expected, out, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('name, gates', [('resnet20_fa', 8), ('vgg19_fa', 4), ('resnet20_fase', 8)])
def test_fa(name, gates):
    model = randomized(name)
    x = images(model)
    trace = {n: t for n, t in attention_trace(model, x).items() if t['gate'] == 'fa'}
    assert len(trace) == gates
    for n, (_, k) in seen(model, x, FocusAssociation).items():
        np.testing.assert_array_equal(trace[n]['k'], k[:, 0])
        assert ((trace[n]['k'] > 0) & (trace[n]['k'] < 1)).all() and not trace[n]['skipped'].any()


def test_skipped_blocks():
    model = randomized('resnet20_fase').eval()
    x = images(model, 4)
    plain = attention_trace(model, x)
    ks = np.sort(np.concatenate([t['k'] for t in plain.values() if t['gate'] == 'fa']))
    threshold = float(ks[len(ks) // 2])
    model.set_skip_threshold(threshold)
    trace = attention_trace(model, x)
    first = 'stages.0.blocks.1.fa'  # nothing before it was skipped
    np.testing.assert_allclose(trace[first]['k'], plain[first]['k'], rtol=1e-5)
    skipped = 0
    for name, t in trace.items():
        if t['gate'] == 'fa':
            np.testing.assert_array_equal(t['skipped'], ~(t['k'] >= threshold))
            skipped += t['skipped'].sum()
            inner = trace.get(name.replace('.fa', '.gate'))
            if inner is not None:  # the SE of a skipped block did not run
                np.testing.assert_array_equal(np.isnan(inner['weight']).all(1), t['skipped'])
    assert skipped > 0
    model.set_skip_threshold(1.0, per_sample=False)
    trace = attention_trace(model, x)
    assert all(t['skipped'].all() for t in trace.values() if t['gate'] == 'fa')
    assert np.isnan(trace['stages.2.blocks.1.fa']['k']).all()  # inside a skipped stage nothing is known
    assert 'stages.2.blocks.1.gate' not in trace


@pytest.mark.parametrize('gate', ['spem', 'saam2', 'cbam', 'se'])
@pytest.mark.parametrize('name', ['test_resnet', 'test_convnext', 'regnetx_002'])
def test_inserted(name, gate):
    model = timm_poolattn.insert(timm.create_model(name), gate).eval()
    x = images(model)
    trace = {n: t for n, t in attention_trace(model, x).items() if 'drop_path' in n}
    assert trace and all(t['gate'] == gate.rstrip('2') and t['alpha'] == 0 for t in trace.values())
    for t in trace.values():
        if 'score_map' in t:
            np.testing.assert_allclose(t['score_map'].sum((2, 3)), 1, rtol=1e-5)
    for m in model.modules():
        if getattr(m, 'alpha', None) is not None:
            m.alpha.data.fill_(0.25)
    assert all(t['alpha'] == 0.25 for n, t in attention_trace(model, x).items() if 'drop_path' in n)


@pytest.mark.parametrize('name', ['resnet18', 'seresnet18'])
def test_inserted_fa(name):
    model = timm_poolattn.insert(timm.create_model(name), 'fa').eval()
    x = images(model)
    trace = {n: t for n, t in attention_trace(model, x).items() if t['gate'] == 'fa'}
    assert trace and all((t['k'] == 1).all() and t['alpha'] == 0 for t in trace.values())
    for m in model.modules():
        if isinstance(m, FocusAssociation):
            m.fade_in.alpha.data.fill_(1)
    for n, (_, k) in seen(model, x, FocusAssociation).items():
        k_n = attention_trace(model, x)[n]['k']
        np.testing.assert_array_equal(k_n, k[:, 0])
        assert ((k_n > 0) & (k_n < 1)).all()


def test_timms_own_gates():
    for kwargs, kind, gate in (
        (dict(model_name='seresnet18'), SEModule, 'se'),
        (dict(model_name='resnet18', block_args=dict(attn_layer='cbam')), CbamModule, 'cbam'),
        (dict(model_name='test_efficientnet'), None, 'se'),
    ):
        model = randomized(kwargs.pop('model_name'), **kwargs).eval()  # timm starts the last BN of a block at 0
        trace = attention_trace(model, torch.randn(1, 3, 64, 64))
        assert {t['gate'] for t in trace.values()} == {gate}
        if kind:
            assert len(trace) == sum(isinstance(m, kind) for m in model.modules()) == 8
        if gate == 'cbam':
            name, (inside, out) = next(iter(seen(model, torch.ones(1, 3, 64, 64), kind).items()))
            t = attention_trace(model, torch.ones(1, 3, 64, 64))[name]
            product = inside * torch.tensor(t['weight'])[:, :, None, None] * torch.tensor(t['spatial'])
            torch.testing.assert_close(product, out, rtol=1e-4, atol=1e-6)


def test_no_gates():
    with pytest.raises(ValueError, match='CifarResNet has no gates to trace'):
        attention_trace(timm.create_model('resnet20'), torch.zeros(1, 3, 32, 32))


def test_our_cbam_is_one_gate():
    model = randomized('resnet20_cbam')
    assert {type(model.get_submodule(n)) for n in attention_trace(model, images(model))} == {CBAM}
