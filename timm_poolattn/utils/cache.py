"""Where what can be made again is kept."""

import os
import tempfile
from pathlib import Path


def cache_dir() -> Path:
    """Folder of decoded data, teachers' targets and timm's train script: $TIMM_POOLATTN_CACHE, or the user's cache."""
    path = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'timm_poolattn')
    try:
        return Path(os.environ.get('TIMM_POOLATTN_CACHE') or path).expanduser()
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir(), 'timm_poolattn')
