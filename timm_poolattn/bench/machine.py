"""Where something was measured."""

import os
import platform
from datetime import date
from typing import Any

import timm
import torch

from ..version import __version__

#: Memory formats by the name that options and results have for them.
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}


def describe_machine(device: torch.device | str) -> dict[str, Any]:
    """Describe the machine, its threads, the versions and the date, for the head of a result."""
    capabilities = getattr(torch.cpu, 'get_capabilities', dict)()
    bfloat16 = [name for name, has in capabilities.items() if has and name.endswith('bf16')]
    cpu = ', '.join([platform.machine(), *bfloat16])
    on_cuda = torch.device(device).type == 'cuda'
    return dict(
        machine=torch.cuda.get_device_name(device) if on_cuda else f'{os.cpu_count()} CPU cores ({cpu})',
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        timm=timm.__version__,
        timm_poolattn=__version__,
        date=date.today().isoformat(),
    )
