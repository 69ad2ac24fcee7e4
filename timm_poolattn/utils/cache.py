"""Where what can be made again is kept."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Folder of decoded data and of the downloaded train script: $TIMM_POOLATTN_CACHE, or the user's cache folder."""
    if 'TIMM_POOLATTN_CACHE' in os.environ:
        return Path(os.environ['TIMM_POOLATTN_CACHE']).expanduser()
    return Path(os.environ.get('XDG_CACHE_HOME', '~/.cache')).expanduser() / 'timm_poolattn'
