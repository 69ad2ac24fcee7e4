from functools import partial

from timm.layers import EcaModule, SEModule, create_attn
from timm.layers.cbam import ChannelAttn
from torch import nn

from .cbam import CBAM
from .saam import SAAM
from .sge import SGE
from .spem import SPEM
from .srm import SRM

#: Channel gates by the name that model names carry. FA gates whole blocks: see focus_association.py.
GATES = {
    'se': partial(SEModule, rd_divisor=1),
    'se2': partial(ChannelAttn, rd_ratio=1 / 4),  # one g on average and max pooling, summed
    'cbam': CBAM,
    'eca': EcaModule,
    'srm': SRM,
    'sge': SGE,
    'spem': SPEM,
    'saam': SAAM,
    'saam2': partial(SAAM, paths=2),
    'saam4': partial(SAAM, paths=4),
}


def create_gate(name: str, channels: int, **kwargs) -> nn.Module:
    """The gate `name` for `channels` channels, by timm's create_attn. `kwargs` go to the gate's constructor.

    Raises:
        ValueError: a name that `GATES` does not hold.
    """
    if name not in GATES:
        raise ValueError(f'unknown gate {name!r}; choose from {", ".join(GATES)}')
    return create_attn(GATES[name], channels, **kwargs)
