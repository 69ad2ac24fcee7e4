"""What a model costs to run."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def multiply_adds(model: nn.Module) -> int:
    """Count the multiply-adds of the convolutions and linear layers for one image of the model's own size.

    This is what the SAAM paper's FLOPs column adds for a module: no pooling, no element-wise operation.

    Args:
        model: put into evaluation mode.
    """
    parameter = next(model.parameters())
    size = (model.in_chans, *model.pretrained_cfg['input_size'][1:])
    image = torch.zeros(1, *size, device=parameter.device, dtype=parameter.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(image)
    counts = counter.get_flop_counts()['Global']
    return sum(n for op, n in counts.items() if str(op) in ('aten.convolution', 'aten.addmm', 'aten.mm')) // 2
