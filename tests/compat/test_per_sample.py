"""Opacus: gradients by sample, of every gate."""

import pytest
import timm
import torch
from torch.nn import functional as F

import timm_poolattn
from timm_poolattn.layers import GATES

opacus = pytest.importorskip('opacus')

pytestmark = pytest.mark.compat

X = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2])


def create(gate, inserted):
    torch.manual_seed(0)
    name = f'resnet20_{gate}' if gate and not inserted else 'resnet20'
    model = timm.create_model(name, depth=14)
    if inserted:
        timm_poolattn.insert(model, gate)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith('alpha'):
                    parameter.fill_(0.5)
    model = opacus.validators.ModuleValidator.fix(model)  # norms by groups of channels
    for module in model.modules():
        if hasattr(module, 'inplace'):
            module.inplace = False
    return model.double().train()


@pytest.mark.parametrize('inserted', [False, True])
@pytest.mark.parametrize('gate', ['', *(gate for gate in GATES if gate != 'srm'), 'fa'])
def test_resnet(gate, inserted):
    """Those of each sample by itself. SRM normalises over the batch one number a channel, so that it has none."""
    if inserted and not gate:
        pytest.skip('nothing to insert')
    model = create(gate, inserted)
    single = []
    for x, y in zip(X, Y, strict=True):
        loss = F.cross_entropy(model(x[None]), y[None])
        single.append(torch.autograd.grad(loss, list(model.parameters())))
    wrapped = opacus.GradSampleModule(model, loss_reduction='sum')
    F.cross_entropy(wrapped(X), Y, reduction='sum').backward()
    for i, (key, parameter) in enumerate(model.named_parameters()):
        expected = torch.stack([gradients[i] for gradients in single])
        torch.testing.assert_close(parameter.grad_sample, expected, rtol=1e-6, atol=1e-9, msg=lambda m, k=key: k + m)
