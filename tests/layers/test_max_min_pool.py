"""The gathered form of max and min pooling against amax and amin, in every mode of autodiff."""

import os
import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jvp, vmap

from timm_poolattn.layers import SPEM, max_min_pool, set_fused_pool, use_fused_pool

LAYOUTS = {
    'contiguous': lambda x: x,
    'channels_last': lambda x: x.to(memory_format=torch.channels_last),
    'transposed': lambda x: x.mT.contiguous().mT,
    'strided': lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
}


@pytest.fixture(params=[True, False], ids=['gathered', 'plain'])
def fused(request):
    set_fused_pool(request.param)
    yield request.param
    set_fused_pool(True)


def energy(x):
    """A scalar that is not linear in the extremes."""
    f_max, f_min = max_min_pool(x)
    return (f_max.square() + f_max * f_min.exp()).sum()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('size', [(32, 32), (5, 3), (1, 7), (1, 1)])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_values_and_gradients_are_those_of_amax_and_amin(layout, size, dtype):
    x = LAYOUTS[layout](torch.randperm(12 * size[0] * size[1]).view(3, 4, *size).to(dtype))
    results = []
    for fuse in (True, False):
        set_fused_pool(fuse)
        leaf = x.detach().requires_grad_()
        f_max, f_min = max_min_pool(leaf)
        (2 * f_max - 3 * f_min).sum().backward()
        assert f_max.dtype == f_min.dtype == leaf.grad.dtype == dtype
        # a low precision makes ties: then what they get in all is compared
        ties = dtype in (torch.bfloat16, torch.float16)
        results.append((f_max, f_min, leaf.grad.float().sum((2, 3)) if ties else leaf.grad))
    set_fused_pool(True)
    torch.testing.assert_close(*results, rtol=0.01 if ties else None, atol=0.01 if ties else None)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_gradcheck(fused, layout):
    x = LAYOUTS[layout](torch.randn(2, 3, 4, 3, dtype=torch.double)).requires_grad_()
    assert gradcheck(max_min_pool, x, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(max_min_pool, x)


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_torch_func(fused, layout):
    x = LAYOUTS[layout](torch.randn(3, 2, 4, 3, dtype=torch.double))
    alone = torch.stack([grad(energy)(sample[None])[0] for sample in x])
    torch.testing.assert_close(vmap(grad(lambda sample: energy(sample[None])))(x), alone)
    direction = torch.randn_like(x)
    _, tangent = jvp(energy, (x,), (direction,))
    torch.testing.assert_close(tangent, (grad(energy)(x) * direction).sum())
    with forward_ad.dual_level():
        dual = energy(forward_ad.make_dual(x, direction))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, tangent)
    torch.testing.assert_close(hessian(energy)(x), torch.autograd.functional.hessian(energy, x, vectorize=True))


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_compiled(fused, layout):
    x = LAYOUTS[layout](torch.randn(3, 2, 4, 3, dtype=torch.double))
    by_sample = vmap(grad(lambda sample: energy(sample[None])))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(by_sample, backend='aot_eager', fullgraph=True)(x), by_sample(x))
    gradients = []
    for f in (energy, torch.compile(energy, backend='aot_eager', fullgraph=True)):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        f(leaf).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize('layout, gathers', [('contiguous', False), ('channels_last', True)])
def test_compiled_it_gathers_where_channels_come_last(layout, gathers):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    x = LAYOUTS[layout](torch.randn(3, 2, 4, 3)).requires_grad_()
    torch.compile(energy, backend=backend, fullgraph=True)(x)
    assert ('extreme_positions' in graphs[0].code) == gathers


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_operator(layout, dtype):
    for shape in ((2, 3, 4, 5), (1, 1, 1, 1), (0, 3, 4, 5)):
        x = LAYOUTS[layout](torch.randn(shape, dtype=dtype))
        operator = torch.ops.timm_poolattn.extreme_positions
        torch.library.opcheck(operator, (x,))
        many = torch.stack([x, x.flip(2, 3)], dim=2)
        alone = torch.stack([operator(x), operator(x.flip(2, 3))])
        assert vmap(operator, in_dims=2)(many).equal(alone)


def test_empty_batch_and_nan(fused):
    x = torch.randn(0, 4, 5, 3, requires_grad=True)
    f_max, f_min = max_min_pool(x)
    (f_max + f_min).sum().backward()
    assert f_max.shape == f_min.shape == (0, 4) and x.grad.shape == x.shape
    x = torch.zeros(1, 2, 3, 3)
    x[0, 0, 1, 1] = torch.nan
    f_max, f_min = max_min_pool(x.requires_grad_())
    assert f_max.isnan().tolist() == f_min.isnan().tolist() == [[True, False]]


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_ties(fused, layout, compiled):
    """Positions that share an extreme share its gradient in the plain form; in the gathered one of them gets it."""
    maps = torch.tensor([[3.0, 1.0, 3.0], [2.0, 3.0, 1.0]]).expand(1, 2, 2, 3).contiguous()
    x = LAYOUTS[layout](maps).requires_grad_()
    torch._dynamo.reset()
    pool = torch.compile(max_min_pool, backend='aot_eager', fullgraph=True) if compiled else max_min_pool
    f_max, f_min = pool(x)
    (f_max + 2 * f_min).sum().backward()
    gathered = fused and (layout == 'channels_last' or not compiled)
    for got, values in zip(x.grad[0], x[0], strict=True):
        assert sorted(got[values == 3].tolist()) == ([0, 0, 1] if gathered else pytest.approx([1 / 3] * 3))
        assert sorted(got[values == 1].tolist()) == ([0, 2] if gathered else [1, 1])
        assert got[values == 2] == 0


def test_the_gradient_has_the_layout_of_the_map():
    for layout in ('contiguous', 'channels_last'):
        x = LAYOUTS[layout](torch.randn(2, 4, 5, 3)).requires_grad_()
        (g,) = torch.autograd.grad(energy(x), x)
        assert g.stride() == x.stride()


def test_switch():
    assert use_fused_pool()
    set_fused_pool(False)
    assert not use_fused_pool()
    set_fused_pool()
    assert use_fused_pool()


def test_switch_in_the_environment():
    code = 'from timm_poolattn.layers import use_fused_pool; print(use_fused_pool())'
    for value, expected in (('0', 'False'), ('1', 'True')):
        env = {**os.environ, 'TIMM_POOLATTN_FUSED_POOL': value}
        assert subprocess.check_output([sys.executable, '-c', code], env=env, text=True).strip() == expected


def test_what_is_captured_holds_no_operator_of_ours():
    gate, x = SPEM(4), torch.randn(2, 4, 5, 3, requires_grad=True)
    graphs = [torch.fx.symbolic_trace(gate), torch.export.export(gate, (x,)).graph_module]
    graphs = [str(g.graph) for g in graphs] + [str(torch.jit.script(gate).inlined_graph)]
    graphs.append(str(torch.jit.trace(gate, x).graph))
    assert [('amax' in g, 'amin' in g, 'extreme_positions' in g) for g in graphs] == 4 * [(True, True, False)]
