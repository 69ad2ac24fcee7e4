"""Structured pruning by torch-pruning: whole channels go, from the gates' layers too."""

import pytest
import timm
import torch

from timm_poolattn.layers import GATES

pytestmark = pytest.mark.compat
tp = pytest.importorskip('torch_pruning')


# not SGE: torch-pruning finds no end among its groups
@pytest.mark.parametrize('gate', ['', *(f'_{gate}' for gate in (*GATES, 'fa', 'fase') if gate != 'sge')])
def test_resnet20(gate):
    _prune(timm.create_model(f'resnet20{gate}'))


def test_a_gate_that_loses_channels():
    """A focus reads fewer channels than it was built for."""
    model = _prune(timm.create_model('vgg19_fase'))
    focuses = [m.fc1 for n, m in model.named_modules() if n.endswith('focus')]
    assert focuses and min(fc1.weight.shape[1] for fc1 in focuses) == 32


def _prune(model):
    """Take half of the channels; what is left trains."""
    before = sum(p.numel() for p in model.parameters())
    importance, x = tp.importance.MagnitudeImportance(p=2), torch.randn(2, 3, 32, 32)
    tp.pruner.BasePruner(model, x, importance, pruning_ratio=0.5, ignored_layers=[model.get_classifier()]).step()
    model(x).square().sum().backward()
    assert sum(p.numel() for p in model.parameters()) < 0.6 * before
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    return model
