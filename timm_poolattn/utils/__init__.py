from .cache import cache_dir
from .devices import look_up_device
from .errors import MissingFileError, UserError
from .files import remove_leftovers, replacing, write_text
from .names import look_up

__all__ = [
    'MissingFileError',
    'UserError',
    'cache_dir',
    'look_up',
    'look_up_device',
    'remove_leftovers',
    'replacing',
    'write_text',
]
