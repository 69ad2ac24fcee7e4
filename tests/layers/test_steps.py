"""The written-out backward passes against autograd's of the plain equations."""

import pytest
import torch
from torch.func import functional_call, grad, vmap

from timm_poolattn.layers import SAAM, SPEM, FocusAssociation, _steps, fa_weight
from timm_poolattn.models import _gated
from timm_poolattn.models.cifar_resnet import BasicBlock

from .test_equations import randomise

GATES = {
    'spem': SPEM,
    'spem public': lambda c, **kwargs: SPEM(c, reweight='public', **kwargs),
    'saam': SAAM,
    'saam4': lambda c, **kwargs: SAAM(c, paths=4, **kwargs),
}
LAYOUTS = {
    'contiguous': lambda x: x,
    'channels_last': lambda x: x.to(memory_format=torch.channels_last),
    'transposed': lambda x: x.mT.contiguous().mT,
    'strided': lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
}


@pytest.fixture
def plainly(monkeypatch):
    """Runs a function on the plain equations."""

    def run(fn):
        with monkeypatch.context() as m:
            m.setattr(_steps, 'runs_eagerly', lambda x: False)
            return fn()

    return run


def outputs_and_gradients(gate, x, shortcut, weights):
    x, shortcut = x.detach().requires_grad_(), shortcut.detach().requires_grad_()
    y, z = gate(x), gate.forward_add(x, shortcut)
    return [y, z, *torch.autograd.grad((y * weights + z).sum(), [x, shortcut, *gate.parameters()])]


@pytest.mark.parametrize('size', [(32, 32), (5, 3), (1, 1)])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('name', GATES)
def test_equal_to_the_plain_equations(plainly, name, layout, size):
    gate = randomise(GATES[name](16))
    x, shortcut = (LAYOUTS[layout](torch.randn(3, 16, *size)) for _ in range(2))
    weights = torch.randn_like(x)
    actual = outputs_and_gradients(gate, x, shortcut, weights)
    expected = plainly(lambda: outputs_and_gradients(gate, x, shortcut, weights))
    torch.testing.assert_close(actual[:4], expected[:4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual[4:], expected[4:], rtol=1e-5, atol=1e-4)  # sums over the batch and the maps
    assert actual[0].stride() == expected[0].stride()


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
@pytest.mark.parametrize('name', GATES)
def test_gradcheck(name, layout):
    gate = randomise(GATES[name](4, dtype=torch.double))
    x, shortcut = (LAYOUTS[layout](torch.randn(2, 4, 3, 2, dtype=torch.double)).requires_grad_() for _ in range(2))
    parameters = list(gate.parameters())
    fn = lambda x, shortcut, *_: gate.forward_add(x, shortcut)  # noqa: E731
    assert torch.autograd.gradcheck(fn, (x, shortcut, *parameters))
    assert torch.autograd.gradgradcheck(fn, (x, shortcut, *parameters), fast_mode=True)


class FAStep(torch.nn.Module):
    """FA around the block u -> relu(u): X_{i+1}, Eq. 2-9."""

    def __init__(self, channels, index, **kwargs):
        super().__init__()
        self.fa = FocusAssociation(channels, index, **kwargs)

    def forward(self, x, u, *ks):
        return fa_weight(x, u.relu(), self.fa(x, list(ks)))


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('index', [1, 3])
def test_fa_is_equal_to_the_plain_equations(plainly, index, layout):
    step = FAStep(16, index)
    x, u = (LAYOUTS[layout](torch.randn(3, 16, 5, 3)).requires_grad_() for _ in range(2))
    ks = [torch.rand(3, 1, requires_grad=True) for _ in range(index - 1)]
    weights = torch.randn_like(x)

    def outputs_and_gradients():
        y = step(x, u, *ks)
        return [y, *torch.autograd.grad((y * weights).sum(), [x, u, *ks, *step.parameters()])]

    actual, expected = outputs_and_gradients(), plainly(outputs_and_gradients)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert actual[0].stride() == expected[0].stride()


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_fa_gradcheck(layout):
    step = FAStep(4, 2, dtype=torch.double)
    x, u = (LAYOUTS[layout](torch.randn(2, 4, 3, 2, dtype=torch.double)).requires_grad_() for _ in range(2))
    k = torch.rand(2, 1, dtype=torch.double, requires_grad=True)
    fn = lambda x, u, k, *_: step(x, u, k)  # noqa: E731
    assert torch.autograd.gradcheck(fn, (x, u, k, *step.parameters()))
    assert torch.autograd.gradgradcheck(fn, (x, u, k, *step.parameters()), fast_mode=True)


@pytest.mark.parametrize('paths', [1, 4])
@pytest.mark.parametrize('size', [(32, 32), (5, 3), (1, 1)])
def test_score_conv_without_gradients(paths, size):
    mean, weight = torch.randn(3, 1, *size), torch.randn(paths, 1, 5, 5)
    expected = torch.nn.functional.conv2d(mean.double(), weight.double(), padding=2)
    torch.testing.assert_close(_steps.score_conv(mean, weight).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_tied_positions_share_the_gradient_or_one_gets_it(plainly, layout):
    gate = randomise(SPEM(1, dtype=torch.double))
    x = torch.tensor([[3.0, 1.0, 3.0], [2.0, 3.0, 2.0]], dtype=torch.double).view(1, 1, 2, 3)

    def gradient():
        leaf = LAYOUTS[layout](x.clone()).requires_grad_()
        gate(leaf)[0, 0, 1, 0].backward()  # at that position the scaling's own gradient comes in
        return leaf.grad[0, 0]

    actual, expected = gradient(), plainly(gradient)
    tied = x[0, 0] == 3
    if layout == 'channels_last':
        assert (actual[tied] != 0).sum() == 1
    else:
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual[tied].sum(), expected[tied].sum())
    torch.testing.assert_close(actual[~tied], expected[~tied])


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('name', GATES)
def test_per_sample_gradients(name, compiled):
    gate = randomise(GATES[name](8))
    parameters = dict(gate.named_parameters())
    x = torch.randn(3, 8, 6, 5)

    def loss(parameters, sample):
        return functional_call(gate, parameters, (sample[None],)).square().sum()

    together = vmap(grad(loss, argnums=(0, 1)), (None, 0))
    if compiled:
        torch._dynamo.reset()
        together = torch.compile(together, backend='aot_eager')
    together = together(parameters, x)
    for i, sample in enumerate(x):
        alone = grad(loss, argnums=(0, 1))(parameters, sample)
        torch.testing.assert_close({n: g[i] for n, g in together[0].items()}, alone[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together[1][i], alone[1])


@pytest.mark.parametrize('name', GATES)
@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_compiled(name, backend):
    gate = randomise(GATES[name](16))
    x, shortcut = torch.randn(3, 16, 8, 8), torch.randn(3, 16, 8, 8)
    weights = torch.randn_like(x)
    expected = outputs_and_gradients(gate, x, shortcut, weights)
    torch._dynamo.reset()
    compiled = torch.compile(outputs_and_gradients, backend=backend)
    torch.testing.assert_close(compiled(gate, x, shortcut, weights), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('name', GATES)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('input_dtype', ['autocast', torch.float32])
def test_autocast_training(plainly, name, dtype, input_dtype):
    gate = randomise(GATES[name](8))
    x = torch.randn(2, 8, 6, 5).to(dtype if input_dtype == 'autocast' else input_dtype)

    def run():
        leaf = x.clone().requires_grad_()
        gate.zero_grad()
        with torch.autocast('cpu', dtype=dtype):
            y = gate(leaf)
        y.float().square().sum().backward()
        assert y.dtype == leaf.grad.dtype == x.dtype
        return [y.float(), leaf.grad.float(), *(p.grad for p in gate.parameters())]

    torch.testing.assert_close(run(), plainly(run), rtol=0.1, atol=0.1)


def test_a_hook_sees_the_gate_without_the_shortcut():
    block = BasicBlock(8, 8, gate=randomise(SPEM(8))).eval()
    x = torch.randn(2, 8, 6, 5)
    expected = block(x, x)
    seen = []
    block.gate.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    torch.testing.assert_close(block(x, x), expected)
    ((before, after),) = seen
    torch.testing.assert_close(after, block.gate._gate(before, None))
    torch.testing.assert_close(block.act2(after + x), expected)


def block_outputs_and_gradients(block, forward, x, weights):
    """Output without and with gradients, those of x and of the parameters, and the buffers after both."""
    before = {name: buffer.clone() for name, buffer in block.named_buffers()}
    x = x.detach().requires_grad_()
    with torch.no_grad():
        alone = forward(x, x)
    y = forward(x, x)
    gradients = torch.autograd.grad((y * weights).sum(), [x, *block.parameters()], allow_unused=True)
    after = [buffer.clone() for buffer in block.buffers()]
    block.load_state_dict(before, strict=False)
    return [alone, y, *after, *gradients]


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('name', GATES)
@pytest.mark.parametrize('backend', ['eager', 'aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_folded_norm_is_equal_to_the_norm(monkeypatch, backend, name, layout, training):
    block = randomise(BasicBlock(8, 8, gate=GATES[name](8)).train(training))
    assert (block.bn2.weight < 0).any()  # where the norm swaps the extremes
    block.bn2.running_mean.normal_()
    block.bn2.running_var.uniform_(0.5, 2.0)
    x = LAYOUTS[layout](torch.randn(4, 8, 6, 5))
    weights = torch.randn_like(x)
    compiled = block
    if backend != 'eager':
        torch._dynamo.reset()
        compiled = torch.compile(block, backend=backend)
    calls = []
    norm_affine = _gated.norm_affine
    monkeypatch.setattr(_gated, 'norm_affine', lambda *args: (calls.append(args), norm_affine(*args))[1])
    actual = block_outputs_and_gradients(block, compiled, x, weights)
    assert calls
    monkeypatch.setattr(_gated, 'folds_norm', lambda *_: False)
    expected = block_outputs_and_gradients(block, block, x, weights)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('gate', [SPEM, SAAM])
def test_gradcheck_of_a_folded_norm(gate):
    block = randomise(BasicBlock(4, 4, gate=gate(4, dtype=torch.double), dtype=torch.double))
    gate_and_norm = [*block.gate.parameters(), *block.bn2.parameters()]
    z, shortcut = (torch.randn(2, 4, 3, 2, dtype=torch.double, requires_grad=True) for _ in range(2))
    fn = lambda z, shortcut, *_: _gated.add_gated(block, block.bn2, z, shortcut)  # noqa: E731
    assert torch.autograd.gradcheck(fn, (z, shortcut, *gate_and_norm))
    assert torch.autograd.gradgradcheck(fn, (z, shortcut, *gate_and_norm), fast_mode=True)


def test_folded_norm_loses_no_digits_far_from_zero():
    norm = torch.nn.BatchNorm2d(2)
    z = (torch.randn(8, 2, 9, 9) + 1000).requires_grad_()
    expected = z.double().var((0, 2, 3), correction=0)
    for backend in (None, 'aot_eager'):
        fn = _steps.norm_affine if backend is None else torch.compile(_steps.norm_affine, backend=backend)
        _, (a, _) = fn(norm, z)
        torch.testing.assert_close(a.double(), (expected + norm.eps).rsqrt(), rtol=1e-4, atol=0)


def test_hooks_and_other_norms_see_the_norm_called():
    block = BasicBlock(8, 8, gate=SPEM(8))
    x = torch.randn(2, 8, 6, 5)
    assert _steps.folds_norm(block.bn2, x)
    for register in (block.bn2.register_forward_hook, block.bn2.register_full_backward_hook):
        handle = register(lambda *_: None)
        assert not _steps.folds_norm(block.bn2, x)
        handle.remove()
    assert _steps.folds_norm(block.bn2, x)
    assert not _steps.folds_norm(torch.nn.SyncBatchNorm(8), x)
    assert not _steps.folds_norm(torch.nn.BatchNorm2d(8, momentum=None), x)
    assert not _steps.folds_norm(block.bn2, x.bfloat16())
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        block(x[:1, :, :1, :1], x[:1, :, :1, :1])


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_compiled_fa_block(backend, training):
    block = randomise(BasicBlock(8, 8, fa=FocusAssociation(8, 1)).train(training))
    forward = lambda x, _: fa_weight(x, block(x, x), block.fa(x, []))  # noqa: E731
    x = torch.randn(4, 8, 6, 5)
    weights = torch.randn_like(x)
    expected = block_outputs_and_gradients(block, forward, x, weights)
    torch._dynamo.reset()
    actual = block_outputs_and_gradients(block, torch.compile(forward, backend=backend), x, weights)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
