"""The gates whose equations are in this package against these written out, forward and gradient.

Those of timm are compared in `tests/models/test_training_step.py`, in a network's stage.
"""

import pytest
import torch

from timm_poolattn.layers import (
    CBAM,
    ECA,
    REWEIGHT_FORMS,
    SAAM,
    SGE,
    SPEM,
    SRM,
    Association,
    Focus,
    FocusAssociation,
    fa_weight,
)

from . import equations


def randomise(module):
    """Parameters away from their start values, where half of the terms vanish."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def assert_same(module, reference, *inputs):
    """Forward and gradient in float64 to 1e-6 (far below it, in fact), and forward in float32."""
    inputs = [x.double().requires_grad_() for x in inputs]
    expected = reference(*inputs)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), [*inputs, *module.parameters()], allow_unused=True)
    actual = module(*inputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    got = torch.autograd.grad((actual * weights).sum(), [*inputs, *module.parameters()], allow_unused=True)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-6)
    single = module.float()(*(x.detach().float() for x in inputs))
    torch.testing.assert_close(single.double(), expected.detach(), rtol=1e-5, atol=1e-6)


SHAPES = [(2, 8, 5, 4), (1, 8, 1, 1), (3, 8, 1, 6)]


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('reweight', REWEIGHT_FORMS)
def test_spem(shape, reweight):
    m = randomise(SPEM(8, reweight=reweight, dtype=torch.double))
    assert_same(
        m,
        lambda x: equations.spem(x, m.p, m.gamma_exc, m.beta_exc, m.gamma_rew, m.beta_rew, reweight),
        torch.randn(shape),
    )


@pytest.mark.parametrize('fixed_lambda', [0.0, 0.1, 0.5, 0.9, 1.0])
def test_spem_fixed_lambda(fixed_lambda):
    m = randomise(SPEM(8, fixed_lambda=fixed_lambda, dtype=torch.double))
    assert_same(
        m,
        lambda x: equations.spem(x, None, m.gamma_exc, m.beta_exc, m.gamma_rew, m.beta_rew, fixed_lambda=fixed_lambda),
        torch.randn(2, 8, 5, 4),
    )


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('paths', [1, 2, 4])
def test_saam(shape, paths):
    m = randomise(SAAM(8, paths=paths, dtype=torch.double))
    x = torch.randn(shape)
    assert_same(m, lambda x: equations.saam(x, m.conv.weight, m.fc1.weight, m.fc2.weight), x)
    v = m.double().score_map(x.double())
    torch.testing.assert_close(v, equations.saam_score_map(x.double(), m.conv.weight))


@pytest.mark.parametrize('shape', SHAPES)
def test_focus(shape):
    m = randomise(Focus(8, dtype=torch.double))
    assert_same(
        m,
        lambda x: equations.focus(x, m.fc1.weight, m.fc1.bias, m.fc2.weight, m.fc2.bias),
        torch.randn(shape),
    )


@pytest.mark.parametrize('index', [2, 3, 17])
def test_association(index):
    m = randomise(Association(index, dtype=torch.double))
    assert m.fc1.out_features == 4 * index
    assert_same(
        m,
        lambda s: equations.association(s, m.fc1.weight, m.fc1.bias, m.fc2.weight, m.fc2.bias),
        torch.rand(3, index),
    )


@pytest.mark.parametrize('index', [2, 3])
def test_focus_association(index):
    """Eq. 2. The gradient reaches the earlier k too."""

    class Gate(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fa = FocusAssociation(8, index, dtype=torch.double)

        def forward(self, x, *ks):
            return self.fa(x, list(ks))

    m = randomise(Gate())
    focus, association = m.fa.focus, m.fa.association

    def reference(x, *ks):
        k = equations.focus(x, *focus.fc1.parameters(), *focus.fc2.parameters())
        return equations.association(
            torch.cat([*ks, k], 1), *association.fc1.parameters(), *association.fc2.parameters()
        )

    assert_same(m, reference, torch.randn(3, 8, 5, 4), *(torch.rand(3, 1) for _ in range(index - 1)))


def test_fa_weight():
    class Weight(torch.nn.Module):
        def forward(self, x, u, k):
            return fa_weight(x, u, k)

    x, u = torch.randn(3, 8, 5, 4), torch.randn(3, 8, 5, 4)
    assert_same(Weight(), equations.fa_weight, x, u, torch.rand(3, 1))
    assert fa_weight(x, u, torch.zeros(3, 1)).equal(x)  # Eq. 12
    torch.testing.assert_close(fa_weight(x, u, torch.ones(3, 1)), u)


@pytest.mark.parametrize('shape', [(2, 8, 5, 4), (3, 8, 1, 6)])
def test_srm(shape):
    m = randomise(SRM(8, dtype=torch.double))
    norm = lambda z: equations.batch_norm(z, m.bn.weight, m.bn.bias, m.bn.eps)  # noqa: E731
    assert_same(m, lambda x: equations.srm(x, m.cfc, m.eps, norm), torch.randn(shape))


@pytest.mark.parametrize('shape', SHAPES)
def test_eca(shape):
    m = randomise(ECA(8, dtype=torch.double))
    assert_same(m, lambda x: equations.eca(x, m.conv.weight.flatten()), torch.randn(shape))


@pytest.mark.parametrize('shape', [(2, 8, 5, 4), (3, 8, 1, 6)])
@pytest.mark.parametrize('groups', [1, 4])
def test_sge(shape, groups):
    m = randomise(SGE(8, groups=groups, dtype=torch.double))
    assert_same(m, lambda x: equations.sge(x, groups, m.weight, m.bias, m.eps), torch.randn(shape))


@pytest.mark.parametrize('shape', [(2, 8, 5, 4), (3, 8, 1, 6)])
def test_cbam(shape):
    m = randomise(CBAM(8, dtype=torch.double))
    assert_same(
        m,
        lambda x: equations.cbam(x, m.channel.fc1.weight.flatten(1), m.channel.fc2.weight.flatten(1), m.conv.weight),
        torch.randn(shape),
    )
