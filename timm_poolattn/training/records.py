"""A folder that belongs to one run, and run.json in it: what was trained, how, on what and for how long."""

import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.utils import world_info_from_env

from ..utils import UserError, write_text
from ..version import __version__
from .recovery import newest_checkpoint
from .runs import read_checkpoint, read_curve

try:
    import fcntl
except ModuleNotFoundError:  # Windows, where nothing keeps two runs from one folder while they are in its first epoch
    fcntl = None

_logger = logging.getLogger(__name__)


def new_folder(output: Path, name: str) -> Path:
    """Make a folder of the time and `name` in `output`, which no other run gets."""
    start = f'{datetime.now():%Y%m%d-%H%M%S}-{name}'
    try:
        output.mkdir(parents=True, exist_ok=True)
        for number in range(1, 1000):
            folder = output / (start if number == 1 else f'{start}-{number}')
            with suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as e:
        raise UserError(f'{output}: cannot be written to ({e.strerror}); --output names another') from e
    raise UserError(f'{output}: a thousand runs started in it in this second; name this one by --experiment')


@contextmanager
def own_folder(folder: Path, resume: str, is_new: bool, resumable: bool = True) -> Iterator[None]:
    """Keep others off a run's folder, and refuse one that holds another run.

    Args:
        folder: is made if it is not there.
        resume: the checkpoint that the run goes on from, or ''.
        is_new: it is this run's, and removed again where the block raises before an epoch was saved.
        resumable: whether a message may offer to go on from a checkpoint.

    Raises:
        UserError: the folder holds another run, or another process trains into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY) if fcntl else None
    except OSError as e:
        raise UserError(f'{folder}: cannot be made ({e.strerror}); --output and --experiment name another') from e
    try:
        if fcntl:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f'{folder}: another process trains into it; --experiment names another folder'
                ) from None
        try:
            _check_empty(folder, resume, resumable)
            _mend_curve(folder)
            yield
        except BaseException:
            if is_new and not newest_checkpoint(folder) and not list(folder.glob('*.pth.tar')):
                shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        if lock is not None:
            os.close(lock)


def _check_empty(folder: Path, resume: str, resumable: bool) -> None:
    curve, newest = read_curve(folder), newest_checkpoint(folder)
    if not curve and not newest:  # a run that ended in its first epoch left nothing that could be mixed up
        return
    if resume and Path(resume).resolve().parent == folder.resolve():
        return
    last = int(curve[-1]['epoch']) + 1 if curve else 0
    epochs = f'{last} epoch{"s" * (last != 1)}' if curve else newest.name
    goes_on = f', or --resume {newest} goes on with it' if newest and resumable else ''
    raise UserError(f'{folder}: holds another run ({epochs}); --experiment names another folder{goes_on}')


def _mend_curve(folder: Path) -> None:
    """Cut from summary.csv a last row that was not written to its end, so that timm's next one is a line of its own."""
    path = folder / 'summary.csv'
    if path.is_file():
        text = path.read_bytes().decode(errors='replace')
        if text and not text.endswith('\n'):
            write_text(path, text[: text.rfind('\n') + 1])


class Record:
    """run.json of a run in progress: written at its start, and again whenever a checkpoint is.

    Of a resumed run it holds what went before, too: `resumed`, its parts, and the time that they took. `ended` is True
    once no epoch is left.

    Args:
        folder: of the run.
        resume: the checkpoint that it goes on from, or ''.
        **facts: what else to say.
    """

    def __init__(self, folder: Path, resume: str, device: str, **facts: Any) -> None:
        self.path = folder / 'run.json'
        self.start = time.time()
        self.resumes_here = bool(resume) and Path(resume).resolve().parent == folder.resolve()
        kind = torch.device(device).type
        name = {'cpu': f'{os.cpu_count()} CPU cores', 'mps': 'Apple GPU'}.get(kind, kind)
        if kind == 'cuda':
            name = torch.cuda.get_device_name(device)
        if (processes := world_info_from_env()[2]) > 1:
            name = f'{processes} processes, each with a batch of its own: {name}'
        self.facts = dict(
            facts,
            versions=dict(
                timm_poolattn=__version__,
                timm=timm.__version__,
                torch=torch.__version__,
                torchvision=torchvision.__version__,
                python=platform.python_version(),
            ),
            hardware=f'{name} ({platform.machine()})',
        )
        self.seconds_before = 0
        self.before = before = _read(Path(resume).parent / 'run.json') if resume else {}
        if before:
            part = {k: before.get(k, {}) for k in ('arguments', 'options')}
            if 'teacher_weights' in before:
                part['teacher_weights'] = before['teacher_weights']
            part['after_epochs'] = read_checkpoint(resume)['epoch'] + 1
            self.facts['resumed'] = [*before.get('resumed', []), part]
            if changes := _changes(before, json.loads(json.dumps(facts))):
                _logger.warning(f'--resume: not as before: {", ".join(changes)}')
            self.facts = {**{k: before[k] for k in ('warm_start', 'classes') if k in before}, **self.facts}
            self.seconds_before = before.get('wall_time_s', 0)
        if not before:
            self.write()

    @property
    def seconds(self) -> float:
        """Since the start of this part of the run."""
        return time.time() - self.start

    def end(self, trained: bool) -> None:
        """Note that the run has ended; that of one with no epoch left, not `trained`, stays as it was."""
        if not trained and self.before and self.resumes_here:
            self.facts, self.seconds_before, self.start = self.before, self.before.get('wall_time_s', 0), time.time()
        self.facts['ended'] = True
        self.write()

    def write(self) -> None:
        """Write run.json as of now."""
        facts = dict(self.facts, wall_time_s=round(self.seconds_before + self.seconds))
        write_text(self.path, json.dumps(facts, indent=2) + '\n')


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return what differs among the arguments, options and teachers of two records."""
    parts = [[record.get(key) for key in ('arguments', 'options')] for record in (before, now)]
    old, new = ({k: v for part in of if isinstance(part, dict) for k, v in part.items()} for of in parts)
    for values, record in ((old, before), (new, now)):  # of one name the weights may have been exchanged
        values['weights of the teachers'] = [sha256[:8] for sha256 in record.get('teacher_weights', [])]
    return [
        f'{k} {old.get(k, "not given")} -> {new.get(k, "not given")}'
        for k in sorted({*old, *new})
        if old.get(k) != new.get(k)
    ]


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
        return record if isinstance(record, dict) else {}
    except (OSError, ValueError):  # none, or one that was cut short: the run goes on without it
        return {}
