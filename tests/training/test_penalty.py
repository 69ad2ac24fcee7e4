import math

import pytest
import timm
import torch
from timm.task import ClassificationTask, TrainingTask
from torch import nn

from timm_poolattn.layers import SPEM
from timm_poolattn.training import PenaltyTask

INPUT, TARGET = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])


def both(name, **kwargs):
    model = timm.create_model(name).eval()
    return ClassificationTask(model, nn.CrossEntropyLoss()), PenaltyTask(model, nn.CrossEntropyLoss(), **kwargs)


def test_loss_is_eq_8():
    plain, task = both('resnet20_spem', penalty_weight=0.25)
    gates = [m for m in task.trainable_module.modules() if isinstance(m, SPEM)]
    with torch.no_grad():
        for i, gate in enumerate(gates):
            gate.p.copy_(torch.tensor([0.1 * i, 1.0]))
    penalty = sum(p**2 for gate in gates for p in gate.p.tolist())
    result = task(INPUT, TARGET)
    assert result['penalty'].item() == pytest.approx(penalty, rel=1e-6)
    assert result['loss'].item() == pytest.approx(plain(INPUT, TARGET)['loss'].item() + 0.25 * penalty, rel=1e-6)
    assert result['output'].equal(plain(INPUT, TARGET)['output'])


def test_gradient_of_p():
    _, task = both('resnet20_spem')
    gates = [m for m in task.trainable_module.modules() if isinstance(m, SPEM)]
    result = task(INPUT, TARGET)
    grads = torch.autograd.grad(result['loss'], [g.p for g in gates])
    for grad in grads:  # gamma_exc starts at 0, so that at the start p has the penalty's gradient alone: 2 eta p
        torch.testing.assert_close(grad, torch.tensor([0.1, 0.1]))


@pytest.mark.parametrize('name', ['resnet20_saam', 'resnet20_fa', 'resnet20'])
def test_a_model_without_penalty_costs_nothing(name):
    plain, task = both(name)
    result = task(INPUT, TARGET)
    assert result.keys() == plain(INPUT, TARGET).keys() and result['loss'].equal(plain(INPUT, TARGET)['loss'])
    assert task.epoch_metrics() == {}


def test_epoch_metrics():
    _, task = both('resnet20_spem')
    assert task.epoch_metrics() == pytest.approx(dict(penalty=9 * 0.5, mean_lambda=0.5))


def test_it_is_a_training_task():
    """AMP, EMA, checkpoints and compile go through timm's own methods."""
    _, task = both('resnet20_spem')
    assert isinstance(task, TrainingTask)
    task.setup_ema(decay=0.5)
    for step, value in enumerate((0.5, 0.25), 1):
        with torch.no_grad():
            task.trainable_module.stages[0].blocks[0].gate.p.fill_(value)
        task.update_ema(step=step)
    state = task.get_checkpoint_state(ema=True)['state_dict_ema']
    torch.testing.assert_close(state['stages.0.blocks.0.gate.p'], torch.tensor([0.375, 0.375]))
    assert task.get_checkpoint_state()['state_dict'].keys() == task.trainable_module.state_dict().keys()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        result = task(INPUT, TARGET)
    assert result['loss'].dtype == torch.float32 and math.isfinite(result['loss'].item())
    task.compile(backend='eager')
    assert task(INPUT, TARGET)['penalty'].item() == pytest.approx(8 * 0.5 + 2 * 0.25**2)


def test_moves_with_its_model():
    _, task = both('resnet20_spem')
    task.to(torch.float64)
    assert task(INPUT.double(), TARGET)['loss'].dtype == torch.float64
