"""Training tasks: timm's own, plus the penalty of Eq. 8 of the SPEM paper."""

from collections import OrderedDict

import torch
from timm.task import ClassificationTask, TrainingTask
from torch.optim import Optimizer


class PenaltyMixin:
    """L = L_m + eta * sum over gates of (p0^2 + p1^2), SPEM Eq. 8; L_m is the loss of the task it is mixed into.

    A penalty is added for every SPEM gate of the trained model, scripted ones too: modules that have its `penalty()`
    and `pool_lambda()`. A model without any trains exactly as with timm's task.

    Args:
        *args: As in the task.
        penalty_weight: eta; 0.1 is the paper's.
        **kwargs: As in the task.
    """

    decoupled = False

    def __init__(self, *args, penalty_weight: float = 0.1, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.penalty_weight = penalty_weight
        # a list, so that they stay the model's; a distillation's teacher lies outside of the trainable module
        self.gates = [
            m for m in self.get_trainable_module().modules() if hasattr(m, 'penalty') and hasattr(m, 'pool_lambda')
        ]

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs) -> TrainingTask:
        # train.py names its device always, and DDP refuses any name on a CPU
        return super().prepare_distributed(device_ids if self.device.type != 'cpu' else None, **ddp_kwargs)

    def decouple(self, optimizer: Optimizer) -> None:
        """Let `optimizer` see the gradient of the task's loss alone, and take the penalty's step by itself.

        Adam and its like divide a gradient by its size. lambda (Eq. 3) does not change with the length of p, so that
        for many updates the penalty's gradient, 2 eta p, is nearly all that p has: such an optimizer would drive p to
        0 at full speed, and then beyond. So after each update p becomes p - lr * 2 eta p, which is the penalty's step
        of SGD without momentum; AdamW treats its weight decay in the same way (https://arxiv.org/abs/1711.05101). p has
        a group of its own, without weight decay.
        """
        own = {gate.p for gate in self.gates if getattr(gate, 'p', None) is not None and gate.p.requires_grad}
        # a pruned or parametrised p is made from what the optimizer trains: then the penalty stays in the loss
        if not own or not own <= {p for group in optimizer.param_groups for p in group['params']}:
            return
        self.decoupled = True
        for group in list(optimizer.param_groups):
            if mine := [p for p in group['params'] if p in own]:
                group['params'] = [p for p in group['params'] if p not in own]
                settings = {k: v for k, v in group.items() if k != 'params'}
                optimizer.add_param_group({**settings, 'params': mine, 'weight_decay': 0.0, 'penalty': True})

        @torch.no_grad()
        def step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
            for group in optimizer.param_groups:
                if group.get('penalty'):
                    lr = group['lr'] * group.get('fallback_lr_scale', 1)  # Muon's, for what AdamW trains
                    for p in group['params']:
                        p.mul_(1 - 2 * lr * self.penalty_weight)

        optimizer.register_step_post_hook(step)

    def penalty(self) -> torch.Tensor:
        """Return the sum of the gates' penalties, a scalar without its eta."""
        return torch.stack([gate.penalty() for gate in self.gates]).sum()

    def epoch_metrics(self) -> OrderedDict[str, float]:
        """Return what to log of the gates: their penalty, and the mean over blocks of lambda (Eq. 3)."""
        if not self.gates:
            return OrderedDict()
        with torch.no_grad():
            mean_lambda = torch.stack([gate.pool_lambda() for gate in self.gates]).mean()
            return OrderedDict(penalty=self.penalty().item(), mean_lambda=mean_lambda.item())

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Do as the task, with the penalty in 'loss' and, by itself, under 'penalty'."""
        result = super().forward(input, target)
        if self.gates:
            result['penalty'] = self.penalty().detach() if self.decoupled else self.penalty()
            result['loss'] = result['loss'] + self.penalty_weight * result['penalty']
        return result


def with_penalty(task: type[TrainingTask]) -> type[TrainingTask]:
    """Return the subclass of one of timm's tasks that takes `penalty_weight`; see `PenaltyMixin`."""
    return type(f'Penalty{task.__name__}', (PenaltyMixin, task), {})


PenaltyTask = with_penalty(ClassificationTask)
