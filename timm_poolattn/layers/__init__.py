from .cbam import CBAM
from .create_gate import FA_GATES, GATES, create_gate
from .eca import ECA
from .focus_association import Association, Focus, FocusAssociation, fa_weight, fa_weight_unskipped
from .identity_init import FadeIn, IdentityInit
from .max_min_pool import max_min_pool, set_fused_pool, use_fused_pool
from .saam import SAAM
from .sge import SGE
from .spem import REWEIGHT_FORMS, SPEM
from .srm import SRM

__all__ = [
    'CBAM',
    'ECA',
    'FA_GATES',
    'GATES',
    'REWEIGHT_FORMS',
    'SAAM',
    'SGE',
    'SPEM',
    'SRM',
    'Association',
    'FadeIn',
    'Focus',
    'FocusAssociation',
    'IdentityInit',
    'create_gate',
    'fa_weight',
    'fa_weight_unskipped',
    'max_min_pool',
    'set_fused_pool',
    'use_fused_pool',
]
