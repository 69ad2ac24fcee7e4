import math
from argparse import Namespace

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, TrainingTask
from torch import nn
from torch.nn.utils import prune

from timm_poolattn.layers import SPEM
from timm_poolattn.training import PenaltyTask
from timm_poolattn.training.runner import _create_optimizer

from .test_recipes import recipe

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


def test_another_gate_has_a_penalty_of_its_own():
    """A module of a user's that has a `penalty` is none of SPEM's."""

    class Gate(torch.nn.Identity):
        def penalty(self):
            return torch.ones(())

    task = PenaltyTask(torch.nn.Sequential(Gate(), SPEM(3), torch.nn.Flatten()), torch.nn.CrossEntropyLoss())
    assert task.epoch_metrics() == pytest.approx(dict(penalty=0.5, mean_lambda=0.5))


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


@pytest.mark.parametrize('opt', ['nmuon', 'adamw', 'adam', 'lamb'])
def test_p_neither_vanishes_nor_grows(opt):
    """300 updates by an optimizer whose steps do not follow the gradient's size, eta as in the paper."""
    torch.manual_seed(0)
    model = timm.create_model('resnet20_spem', num_classes=4)
    model.stages = model.stages[:1]  # small: three gates of 16 channels
    model.head.fc = nn.Linear(16, 4)
    task = PenaltyTask(model, nn.CrossEntropyLoss()).train()
    kwargs = recipe('cpu')['opt_kwargs'] if opt == 'nmuon' else dict(filter_bias_and_bn=False)
    optimizer = create_optimizer_v2(model, opt, lr=0.03 if opt == 'nmuon' else 0.009, weight_decay=0.1, **kwargs)
    task.decouple(optimizer)
    images, targets = torch.randn(64, 3, 8, 8), torch.arange(64) % 4
    images += targets.view(-1, 1, 1, 1)
    for step in range(300):
        batch = torch.randperm(64)[:16]
        optimizer.zero_grad()
        task(images[batch], targets[batch])['loss'].backward()
        optimizer.step()
        for gate in task.gates:
            assert 0 <= gate.pool_lambda().item() <= 1, step
            assert 0.05 < gate.p.norm().item() < 1.5, step


def test_the_decoupled_step_is_sgds():
    """While gamma is 0 the loss does not move p; an update by Adam is then the penalty's of SGD: p - lr * 2 eta p."""
    model = timm.create_model('resnet20_spem').eval()
    task = PenaltyTask(model, nn.CrossEntropyLoss(), penalty_weight=0.1)
    optimizer = create_optimizer_v2(model, 'adamw', lr=0.01, weight_decay=0.5, filter_bias_and_bn=False)
    task.decouple(optimizer)
    result = task(INPUT, TARGET)
    assert result['penalty'].item() == pytest.approx(9 * 0.5)
    result['loss'].backward()
    optimizer.step()
    for gate in task.gates:
        torch.testing.assert_close(gate.p.data, torch.full((2,), 0.5 * (1 - 0.01 * 2 * 0.1)))
    assert sum(len(group['params']) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_a_pruned_p_keeps_its_penalty():
    """It is made from what the optimizer trains, so there is nothing to take the penalty's step by itself."""
    _, task = both('resnet20_spem')
    for gate in task.gates:
        prune.l1_unstructured(gate, 'p', 1)
    optimizer = create_optimizer_v2(task.trainable_module, 'adamw', lr=0.01)
    task.decouple(optimizer)
    assert not task.decoupled
    task(INPUT, TARGET)['penalty'].backward()
    assert all(gate.p_orig.grad.abs().sum() == 2 * 0.5 for gate in task.gates)


@pytest.mark.parametrize('opt', ['momentum', 'sgdw', 'sgdp', 'adamw', 'lookahead_momentum', 'lookahead_adamw'])
def test_who_takes_the_penaltys_step(opt):
    """Any SGD has it in the gradient; of Lookahead, what it wraps says it."""
    model = timm.create_model('resnet20_spem').eval()
    task = PenaltyTask(model, nn.CrossEntropyLoss(), penalty_weight=0.1)
    optimizer = _create_optimizer(Namespace(resume=''), [task], create_optimizer_v2, model, opt, lr=0.01)
    assert task.decoupled == opt.endswith('adamw')
    task(INPUT, TARGET)['loss'].backward()
    optimizer.step()
    steps = 1.9 if opt in ('sgdw', 'sgdp') else 1  # the first of Nesterov's with momentum 0.9
    for gate in task.gates:
        torch.testing.assert_close(gate.p.data, torch.full((2,), 0.5 * (1 - steps * 0.01 * 2 * 0.1)))


@pytest.mark.parametrize('name', ['resnet20_saam', 'resnet20'])
def test_a_model_without_p_keeps_its_groups(name):
    _, task = both(name)
    optimizer = create_optimizer_v2(task.trainable_module, 'adamw', lr=0.01)
    groups = [list(map(id, group['params'])) for group in optimizer.param_groups]
    task.decouple(optimizer)
    assert [list(map(id, group['params'])) for group in optimizer.param_groups] == groups
