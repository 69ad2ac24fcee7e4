"""The training task: timm's classification task plus the penalty of Eq. 8 of the SPEM paper."""

from collections import OrderedDict

import torch
from timm.task import ClassificationTask
from torch import nn


class PenaltyTask(ClassificationTask):
    """L = L_m + eta * sum over gates of (p0^2 + p1^2), SPEM Eq. 8.

    A penalty is added for every module of the model that has a `penalty()`; a model without any trains exactly as
    with timm's ClassificationTask.

    Args:
        model: The model to train.
        *args: As in ClassificationTask.
        penalty_weight: eta. Default: 0.1, the paper's.
        **kwargs: As in ClassificationTask.
    """

    def __init__(self, model: nn.Module, *args, penalty_weight: float = 0.1, **kwargs) -> None:
        super().__init__(model, *args, **kwargs)
        self.penalty_weight = penalty_weight
        self.gates = [m for m in model.modules() if hasattr(m, 'penalty')]  # a list, so that they stay the model's

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs) -> 'PenaltyTask':
        # train.py names its device always, and DDP refuses any name on a CPU
        return super().prepare_distributed(device_ids if self.device.type != 'cpu' else None, **ddp_kwargs)

    def penalty(self) -> torch.Tensor:
        """Sum of the gates' penalties, a scalar without its eta."""
        return torch.stack([gate.penalty() for gate in self.gates]).sum()

    def epoch_metrics(self) -> OrderedDict[str, float]:
        """What to log of the gates: their penalty, and the mean over blocks of lambda (Eq. 3)."""
        if not self.gates:
            return OrderedDict()
        with torch.no_grad():
            mean_lambda = torch.stack([gate.pool_lambda() for gate in self.gates]).mean()
            return OrderedDict(penalty=self.penalty().item(), mean_lambda=mean_lambda.item())

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """As ClassificationTask, with the penalty in 'loss' and, by itself, under 'penalty'."""
        result = super().forward(input, target)
        if self.gates:
            result['penalty'] = self.penalty()
            result['loss'] = result['loss'] + self.penalty_weight * result['penalty']
        return result
