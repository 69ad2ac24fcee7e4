from .cache import cache_dir
from .devices import look_up_device
from .errors import MissingFileError, UserError
from .extras import require
from .files import REFUSED, remove_leftovers, replacing, sync, write_text
from .names import look_up
from .progress import progress
from .releases import HUB_ORG, carried, hub_configs_dir, released

__all__ = [
    'HUB_ORG',
    'REFUSED',
    'MissingFileError',
    'UserError',
    'cache_dir',
    'carried',
    'hub_configs_dir',
    'look_up',
    'look_up_device',
    'progress',
    'released',
    'remove_leftovers',
    'replacing',
    'require',
    'sync',
    'write_text',
]
