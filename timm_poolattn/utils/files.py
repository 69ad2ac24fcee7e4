"""The one way to write a file or a folder: whole or not at all, whenever the process ends."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from .errors import UserError

try:
    import fcntl
except ModuleNotFoundError:  # Windows, where a killed run's leftovers stay until they are deleted by hand
    fcntl = None

#: What the disk or its owner refuses, by errno.
REFUSED = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ENOTEMPTY),
    *(errno.ELOOP, errno.EIO, errno.EBUSY),
)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to; when the block ends well, what it wrote takes the place of `path`.

    The yielded path has the name of `path`, in a hidden folder of unpredictable name beside it. A file is on the disk
    before it gets its name. An old folder is moved aside and deleted. If the block raises, or the process is killed,
    `path` is as it was, and the next writer of the same path removes what was left.

    Args:
        path: a file or a folder. A symbolic link keeps being one: what it points to is replaced.

    Raises:
        UserError: the disk is full, the place cannot be written to, or a file would replace a folder or a device.
    """
    path = Path(os.path.realpath(path))
    if os.path.exists(path) and not (path.is_file() or path.is_dir()):  # as /dev/null
        raise UserError(f'{path}: is a device or a pipe; name a file')
    with _refusals(path, errno.ENOENT):  # as /proc says that it takes no files
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        folder, lock = _own_folder(path)
    try:
        with _refusals(path):
            os.umask(mask := os.umask(0o077))  # there is no way to read it alone
            temp = folder / path.name
            yield temp
            for file in [temp] if temp.is_file() else temp.rglob('*'):
                if file.suffix == '.safetensors':
                    file.chmod(0o666 & ~mask)  # as any other file; safetensors leaves it to the user alone
                sync(file)
            if path.is_dir() and temp.is_file():
                raise UserError(f'{path}: is a folder; name a file')
            if path.is_dir() and not path.is_symlink():
                path.rename(folder / 'old')  # a kill right here: `remove_leftovers` moves it back
            os.replace(temp, path)
            sync(path.parent)
    finally:
        if not path.exists() and (folder / 'old').exists():
            (folder / 'old').rename(path)
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _own_folder(path: Path) -> tuple[Path, int | None]:
    """Make the hidden folder of one writer of `path`; returns it and its lock, where the file system has locks."""
    for attempt in range(3):
        folder = Path(tempfile.mkdtemp(prefix=f'.{path.name}.', suffix='.tmp', dir=path.parent))
        lock = _lock(folder)
        if (lock is not None and folder.exists()) or attempt == 2:
            break
        # before it was locked, another writer took it for a leftover
        if lock is not None:
            os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)
    return folder, lock


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file by `replacing`."""
    with replacing(path) as temp:
        temp.write_text(text, encoding='utf-8', newline='')


def remove_leftovers(path: Path) -> None:
    """Remove what killed writers of `path` left, and move back an old folder that one had just moved aside."""
    for folder in path.parent.glob(f'.{escape(path.name)}.*.tmp'):
        lock = _lock(folder)
        if lock is None:  # its writer is at work
            continue
        old = folder / 'old'
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _lock(folder: Path) -> int | None:
    """Return a descriptor that holds the lock on `folder` until it or its process ends; None if another has it."""
    if fcntl is None:
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # removed meanwhile
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def sync(path: Path) -> None:
    """Bring a file or a folder onto the disk, so that a power cut leaves it whole, where the file system can."""
    with suppress(OSError):  # not every file system can
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _refusals(path: Path, *more: int) -> Iterator[None]:
    """Turn what means that `path` cannot be written, by errno also one of `more`, into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        # safetensors' and torch's writers keep the error number, or its words, in the message alone
        code = re.search(r'os error (\d+)', str(e))
        number = int(code[1]) if code else getattr(e, 'errno', None)
        known = number in (*REFUSED, *more) or 'No space left' in str(e)
        full = isinstance(e, RuntimeError) and _free(path) < 2**20
        if not known and not full:
            raise
        reason = getattr(e, 'strerror', None) or (os.strerror(number) if number else 'no space left on the disk')
        raise UserError(f'{path}: cannot be written: {reason}; {_free(path) / 1e9:.2f} GB are free there') from e


def _free(path: Path) -> int:
    folder = next((p for p in path.parents if p.is_dir()), Path('/'))
    return shutil.disk_usage(folder).free
