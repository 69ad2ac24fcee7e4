import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import timm
import yaml

from timm_poolattn.training import find_train_script, timm_script
from timm_poolattn.training.timm_script import load_train_script
from timm_poolattn.utils import cache_dir

SCRIPT = b'# a train.py\n'


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    (tmp_path / 'work').mkdir()
    monkeypatch.chdir(tmp_path / 'work')
    monkeypatch.delenv('TIMM_TRAIN_SCRIPT', raising=False)
    monkeypatch.setattr(timm_script, 'URL', 'http://127.0.0.1:9/{tag}/train.py')  # nothing listens there


@pytest.fixture
def server(monkeypatch):
    """Serves SCRIPT; counts the requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.paths.append(self.path)
            self.send_response(200)
            self.send_header('Content-Length', str(len(SCRIPT)))
            self.end_headers()
            self.wfile.write(SCRIPT)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        server.paths = []
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(timm_script, 'URL', f'http://127.0.0.1:{server.server_port}/{{tag}}/train.py')
        yield server
        server.shutdown()


@pytest.fixture
def pinned(monkeypatch):
    monkeypatch.setattr(timm_script, 'TAGS', {timm.__version__: 'v0'})
    monkeypatch.setattr(timm_script, 'PINNED', {'v0': hashlib.sha256(SCRIPT).hexdigest()})


def test_every_pinned_script_is_tested():
    workflow = yaml.safe_load((Path(__file__).parents[2] / '.github' / 'workflows' / 'tests.yml').read_text())
    assert workflow['jobs']['tests']['strategy']['matrix']['train-script'] == list(timm_script.PINNED)
    refs = [step['with']['ref'] for step in workflow['jobs']['oldest-python']['steps'] if 'ref' in step.get('with', {})]
    assert refs == [timm_script.NEWEST]


def test_order(tmp_path, monkeypatch):
    checkout = tmp_path / 'pytorch-image-models'
    checkout.mkdir()
    paths = [tmp_path / 'given.py', tmp_path / 'env.py', checkout / 'train.py']
    for path in paths:
        path.write_bytes(SCRIPT)
    assert find_train_script() == paths[2]
    monkeypatch.setenv('TIMM_TRAIN_SCRIPT', str(paths[1]))
    assert find_train_script() == paths[1]
    assert find_train_script(paths[0]) == paths[0]


def test_missing_files_are_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r'--timm-script: no file nowhere.py.*Three ways'):
        find_train_script('nowhere.py')
    monkeypatch.setenv('TIMM_TRAIN_SCRIPT', 'nowhere.py')
    with pytest.raises(FileNotFoundError, match=r'TIMM_TRAIN_SCRIPT: no file nowhere\.py'):
        find_train_script()


def test_not_found_says_the_three_ways(pinned):
    with pytest.raises(FileNotFoundError, match=r'Three ways.*--timm-script.*checkout.*network'):
        find_train_script()
    assert not list(cache_dir().iterdir())


def test_download_is_checked_and_cached(server, pinned):
    path = find_train_script()
    assert path.read_bytes() == SCRIPT and path.parent == cache_dir() and server.paths == ['/v0/train.py']
    assert find_train_script() == path and len(server.paths) == 1
    path.write_bytes(b'# changed since')  # a cache is checked at every use
    assert find_train_script().read_bytes() == SCRIPT and len(server.paths) == 2


def test_another_file_than_pinned_is_refused(server, pinned, monkeypatch):
    monkeypatch.setattr(timm_script, 'PINNED', {'v0': '0' * 64})
    with pytest.raises(ValueError, match=f'SHA-256 is {hashlib.sha256(SCRIPT).hexdigest()}, pinned is 000'):
        find_train_script()
    assert not list(cache_dir().iterdir())


def test_unpinned_is_refused_unless_allowed(server, monkeypatch, caplog):
    monkeypatch.setattr(timm_script, 'TAGS', {timm.__version__: 'v9'})
    with pytest.raises(
        ValueError, match=f'v9 has no pinned SHA-256; this file has {hashlib.sha256(SCRIPT).hexdigest()}'
    ):
        find_train_script()
    assert not list(cache_dir().iterdir())
    assert find_train_script(allow_unpinned=True).read_bytes() == SCRIPT
    assert hashlib.sha256(SCRIPT).hexdigest() in caplog.text


def test_the_installed_timm_has_a_pinned_script():
    tag = timm_script.TAGS.get(timm.__version__, f'v{timm.__version__}')
    if tag not in timm_script.PINNED:
        pytest.skip(f'timm {timm.__version__} is newer than the pinned scripts')
    assert len(timm_script.PINNED[tag]) == 64


def test_the_pinned_script_runs_with_the_installed_timm(train_script):
    """It imports, and has what we put our own in the place of."""
    module = load_train_script(train_script)
    for name in ('create_model', 'create_dataset', 'create_loader', 'create_optimizer_v2', 'train_one_epoch', 'main'):
        assert callable(getattr(module, name))


def test_pinned_hash_is_the_scripts(train_script):
    digest = hashlib.sha256(train_script.read_bytes()).hexdigest()
    assert digest in timm_script.PINNED.values(), f'a train.py of another tag, SHA-256 {digest}'
