"""What a run survives: Ctrl-C, a diverging loss, a full disk, a kill, a damaged checkpoint."""

import errno
import logging
import math
import random
import re
import shutil
import signal
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from timm.task import TrainingTask
from timm.utils import random_seed
from torch import nn
from torch.optim import Optimizer

from ..utils import MissingFileError, UserError, sync
from .runs import model_weights, read_checkpoint

_logger = logging.getLogger(__name__)

#: Of an optimizer's group of parameters, what arguments of train.py set and no optimizer changes.
_SETTINGS = ('lr', 'weight_decay', 'momentum', 'betas', 'eps', 'lr_scale', 'fallback_lr_scale', 'ns_steps', 'nesterov')
_REMEDY = 'give it as before, or add --no-resume-opt'
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunStopped(UserError, RuntimeError):
    """A run that cannot go on; the message says where it stopped, why, and what to do."""


def check_checkpoint(path: str | Path, model: nn.Module | None = None) -> None:
    """Refuse a checkpoint that a run cannot go on from.

    Args:
        path: given by --resume.
        model: what it must be of.

    Raises:
        MissingFileError: it is missing.
        UserError: it was cut short or changed (the message offers the newest whole one beside it), is none of
            train.py's, or of another model.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f'--resume: no file {path}')
    if not _is_whole(path):
        offer = newest_checkpoint(path.parent)
        offer = f'the newest whole one is {offer}' if offer else 'no other in its folder is whole'
        raise UserError(f'--resume: {path} is damaged: it was cut short or changed; {offer}')
    if model is not None:
        saved = {name: w.shape for name, w in model_weights(read_checkpoint(path)).items()}
        own = {name: w.shape for name, w in model.state_dict().items()}
        if differing := sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name)):
            raise UserError(
                f'--resume: {path} is of another model: {len(differing)} tensors differ, as {differing[0]} does; give'
                f' the --model and --num-classes that it was trained with'
            )


def check_rate(path: str | Path, opt: str, lr: float | None) -> None:
    """Refuse, before any image is read, a checkpoint of another optimizer or learning rate.

    Args:
        path: given by --resume.
        opt: as --opt has it.
        lr: as --lr has it; None where --lr-base and the batch size say it, see `check_optimizer`.

    Raises:
        UserError: one of them differs.
    """
    args = read_checkpoint(path).get('args')
    old_opt, old_lr = getattr(args, 'opt', opt), getattr(args, 'lr', lr)
    if opt.lower() != old_opt.lower():
        raise UserError(f'--resume: --opt is {opt}, and {path} is of {old_opt}; {_REMEDY}')
    if lr is not None and lr != old_lr:
        raise UserError(f'--resume: --lr is {lr}, and {path} is of {old_lr}; {_REMEDY}')


def check_optimizer(path: str | Path, optimizer: Optimizer) -> None:
    """Refuse a checkpoint whose optimizer has other settings: it keeps them, whatever a resumed run's command says.

    Args:
        path: given by --resume.
        optimizer: of the resumed run, new.

    Raises:
        UserError: one of `_SETTINGS` differs.
    """
    groups, new_groups = read_checkpoint(path).get('optimizer', {}).get('param_groups', []), optimizer.param_groups
    if groups and len(groups) != len(new_groups):
        said = f'{len(new_groups)} groups of parameters, and that in {path} has {len(groups)}'
        raise UserError(f'--resume: the optimizer has {said}; {_REMEDY}')
    for old, new in zip(groups, new_groups, strict=bool(groups)):
        old = {**old, 'lr': old.get('initial_lr', old.get('lr'))}
        for key in (key for key in _SETTINGS if key in old and key in new):
            was, now = (tuple(v) if isinstance(v, list) else v for v in (old[key], new[key]))  # --opt-betas is a list
            if was != now:
                why = ' (of --lr, or --lr-base and the batch size)' if key == 'lr' else ''
                raise UserError(
                    f'--resume: {key} is {new[key]}{why}, and the optimizer in {path} keeps {old[key]}; {_REMEDY}'
                )


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the whole checkpoint of the latest epoch's end in a run's folder, if any."""
    names = {path: re.fullmatch(r'checkpoint-(\d+)\.pth\.tar', path.name) for path in folder.glob('checkpoint-*')}
    epochs = {path: int(name[1]) for path, name in names.items() if name}
    # each is a link to what was `last` at its time
    paths = [*folder.glob('last.pth.tar'), *sorted(epochs, key=epochs.get, reverse=True)]
    return next(filter(_is_whole, paths), None)


def _is_whole(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:  # which torch.save writes, with a checksum for each tensor
            return archive.testzip() is None
    except (zipfile.BadZipFile, EOFError, OSError):
        return False


class Guard:
    """Stand around the epochs of timm's train.py.

    Each epoch starts from random states that are a function of the seed, the epoch and the rank alone. An epoch that
    is repeated after a kill so repeats its mixup, erasing, dropout and drop path. A loss that is not finite stops the
    run. Ctrl-C takes effect between two updates, never within one or while a checkpoint is written.

    Args:
        seed: train.py's.
        rank: of this process.
        resume: the checkpoint that the run goes on from, or ''.
        resumable: whether a message may offer to go on from a checkpoint.
        on_save: called whenever a checkpoint has been saved.
    """

    def __init__(
        self,
        seed: int,
        rank: int = 0,
        resume: str = '',
        resumable: bool = True,
        on_save: Callable[[], None] = lambda: None,
    ) -> None:
        self.seed = seed
        self.rank = rank
        self.resume = resume
        self.resumable = resumable
        self.on_save = on_save
        self.epoch = self.update = 0
        self.saver = None  # train.py's, which the primary process alone has
        self.started = self.training = False  # started: training has begun, and what ends it is no wrong argument
        self.interrupts = 0
        self.saving = False

    def around(self, train_one_epoch: Callable) -> Callable:
        """Guard train.py's train_one_epoch."""

        def guarded(epoch: int, model, loader, optimizer, *args, task: TrainingTask, saver=None, **kwargs):
            self.epoch, self.update, self.training, self.started = epoch, 0, True, True
            if saver and not self.saver:
                self.saver = saver
                if self.resume and Path(self.resume).parent.samefile(saver.checkpoint_dir):
                    # or the first epoch from here would become model_best, however good those before it were
                    saver.load_state_dict_from_checkpoint(self.resume)
                saver.save_checkpoint = self._named(saver.save_checkpoint)
                saver.save_recovery = self._named(saver.save_recovery)
            random_seed(random.Random(f'{self.seed}/{epoch}').getrandbits(31), self.rank)
            losses = []
            hook = task.register_forward_hook(lambda task, args, result: losses.append(result['loss'].detach().clone()))
            update_ema = task.update_ema  # what train.py calls once after each update, and before it saves anything

            def after_update(step: int | None = None) -> None:
                self.update += 1
                loss = torch.stack(losses).sum().item()
                losses.clear()
                if not math.isfinite(loss):
                    lr = sum(group['lr'] for group in optimizer.param_groups) / len(optimizer.param_groups)
                    raise RunStopped(
                        f'the loss is {loss} in epoch {epoch}, update {self.update} of the epoch, at learning rate'
                        f' {lr:g}; lower --lr, or clip with --clip-grad 1.{self._resume_from()}'
                    )
                update_ema(step=step)
                if self.interrupts:
                    raise KeyboardInterrupt

            task.update_ema = after_update
            try:
                metrics = train_one_epoch(epoch, model, loader, optimizer, *args, task=task, saver=saver, **kwargs)
            finally:
                hook.remove()
                del task.update_ema
            self.training = False
            return metrics

        return guarded

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch over train.py's main: Ctrl-C waits for the end of an update, and a full disk is named.

        Raises:
            RunStopped: a checkpoint could not be written.
        """

        def interrupt(signum, frame) -> None:
            self.interrupts += 1
            if self.interrupts > 2 or not (self.saving or (self.training and self.interrupts == 1)):
                raise KeyboardInterrupt

        in_main_thread = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, interrupt) if in_main_thread else None
        try:
            yield
        except OSError as e:  # of the row in summary.csv
            if not self.saver or e.errno not in _DISK_FULL:
                raise
            raise self._not_saved(e) from e
        finally:
            if in_main_thread:
                signal.signal(signal.SIGINT, before)

    def _named(self, save: Callable) -> Callable:
        """Make a method of the saver that ends with its files on the disk, and whose failure says what is lost.

        torch's writer has no errno of a full disk.
        """

        def saving(*args, **kwargs):
            before, self.saving = self.interrupts, True
            try:
                result = save(*args, **kwargs)
                for path in (*self._folder().glob('*.pth.tar'), self._folder()):
                    sync(path)
                self.on_save()
            except (OSError, RuntimeError, UserError) as e:
                raise self._not_saved(e) from e
            finally:
                self.saving = False
            if self.interrupts and not before:
                raise KeyboardInterrupt
            return result

        return saving

    def _not_saved(self, e: Exception) -> RunStopped:
        for leftover in self._folder().glob('*tmp.pth.tar'):
            leftover.unlink()
        free = shutil.disk_usage(self._folder()).free / 1e9
        return RunStopped(
            f'epoch {self.epoch} could not be saved in {self._folder()}, whose disk has {free:.3f} GB free'
            f' ({str(e).splitlines()[0]}); free some, or name another --output.{self._resume_from()}'
        )

    def save_interrupted(self) -> str:
        """Save where Ctrl-C stopped a resumable run, by timm's own recovery checkpoint; returns how to resume."""
        message = f'interrupted in epoch {self.epoch} after {self.update} updates.'
        if not self.saver or not self.resumable:
            return message
        if self.interrupts == 1 and self.update:  # a second Ctrl-C may have hit within an update
            self.saver.save_recovery(self.epoch, batch_idx=self.update - 1)
            recovery = self.saver.curr_recovery_file
            message += f' Saved {recovery}, to go on with epoch {self.epoch + 1}.'
            if not newest_checkpoint(self._folder()):
                return f'{message} That is: {self._same_command(recovery)}'
        return message + self._resume_from()

    def _folder(self) -> Path:
        return Path(self.saver.checkpoint_dir)

    def _resume_from(self) -> str:
        path = newest_checkpoint(self._folder()) if self.saver and self.resumable else None
        if not path:
            return ''
        return f' To go on from the last whole epoch, as if nothing had happened: {self._same_command(path)}'

    def _same_command(self, checkpoint: str | Path) -> str:
        folder = self._folder()
        return f'the same command with --output {folder.parent} --experiment {folder.name} --resume {checkpoint}'
