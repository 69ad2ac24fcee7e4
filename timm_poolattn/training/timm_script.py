"""Finding timm's own train.py, which its wheel does not carry."""

import hashlib
import importlib.util
import logging
import os
import sys
from pathlib import Path
from types import ModuleType

import timm
import torch

from ..utils import MissingFileError, UserError, cache_dir, replacing

_logger = logging.getLogger(__name__)

URL = 'https://raw.githubusercontent.com/huggingface/pytorch-image-models/{tag}/train.py'
#: The newest script that was read, of timm 1.0.29.dev0, by its commit: it schedules image sizes.
NEWEST = 'aa4b5850c1543fa488abf260f18390eda46cf85d'
#: Tag or commit of the script for an installed timm, where it is not the version's own tag.
TAGS = {'1.0.31': NEWEST}
#: SHA-256 of the scripts that CI tests, by tag or commit. The newest tag is one that a checkout may be at.
PINNED = {
    'v1.0.28': '1fb02d26fe16536bc7de2c987980644353117c2b2b8046532261464093cd1ac6',
    NEWEST: 'f0bb70b9e1c8c576eb1f7beba9cb46953d01ec1308d68c59ec055a6266f76388',
}

_THREE_WAYS = (
    "timm's train.py is not in its wheel. Three ways to get it: --timm-script PATH (or TIMM_TRAIN_SCRIPT=PATH);"
    ' a checkout of huggingface/pytorch-image-models in or beside the working folder;'
    ' or a network connection, to download it once'
)


def find_train_script(path: str | Path | None = None, *, allow_unpinned: bool = False) -> Path:
    """Find timm's train.py: `path`, $TIMM_TRAIN_SCRIPT, a checkout in or beside the working folder, or a download.

    Args:
        path: take this file. Default: look for one.
        allow_unpinned: download also where this package knows no SHA-256 to check the file against.

    Raises:
        MissingFileError: a file that was named is missing, or none was found; the message says the three ways.
        UserError: the download has no pinned hash or another one than pinned; the message says its hash.
    """
    for source, given in (('--timm-script', path), ('TIMM_TRAIN_SCRIPT', os.environ.get('TIMM_TRAIN_SCRIPT'))):
        if given:
            if not Path(given).is_file():
                raise MissingFileError(f'{source}: no file {given}. {_THREE_WAYS}')
            return Path(given)
    for folder in (Path.cwd(), Path.cwd().parent):
        script = folder / 'pytorch-image-models' / 'train.py'
        if script.is_file():
            return script
    return _download(allow_unpinned)


def _download(allow_unpinned: bool) -> Path:
    tag = TAGS.get(timm.__version__, f'v{timm.__version__}')
    script = cache_dir() / f'timm-train-{tag}.py'
    if script.is_file() and _check(script, tag, allow_unpinned):
        return script
    with replacing(script) as temp:
        try:
            torch.hub.download_url_to_file(URL.format(tag=tag), str(temp), progress=False)
        except OSError as e:
            raise MissingFileError(f'{URL.format(tag=tag)}: {e}. {_THREE_WAYS}') from e
        if not _check(temp, tag, allow_unpinned):
            raise UserError(f'{URL.format(tag=tag)}: SHA-256 is {_sha256(temp)}, pinned is {PINNED[tag]}; not used')
    return script


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check(script: Path, tag: str, allow_unpinned: bool) -> bool:
    """Return True if the file is the pinned one. Where none is pinned, log it if that is allowed, else refuse it."""
    if tag in PINNED:
        return _sha256(script) == PINNED[tag]
    if not allow_unpinned:
        raise UserError(
            f'train.py of timm {tag} has no pinned SHA-256; this file has {_sha256(script)}. Read it, then'
            f' --allow-unpinned-script runs it, or --timm-script PATH a file of your own'
        )
    _logger.warning(f'running an unpinned train.py of timm {tag}, SHA-256 {_sha256(script)}')
    return True


def load_train_script(script: Path) -> ModuleType:
    """Import train.py as the module `timm_train`; its main() is not run."""
    spec = importlib.util.spec_from_file_location('timm_train', script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where unpickling in loader workers looks its names up
    spec.loader.exec_module(module)
    return module
