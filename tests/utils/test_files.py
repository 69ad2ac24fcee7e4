import os
import resource
import signal
import sys

import pytest
import torch
from safetensors.torch import save_file

from timm_poolattn.utils import UserError, files, remove_leftovers, replacing, write_text


def content(path):
    return (path / 'a').read_text() if path.is_dir() else path.read_text()


def write(path, kind):
    with replacing(path) as temp:
        if kind == 'folder':
            temp.mkdir()
            temp = temp / 'a'
        temp.write_text('new')


def killed_at(number, path, kind):
    """Write in another process that dies at its n-th change of the file system; returns True if it came to that."""
    calls = 0

    def hook(event, args):
        nonlocal calls
        if event in ('open', 'os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'shutil.rmtree'):
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        sys.addaudithook(hook)
        write(path, kind)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize('kind', ['file', 'folder'])
@pytest.mark.parametrize('number', range(1, 13))
def test_killed_at_any_point(tmp_path, kind, number):
    """What was there is there, the old or the new; the next writer leaves nothing else beside it."""
    path = tmp_path / 'data'
    write(path, kind)
    (path / 'a' if kind == 'folder' else path).write_text('old')
    (tmp_path / 'data.tmp').write_text("a neighbour's")
    killed = killed_at(number, path, kind)
    remove_leftovers(path)  # as the next writer does
    assert content(path) in (('old', 'new') if killed else ('new',))
    write(path, kind)
    assert content(path) == 'new' and sorted(os.listdir(tmp_path)) == ['data', 'data.tmp']


def test_an_error_leaves_what_was_there(tmp_path):
    write_text(tmp_path / 'a', 'old')
    with pytest.raises(KeyError), replacing(tmp_path / 'a') as temp:
        temp.write_text('half')
        raise KeyError
    assert (tmp_path / 'a').read_text() == 'old' and os.listdir(tmp_path) == ['a']


def test_a_folder_that_is_taken_for_a_leftover(tmp_path, monkeypatch):
    """Another writer of the same path comes between the making of the hidden folder and its lock."""
    path, lock = tmp_path / 'a', files._lock

    def slow_lock(folder):
        monkeypatch.setattr(files, '_lock', lock)
        remove_leftovers(path)
        return lock(folder)

    monkeypatch.setattr(files, '_lock', slow_lock)
    write_text(path, 'new')
    assert path.read_text() == 'new' and os.listdir(tmp_path) == ['a']


@pytest.mark.parametrize('mask', [0o077, 0o022])
def test_who_may_read_weights_follows_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        with replacing(tmp_path / 'x.safetensors') as temp:
            save_file(dict(x=torch.zeros(1)), temp)
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert (tmp_path / 'x.safetensors').stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_link_stays_one(tmp_path):
    write_text(tmp_path / 'a', 'old')
    (tmp_path / 'link').symlink_to('a')
    write_text(tmp_path / 'link', 'new')
    assert (tmp_path / 'link').is_symlink() and (tmp_path / 'a').read_text() == 'new'


@pytest.mark.parametrize('place', ['file/a', 'file/b/a', 'a' * 300])
def test_places_that_cannot_be_written_to(tmp_path, place):
    write_text(tmp_path / 'file', '')
    with pytest.raises(UserError, match='cannot be written'):
        write_text(tmp_path / place, 'new')
    assert os.listdir(tmp_path) == ['file']


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='no file system that takes no files')
@pytest.mark.parametrize('place', ['/proc/a', '/proc/b/a'])
def test_a_file_system_that_takes_no_files(place):
    with pytest.raises(UserError, match='a: cannot be written: No such file'):
        write_text(place, 'new')


def _write(path, how):
    import torch
    from safetensors.torch import save_file

    with replacing(path) as temp:
        if how == 'safetensors':
            save_file(dict(a=torch.zeros(100_000)), temp)
        else:
            temp.write_bytes(bytes(400_000))


@pytest.mark.parametrize('how', ['bytes', 'safetensors'])
def test_a_disk_that_takes_no_more(tmp_path, how):
    """A limit on the size of files stands for a full disk."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match='a: cannot be written: File too large'):
            _write(tmp_path / 'a', how)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not os.listdir(tmp_path)


def test_a_file_replaces_no_folder(tmp_path):
    (tmp_path / 'a' / 'b').mkdir(parents=True)
    with pytest.raises(UserError, match='is a folder'):
        write_text(tmp_path / 'a', 'text')
    assert (tmp_path / 'a' / 'b').is_dir() and [p.name for p in tmp_path.iterdir()] == ['a']


def test_a_pipe_stays_one(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(UserError, match='pipe: is a device or a pipe; name a file'):
        write_text(tmp_path / 'pipe', 'text')
    assert (tmp_path / 'pipe').is_fifo() and len(list(tmp_path.iterdir())) == 1
