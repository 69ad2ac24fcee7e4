"""Using what the Hub has, as users do: through timm, by name, in real processes where the environment decides."""

import json
import os
import pickle
import re
import subprocess
import sys
from functools import partial
from urllib.error import URLError

import pytest
import timm
import torch
from click.testing import CliRunner
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file, save
from timm.models import save_for_hf

from timm_poolattn.cli import main
from timm_poolattn.hub.releases import seal
from timm_poolattn.inference import load_pretrained
from timm_poolattn.models import HubError, hub_errors
from timm_poolattn.utils import UserError

from .conftest import NAME, TOKEN
from .test_verification import Evil

BY_NAME = dict(pretrained_cfg_overlay=dict(hf_hub_id=f'org/{NAME}'))  # goes before the weights in the package


@pytest.fixture
def zoo(hub, folder):
    """A Hub that has the release."""
    return hub.add(f'org/{NAME}', {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()})


def is_it(model, folder):
    weights = load_file(folder / 'model.safetensors')
    assert all(w.equal(weights[k]) for k, w in model.state_dict().items())


def test_three_ways(hub, zoo, folder):
    for name, kwargs in ((NAME, BY_NAME), (f'hf-hub:org/{NAME}', {}), (f'local-dir:{folder}', {})):
        model = timm.create_model(name, pretrained=True, **kwargs)
        is_it(model, folder)
        assert hub.requests and model.pretrained_cfg['label_names'][3] == 'cat'
    is_it(timm.create_model(f'hf-hub:org/{NAME}@main', pretrained=True), folder)


def test_a_folder_comes_before_the_hub(hub, folder):
    assert timm.models.get_pretrained_cfg(NAME).hf_hub_id == f'timm-poolattn/{NAME}'
    is_it(timm.create_model('resnet20_saam', pretrained=True), folder)
    assert not hub.requests


def test_what_is_named_comes_before_the_folder(hub):
    named = partial(timm.create_model, 'resnet20_saam', pretrained=True)
    with pytest.raises(URLError):
        named(pretrained_cfg_overlay=dict(url='http://127.0.0.1:1/x'))
    assert not hub.requests
    with pytest.raises(HubError, match='org/nothing'):
        named(pretrained_cfg_overlay=dict(hf_hub_id='org/nothing'))


@pytest.mark.parametrize('name', ['resnet50_saam', 'resnet50_fa'])
def test_a_gated_resnet_takes_what_the_hub_has_for_the_plain_one(hub, tmp_path, name):
    with pytest.raises(UserError, match='with identity_init=True it takes those of resnet50: ') as e:
        timm.create_model(name, pretrained=True)
    overlay = re.search(r"pretrained_cfg_overlay=dict\(hf_hub_id='(.*)'\)$", str(e.value))[1]
    plain = timm.create_model('resnet50', layers=(2, 1, 1, 1)).eval()
    hub.add(overlay, {'model.safetensors': save(plain.state_dict())})
    kwargs = dict(layers=(2, 1, 1, 1), pretrained_cfg_overlay=dict(hf_hub_id=overlay))
    model = timm.create_model(name, pretrained=True, identity_init=True, **kwargs).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)


def test_cache_dir_and_offline_afterwards(hub, zoo, folder, tmp_path, monkeypatch):
    cache = tmp_path / 'mine'
    is_it(timm.create_model(NAME, pretrained=True, cache_dir=cache, **BY_NAME), folder)
    timm.create_model(f'hf-hub:org/{NAME}', pretrained=True, cache_dir=cache)
    assert (cache / f'models--org--{NAME}').is_dir() and not (tmp_path / 'hf').exists()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    requests = len(hub.requests)
    is_it(timm.create_model(NAME, pretrained=True, cache_dir=cache, **BY_NAME), folder)
    is_it(timm.create_model(f'hf-hub:org/{NAME}', pretrained=True, cache_dir=cache), folder)
    assert len(hub.requests) == requests


def test_an_error_names_the_repository_that_was_asked():
    """Not what the user called it: load_pretrained knows a name, and what it calls the repository."""
    offline = pytest.raises(HubError, match='HF_HUB_OFFLINE is set and org/inner at')
    with offline, hub_errors('outer'), hub_errors('org/inner'):
        raise OfflineModeIsEnabled


class TestErrors:
    """Each says what it is and what to do, the same for a name and for hf-hub:."""

    @pytest.fixture(params=['name', 'hf-hub'])
    def error(self, request, hub, capfd, caplog):
        def error():
            with pytest.raises(HubError) as e:
                if request.param == 'name':
                    timm.create_model(NAME, pretrained=True, **BY_NAME)
                else:
                    load_pretrained(f'hf-hub:org/{NAME}')
            captured = capfd.readouterr()
            assert TOKEN not in str(e.value) + captured.out + captured.err + caplog.text
            return str(e.value)

        return error

    def test_not_published(self, error):
        assert f'org/{NAME}' in error() and 'is not published, or is private and not yours to read' in error()

    def test_no_token(self, error, monkeypatch):
        monkeypatch.delenv('HF_TOKEN')
        assert 'is private, which shows only with a token (`hf auth login`, or set HF_TOKEN)' in error()

    def test_wrong_token(self, error, zoo, monkeypatch):
        monkeypatch.setenv('HF_TOKEN', 'hf_NotAToken')
        assert 'the token is not valid: make a new one' in error()

    def test_gated(self, error, hub, zoo, monkeypatch):
        zoo.gated = True
        hub.tokens[TOKEN] = set()
        assert f'is gated: agree to its terms on {hub.url}/org/{NAME}' in error()
        monkeypatch.delenv('HF_TOKEN')
        assert 'is gated' in error()

    def test_no_network(self, error, hub, monkeypatch):
        hub.http.server_close()
        hub.http.shutdown()
        assert f'no connection to {hub.url}: check the network, or name a mirror in HF_ENDPOINT' in error()

    def test_offline(self, error, monkeypatch):
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
        assert f'HF_HUB_OFFLINE is set and org/{NAME} at' in error() and 'not in the cache' in error()

    def test_down(self, error, hub):
        hub.fault('HEAD', 'resolve', 503, times=99)
        assert 'the Hub has a fault: run again later [503]' in error()

    def test_not_a_hub(self, error, hub):
        hub.fault('HEAD', 'resolve', 200, times=99)
        assert f'{hub.url} does not answer as a Hub does: check HF_ENDPOINT' in error()

    def test_slow(self, error, hub, zoo):
        hub.fault('GET', 'storage', 'slow', times=99)
        assert 'no answer in time' in error()

    def test_cut_short(self, error, hub, zoo, folder):
        """Not half a file is used, and the next attempt goes on."""
        hub.fault('GET', 'storage', 'cut', times=99)
        hub.fault('GET', 'storage', 500)
        message = error()
        assert 'the connection broke off: run again' in message or 'cut short' in message
        hub.faults.clear()
        is_it(load_pretrained(f'hf-hub:org/{NAME}'), folder)

    def test_damaged(self, error, hub, zoo, folder):
        hub.fault('GET', 'storage', 'flip')
        assert 'came damaged, and is not used or kept: run again' in error()
        is_it(load_pretrained(f'hf-hub:org/{NAME}'), folder)

    def test_only_a_pickle(self, error, hub, zoo, tmp_path):
        files = {path: file.data for path, file in zoo.head.items() if path != 'model.safetensors'}
        hub.add(f'org/{NAME}', {**files, 'pytorch_model.bin': pickle.dumps(Evil(tmp_path / 'evil'))})
        assert 'lacks the file model.safetensors; no other format is loaded' in error()
        assert not (tmp_path / 'evil').exists()
        assert not any('pytorch_model.bin' in path for _, path in hub.requests)


@pytest.mark.parametrize('file', ['evil.bin', '../../evil.safetensors', '/etc/evil.safetensors'])
def test_a_config_that_names_another_file(hub, zoo, tmp_path, file):
    files = {path: content.data for path, content in zoo.head.items()}
    config = json.loads(files['config.json'])
    config['pretrained_cfg']['hf_hub_filename'] = file
    files.update({'config.json': json.dumps(config).encode(), file: pickle.dumps(Evil(tmp_path / 'evil'))})
    hub.add(f'org/{NAME}', files)
    with pytest.raises(HubError, match=r'is not loaded: weights are a \.safetensors file beside config\.json'):
        timm.create_model(f'hf-hub:org/{NAME}', pretrained=True)
    assert not (tmp_path / 'evil').exists() and not any('evil' in path for _, path in hub.requests)


def test_what_is_no_model(hub, other):
    """One line, for a folder as for a repository."""
    config = json.loads((other / 'config.json').read_text())
    (other / 'config.json').write_text(json.dumps({**config, 'architecture': 'resnet9000'}))
    hub.add('org/x', {p.name: p.read_bytes() for p in other.iterdir() if p.is_file()})
    for name in (f'local-dir:{other}', 'hf-hub:org/x'):
        result = CliRunner().invoke(main, ['validate', '--model', name, '--data-dir', '.'])
        assert result.exit_code == 2 and 'cannot be loaded: Unknown model (resnet9000)' in result.output
    (other / 'config.json').write_text(json.dumps(config))
    (other / 'model.safetensors').write_bytes(b'nothing')
    with pytest.raises(ValueError, match=r'cannot be loaded: .*`poolattn hub verify local-dir:'):
        load_pretrained(f'local-dir:{other}')


@pytest.mark.parametrize(
    'change, says',
    [
        (dict(label_names='abc'), 'label_names must be 10 texts'),
        (dict(label_names=['cat'] * 9), 'label_names must be 10 texts'),
        (dict(label_names=list(range(10))), 'label_names must be 10 texts'),
        (dict(input_size=[3, 0, 32]), r'input_size is .*0.*, and must be channels, height and width'),
        (dict(input_size=['3', '32', '32']), 'input_size is .*, and must be channels, height and width'),
        (dict(input_size=[3, 32.5, 32]), 'input_size is .*, and must be channels, height and width'),
        (dict(input_size=[3, 40000, 40000]), 'images would be resized to 40000x40000; 67,108,864 pixels are the most'),
        (dict(crop_pct=1e-9), 'images would be resized to 3'),
        (dict(crop_pct=-1), 'crop_pct is -1, and must be over 0 and at most 1'),
        (dict(interpolation='evil'), "unknown interpolation 'evil'"),
        (dict(mean='abc'), "mean is 'abc', and must be 3 numbers"),
        (dict(mean=[0.5, 0.5]), 'mean is .0.5, 0.5., and must be 3 numbers'),
        (dict(mean=True), 'mean is True, and must be 3 numbers'),
        (dict(std=[0, 0, 0]), 'std is .0, 0, 0., and must be over 0'),
    ],
    ids=str,
)
def test_a_config_of_what_cannot_be(other, change, says):
    config = json.loads((other / 'config.json').read_text())
    config |= {k: v for k, v in change.items() if k in config}
    config['pretrained_cfg'] |= change
    (other / 'config.json').write_text(json.dumps(config))
    result = CliRunner().invoke(main, ['predict', 'photo.png', '--model', f'local-dir:{other}'])
    assert result.exit_code == 2 and re.match(rf'Error: local-dir:{other}: its config.json: {says}', result.output)


@pytest.mark.parametrize('text', ['[' * 100_000, '', '{', '{"architecture": "resnet20_sa'])
def test_an_empty_or_cut_config(hub, other, text):
    (other / 'config.json').write_text(text)
    hub.add('org/x', {p.name: p.read_bytes() for p in other.iterdir() if p.is_file()})
    for name in (f'local-dir:{other}', 'hf-hub:org/x'):
        result = CliRunner().invoke(main, ['validate', '--model', name, '--data-dir', '.'])
        assert result.exit_code == 2 and 'config.json' in result.output and 'is no JSON' in result.output
        assert (str(other) if name.startswith('local') else 'org/x') in result.output


def test_command_line(hub):
    result = CliRunner().invoke(main, ['validate', '--model', f'hf-hub:org/{NAME}', '--data-dir', '.'])
    assert result.exit_code == 2 and result.output.startswith('Error: org/') and 'is not published' in result.output


def test_an_organisations_own_zoo(hub, tmp_path):
    """One variable; a mirror endpoint; and no network after the first download, each in a process of its own."""
    model = timm.create_model('resnet32_srm', num_classes=10)
    save_for_hf(model, tmp_path / 'srm', model_config=dict(label_names=[*'abcdefghij']), safe_serialization=True)
    seal(tmp_path / 'srm' / 'model.safetensors', dict(architecture='resnet32_srm', tag='cifar10'))
    hub.add('acme/resnet32_srm.cifar10', {p.name: p.read_bytes() for p in (tmp_path / 'srm').iterdir()})
    code = (
        'import timm, timm_poolattn\n'
        "print(timm.is_model_pretrained('resnet32_srm'), timm.models.get_pretrained_cfg('resnet20_saam').hf_hub_id)\n"
        "print(timm.create_model('resnet32_srm', pretrained=True).conv1.weight.sum().item())"
    )
    env = {**os.environ, 'HF_HOME': str(tmp_path / 'home'), 'HF_ENDPOINT': hub.url, 'TIMM_POOLATTN_HUB_ORG': 'acme'}
    outputs = []
    for offline in ('0', '1'):
        done = subprocess.run(
            [sys.executable, '-c', code], env={**env, 'HF_HUB_OFFLINE': offline}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] == f'True acme/{NAME}\n{model.conv1.weight.sum().item()}\n'
