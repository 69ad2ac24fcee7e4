import json
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import close_session, constants
from safetensors.torch import load_file, save_file

from timm_poolattn.hub.releases import seal
from timm_poolattn.utils import released

from .server import HubServer

TOKEN = 'hf_SecretSecretSecretSecret'
NAME = 'resnet20_saam.cifar10'
#: Twenty points to kill a process at; five of them by default.
KILL_POINTS = [pytest.param(n, marks=() if n in (0, 5, 10, 14, 19) else pytest.mark.slow) for n in range(20)]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub, and the real client in this process pointed to it, with a token that may write to `org`.

    `hub.waits` are the seconds that the client would have waited before it tried again.
    """
    with HubServer() as server:
        server.tokens[TOKEN] = {'org'}
        server.waits = []
        monkeypatch.setenv('HF_TOKEN', TOKEN)
        monkeypatch.setattr(constants, 'ENDPOINT', server.url)
        template = server.url + '/{repo_id}/resolve/{revision}/{filename}'
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
        monkeypatch.setattr(huggingface_hub.hf_api.api, 'endpoint', server.url)
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)  # with hf_xet, the client takes no other way
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hf'))
        monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'no-token'))
        monkeypatch.setattr(constants, 'HF_HUB_DOWNLOAD_TIMEOUT', 0.5)
        monkeypatch.setattr(time, 'sleep', server.waits.append)
        close_session()  # made for offline use
        yield server
        close_session()
        assert not server.mistakes


@pytest.fixture
def folder() -> Path:
    """A release of the repository."""
    return released()[NAME]


@pytest.fixture
def other(folder, tmp_path) -> Path:
    """A sound release of the same name, with other weights."""
    copy = tmp_path / 'other' / NAME
    shutil.copytree(folder, copy)
    weights = load_file(copy / 'model.safetensors')
    weights['head.fc.bias'] += 1
    save_file(weights, copy / 'model.safetensors')
    hashes = seal(copy / 'model.safetensors', dict(architecture='resnet20_saam', tag='cifar10'))
    results = json.loads((copy / 'results.json').read_text())
    (copy / 'results.json').write_text(json.dumps({**results, 'weights': hashes}, indent=2))
    return copy
