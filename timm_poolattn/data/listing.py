"""Which images a split has: the same ones from a folder and from a tar of it. Nothing is decoded here."""

import hashlib
import io
import json
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from posixpath import join, normpath
from typing import NamedTuple

from timm.data import get_img_extensions

from ..utils import MissingFileError, UserError
from .view import MAX_BYTES

TRAIN_SPLITS = ('train', 'training')
EVAL_SPLITS = ('validation', 'val', 'valid', 'eval', 'evaluation', 'test')
#: The most members of a tar: what they are called is held in memory.
MAX_MEMBERS = 2**21
#: timm's, so that its own loader sees the same images.
_EXTENSIONS = get_img_extensions(as_set=True)
_SUFFIXES = ', '.join(sorted(_EXTENSIONS))
#: What photos are called that timm's loader passes over.
_OTHER_PHOTOS = {'.avif', '.bmp', '.gif', '.heic', '.heif', '.jfif', '.jpe', '.tif', '.tiff', '.webp'}
_DAMAGES = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)


class _Entry(NamedTuple):
    """What a folder holds under `name`: a file or a folder, or neither (''), and where links lead in the end."""

    name: str
    place: str
    kind: str
    is_link: bool = False
    size: int = 0
    mtime: int = 0


class _Image(NamedTuple):
    name: str  # below the split
    class_name: str
    place: str  # of its bytes
    size: int
    mtime: int  # in ns


class Folder:
    """A folder of splits or of classes. Places are real paths."""

    is_compressed = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = os.path.realpath(path)
        self.strays: list[str] = []

    def entries(self, place: str) -> list[_Entry]:
        found = []
        for entry in os.scandir(place):
            target = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
            try:
                status = entry.stat()
            except OSError:  # a link to nothing, or to itself
                found.append(_Entry(entry.name, target, '', True))
                continue
            kind = 'folder' if entry.is_dir() else 'file' if entry.is_file() else ''
            found.append(_Entry(entry.name, target, kind, entry.is_symlink(), status.st_size, status.st_mtime_ns))
        return sorted(found)

    def read(self, images: list[_Image]) -> Iterator[tuple[int, bytes]]:
        """Yield the number and the bytes of each image."""
        for i, image in enumerate(images):
            try:
                yield i, Path(image.place).read_bytes()
            except OSError as e:
                raise UserError(f'{image.place}: cannot be read ({e.strerror})') from e


class Archive:
    """A tar of such a folder. Its members are read in place and never extracted, so their paths cannot do harm."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mtime = path.stat().st_mtime_ns
        self.members: dict[str, tarfile.TarInfo] = {}
        self.links: dict[str, str] = {}
        self.strays: list[str] = []  # whose names lead out of the archive
        self.folders: dict[str, set[str]] = {'': set()}
        with _damages(path), tarfile.open(path) as tar:
            self.is_compressed = not isinstance(tar.fileobj, io.BufferedReader)
            count = 0
            while (member := tar.next()) is not None:
                tar.members.clear()  # it keeps them all, and two millions of any kind are gigabytes
                count += 1
                if count > MAX_MEMBERS:
                    raise UserError(f'{path}: more than {MAX_MEMBERS:,} members; unpack it and name the folder')
                self._add(member)
            tar.fileobj.seek(tar.offset)
            block = tar.fileobj.read(512)  # tarfile takes a header that is cut short or damaged for the end
            if len(block) < 512 or block.strip(b'\0'):
                raise tarfile.ReadError(f'it is cut short or damaged after {count} members')
        self.root = self._find_root()

    def _add(self, member: tarfile.TarInfo) -> None:
        place = _normal(member.name)
        if place is None:
            self.strays.append(member.name)
            return
        if member.isdir():
            self._add_folder(place)
            return
        folder, _, name = place.rpartition('/')
        self._add_folder(folder)
        self.folders[folder].add(name)
        self.members.pop(place, None)  # the last of one name is the one that counts
        self.links.pop(place, None)
        if member.issym():
            self.links[place] = join(folder, member.linkname)
        elif member.islnk():  # to a member before it, and as good as that one
            member = self.members.get(_normal(member.linkname))
        if member is not None and member.isfile():
            self.members[place] = member

    def _add_folder(self, place: str) -> None:
        missing = []
        while place not in self.folders:
            missing.append(place)
            place = place.rpartition('/')[0]
        for place in reversed(missing):
            above, _, name = place.rpartition('/')
            self.folders[place] = set()
            self.folders[above].add(name)

    def _find_root(self) -> str:
        """Find the folder of splits or of classes: as far down as there is one folder, of folders, and nothing else."""
        place = ''
        while True:
            inside = [n for n in self.folders[place] if join(place, n) in self.folders and not _is_hidden(n)]
            if len(inside) != 1 or inside[0] in (*TRAIN_SPLITS, *EVAL_SPLITS):
                return place
            below = join(place, inside[0])
            if not any(join(below, n) in self.folders for n in self.folders[below]):
                return place
            place = below

    def _resolve(self, place: str) -> str | None:
        """Follow the links on the way to `place`; None where they leave the archive or go round."""
        for _ in range(40):
            parts = place.split('/')
            steps = ('/'.join(parts[:i]) for i in range(1, len(parts) + 1))
            link = next((step for step in steps if step in self.links), None)
            if link is None:
                return place
            target = None if self.links[link].startswith('/') else _normal(self.links[link] + place[len(link) :])
            if target is None:
                return None
            place = target
        return None

    def entries(self, place: str) -> list[_Entry]:
        found = []
        for name in self.folders[place]:
            path = join(place, name)
            target = self._resolve(path)
            is_link = path in self.links and path not in self.folders
            if target in self.folders:
                found.append(_Entry(name, target, 'folder', is_link))
            elif target in self.members:
                found.append(_Entry(name, target, 'file', is_link, self.members[target].size, self.mtime))
            else:
                found.append(_Entry(name, target or '', '', is_link))
        return sorted(found)

    def read(self, images: list[_Image]) -> Iterator[tuple[int, bytes]]:
        """Yield the number and the bytes of each image, in the archive's order: a compressed one is read forwards."""
        with _damages(self.path), tarfile.open(self.path) as tar:
            previous, blob = None, b''
            for i, image in sorted(enumerate(images), key=lambda item: self.members[item[1].place].offset):
                member = self.members[image.place]
                if member is not previous:  # links to one member come in a row
                    previous, blob = member, tar.extractfile(member).read()
                yield i, blob


@contextmanager
def _damages(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except _DAMAGES as e:
        raise UserError(f'{path}: cannot be read as a tar ({e}); make or download it again') from e


def _normal(name: str) -> str | None:
    """Return a member's name without '.', '..' and a leading '/'; None if it leads out of the archive."""
    name = normpath(name.lstrip('/') or '.')
    return None if name.startswith('../') or name == '..' else '' if name == '.' else name


def _is_hidden(name: str) -> bool:
    return name.startswith('.') or name == '__MACOSX'


@dataclass
class Listing:
    """The images of a split, in the order in which they are numbered."""

    source: Folder | Archive
    base: str
    classes: list[str]
    images: list[_Image]
    notes: list[str] = field(default_factory=list)

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([self.classes, self.images]).encode()).hexdigest()


def list_split(root: str | Path, split: str, hold_out: bool = True) -> Listing:
    """List a split of a folder or a tar.

    Raises:
        MissingFileError: no `root`, or no such split in it.
        UserError: neither a folder nor a tar, a damaged one, a class without images, an image over `MAX_BYTES`.
    """
    root = Path(os.path.expanduser(root))  # as it is where there is no such user
    if not os.path.exists(root):  # also of a name that is too long, or in a folder that may not be read
        raise MissingFileError(f'{root}: no such folder or tar file')
    if root.is_dir():
        source = Folder(root)
    else:
        with _damages(root):
            if not tarfile.is_tarfile(root):
                raise UserError(f'{root}: neither a folder nor a tar file, or a damaged one')
        source = Archive(root)
    try:
        folders = [e for e in source.entries(source.root) if e.kind == 'folder' and not _is_hidden(e.name)]
    except OSError as e:
        raise UserError(f'{root}: cannot be read ({e.strerror})') from e
    splits = {*TRAIN_SPLITS, *EVAL_SPLITS}
    if split in splits and not splits & {e.name for e in folders} and _has_images(source, folders):
        base, where = source.root, str(root)
    else:
        name = _match_split(split, (e.name for e in folders), root)
        base, where = next(e.place for e in folders if e.name == name), f'{root}/{name}'
    walk = _Walk(source, base, splits)
    classes = walk.classes()
    if empty := sorted(set(classes) - {i.class_name for i in walk.images}) or (not classes and ['it']):
        more = f'; {walk.notes()[0]}' if walk.notes() else ''
        no_images = f'no images ({_SUFFIXES}) in {", ".join(empty)}'
        remedy = (
            'remove or fill the class folder' if classes else 'it is a split, of classes; if it is a class, rename it'
        )
        raise UserError(f'{where}: {no_images}{more}; {remedy}')
    for name in classes:
        if any('\ud800' <= c <= '\udfff' for c in name):  # as Python has such bytes
            raise UserError(f'{where}: the name of class {name!r} is no UTF-8; rename its folder')
    images = sorted(walk.images)
    for image in images:
        if image.size > MAX_BYTES:
            raise UserError(
                f'{where}: {image.name} has {image.size:,} bytes; {MAX_BYTES:,} are the most of an image;'
                f' make it smaller'
            )
    if hold_out and base == source.root:
        images = _hold_out(images, split in TRAIN_SPLITS, where)
    return Listing(source, base, classes, images, [f'{where}: {note}' for note in walk.notes()])


def _has_images(source: Folder | Archive, folders: list[_Entry]) -> bool:
    """Return True if one of `folders` has an image right in it, and so is a class rather than a split."""
    for folder in folders:
        with suppress(OSError):
            if any(e.kind == 'file' and _has_extension(e.name) for e in source.entries(folder.place)):
                return True
    return False


def _has_extension(name: str) -> bool:
    return not _is_hidden(name) and os.path.splitext(name)[1].lower() in _EXTENSIONS


def _match_split(split: str, present: Iterable[str], where: Path) -> str:
    present = sorted(present)
    synonyms = next((s for s in (TRAIN_SPLITS, EVAL_SPLITS) if split in s), ())
    for candidate in (split, *synonyms):
        if candidate in present:
            return candidate
    raise MissingFileError(
        f'{where}: no split {split!r}; it holds {", ".join(present[:10]) or "no folders"}.'
        f' A data set is a folder (or tar) of splits such as train/ and test/, each with one folder of images'
        f' ({_SUFFIXES}) for each class'
    )


class _Walk:
    """Gather the images below a split, and what was passed over.

    Each real folder is read once, so loops end. A link to a folder within the split is passed over, for its images are
    read where they are. So is a link into another split, which would mix them. Links to elsewhere are followed.
    """

    def __init__(self, source: Folder | Archive, base: str, splits: set[str]) -> None:
        self.source = source
        self.base = base
        self.splits = splits
        self.images: list[_Image] = []
        self.seen = {base}
        self.passed: list[str] = [*source.strays]
        self.outside: list[str] = []

    def classes(self) -> list[str]:
        found = []
        for entry in self._entries(self.base, ''):
            if entry.kind == 'folder' and self._is_followed(entry, entry.name):
                found.append(entry.name)
                self._walk(entry.place, entry.name)
            elif entry.kind != 'folder':
                self.passed.append(entry.name)
        return sorted(found, key=_natural)

    def _walk(self, place: str, class_name: str) -> None:
        todo = [(place, class_name)]
        while todo:
            place, shown = todo.pop()
            for entry in self._entries(place, shown):
                name = f'{shown}/{entry.name}'
                if entry.kind == 'folder':
                    if self._is_followed(entry, name):
                        todo.append((entry.place, name))
                elif entry.kind != 'file' or not _has_extension(entry.name):
                    self.passed.append(name)
                elif not entry.is_link or self._may_lead_to(entry, name):
                    self.images.append(_Image(name, class_name, entry.place, entry.size, entry.mtime))

    def _entries(self, place: str, shown: str) -> list[_Entry]:
        try:
            return [e for e in self.source.entries(place) if not _is_hidden(e.name)]
        except OSError as e:
            self.passed.append(f'{shown} ({e.strerror})')
            return []

    def _is_followed(self, entry: _Entry, name: str) -> bool:
        if entry.place in self.seen or (entry.is_link and _is_below(entry.place, self.base)):
            self.passed.append(f'{name} (a link to what is read anyway)')
            return False
        if entry.is_link and not self._may_lead_to(entry, name):
            return False
        self.seen.add(entry.place)
        return True

    def _may_lead_to(self, entry: _Entry, name: str) -> bool:
        """Return True if a link stays in the split, or leads to where no split is."""
        if _is_below(entry.place, self.base):
            return True
        root = self.source.root
        top = entry.place[len(root) :].strip('/').partition('/')[0] if _is_below(entry.place, root) else ''
        if top in self.splits or _is_below(self.base, entry.place):
            self.passed.append(f'{name} (a link out of the split, to {entry.place or "the root"})')
            return False
        self.outside.append(f'{name} -> {entry.place}')
        return True

    def notes(self) -> list[str]:
        notes = []
        photos, others = [], []
        for name in self.passed:
            (photos if _suffix(name) in _OTHER_PHOTOS else others).append(name)
        if photos:
            formats = ', '.join(sorted({*map(_suffix, photos)}))
            notes.append(f'passed over {len(photos)} images in {formats}, first {photos[0]}: make them PNG or JPEG')
        if others:
            notes.append(f'passed over {len(others)} that are no images or not of this split, first {others[0]}')
        if self.outside:
            notes.append(f'followed {len(self.outside)} links out of the split, first {self.outside[0]}')
        return notes


def _natural(name: str) -> tuple[list[str | int], str]:
    """Give timm's order of classes: 2 before 10, and b before C. timm's own `natural_key` fails on '²'."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r'(\d+)', name.lower()))], name


def _is_below(place: str, folder: str) -> bool:
    return not folder or place == folder or place.startswith(f'{folder.rstrip("/")}/')


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _hash(image: _Image) -> float:
    """Return a number in [0, 1) that its name alone decides."""
    digest = hashlib.sha256(image.name.encode('utf-8', 'surrogateescape')).digest()
    return int.from_bytes(digest[:6], 'big') / 2**48


def _hold_out(images: list[_Image], training: bool, where: str) -> list[_Image]:
    """Take about a fifth of each class for evaluation, and the others for training; at least one for each.

    An image's name says where it goes, by a hash. So an image stays on its side when others come, and a model is not
    evaluated later on what it was trained on, but in a class of so few that all or none of the names say the same.
    """
    classes: dict[str, list[_Image]] = {}
    for image in images:
        classes.setdefault(image.class_name, []).append(image)
    kept = []
    for class_name, mine in classes.items():
        if len(mine) < 2:
            raise UserError(
                f'{where}: {class_name} has one image; one to train on and one to evaluate are the least: add one, take'
                f' the class out, or give train/ and test/ folders'
            )
        mine = sorted(mine, key=_hash)
        count = min(max(1, sum(_hash(image) < 0.2 for image in mine)), len(mine) - 1)
        kept += mine[count:] if training else mine[:count]
    return sorted(kept)
