from functools import partial

from timm.layers import SEModule, create_attn
from timm.layers.cbam import ChannelAttn
from torch import nn

from ..utils import UserError, look_up
from .arguments import check_rd_ratio
from .cbam import CBAM
from .eca import ECA
from .identity_init import IdentityInit
from .saam import SAAM
from .sge import SGE
from .spem import SPEM
from .srm import SRM


def _reduced(layer: type[nn.Module], channels: int, *, rd_ratio: float, rd_channels: int | None = None, **kwargs):
    """Build one of timm's layers, whose own rounding would make one hidden channel of none."""
    if rd_channels is None:
        check_rd_ratio(channels, rd_ratio, layer.__name__)
    elif rd_channels < 1:  # timm takes 0 for None
        raise UserError(f'{layer.__name__}: rd_channels={rd_channels} must be at least 1')
    return layer(channels, rd_ratio=rd_ratio, rd_channels=rd_channels, **kwargs)


#: Channel gates by the name that model names carry.
GATES = {
    'se': partial(_reduced, SEModule, rd_ratio=1 / 16, rd_divisor=1),
    'se2': partial(_reduced, ChannelAttn, rd_ratio=1 / 4),  # one g on average and max pooling, summed
    'cbam': CBAM,
    'eca': ECA,
    'srm': SRM,
    'sge': SGE,
    'spem': SPEM,
    'saam': SAAM,
    'saam2': partial(SAAM, paths=2),
    'saam4': partial(SAAM, paths=4),
}

#: Gates of FA over whole blocks by name, and the channel gate that is in the blocks.
FA_GATES = {'fa': None, 'fase': 'se'}
#: What to do with a gate that is none of them, for messages.
OWN_GATE = "a gate of your own has a name after timm_poolattn.layers.GATES['name'] = its class"


def create_gate(name: str, channels: int, *, identity_init: bool = False, **kwargs) -> nn.Module:
    """Build the gate `name` for `channels` channels, by timm's create_attn.

    Args:
        name: one of `GATES`.
        channels: C, the channels of the input.
        identity_init: start without effect, see `IdentityInit`.
        **kwargs: of the gate's constructor.

    Raises:
        UserError: a name that `GATES` does not hold, or what the gate's constructor refuses.
    """
    gate = create_attn(GATES[look_up('gate', name, GATES, OWN_GATE)], channels, **kwargs)
    return IdentityInit(gate) if identity_init else gate
