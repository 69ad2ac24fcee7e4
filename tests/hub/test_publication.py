"""Publishing with the real client over HTTP. What the Hub has afterwards is what these tests look at."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner
from huggingface_hub import constants

from timm_poolattn.cli import main
from timm_poolattn.hub import publish
from timm_poolattn.models import HubError

from .conftest import KILL_POINTS, NAME, TOKEN

REPO = f'org/{NAME}'
#: What publishing asks of the Hub, in order; downloads and look-ups between them left out.
CHANGES = (
    ('POST', 'repos/create'),
    ('POST', 'validate-yaml'),
    ('POST', 'preupload'),
    ('POST', 'objects/batch'),
    ('PUT', 'storage'),
    ('POST', 'lfs/verify'),
    ('POST', 'commit'),
    ('POST', 'tag'),
)


@pytest.fixture(autouse=True)
def no_token_in_output(capfd, caplog):
    caplog.set_level('DEBUG')
    yield
    captured = capfd.readouterr()
    assert TOKEN not in captured.out + captured.err + caplog.text


def files(folder):
    """A release's files as they are published."""
    content = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}
    card = content['README.md'].replace(b'timm-poolattn/', b'org/')
    return content | {'README.md': re.sub(rb'.*  # the same\n', b'', card)}


def at(hub, revision='main'):
    """The release's files on the Hub."""
    repo = hub.repos[REPO]
    content = repo.commits[repo.resolve(revision)]
    return {path: file.data for path, file in content.items() if path != '.gitattributes'}


def tags(hub):
    return {ref.removeprefix('refs/tags/') for ref in hub.repos[REPO].refs if ref.startswith('refs/tags/')}


def one(target=NAME, **options):
    (row,) = publish([target], 'org', **options)
    assert row.repo_id == REPO and TOKEN not in row.detail
    return row


def is_whole(hub, folder):
    """Published, tagged, and nothing besides: one commit on top of the Hub's own, one tag."""
    assert at(hub) == files(folder)
    (tag,) = tags(hub)
    assert at(hub, tag) == files(folder)
    assert len(hub.repos[REPO].commits) == 2


class TestPublish:
    def test_new_then_unchanged(self, hub, folder):
        row = one()
        assert row.status == 'published' and row.detail == f'{hub.url}/{REPO}, tag {tags(hub).copy().pop()}'
        is_whole(hub, folder)
        assert not hub.repos[REPO].private
        changes = [method for method, _ in hub.requests if method in ('POST', 'PUT')]
        assert one().status == 'unchanged'
        assert [method for method, _ in hub.requests if method in ('POST', 'PUT')] == changes

    def test_other_card_updates(self, hub, folder, tmp_path):
        one()
        copy = tmp_path / 'copy' / NAME
        shutil.copytree(folder, copy)
        (copy / 'README.md').write_text((folder / 'README.md').read_text() + 'more')
        uploads = [path for method, path in hub.requests if method == 'PUT']
        assert one(copy).status == 'updated'
        assert at(hub) == files(copy) and [p for m, p in hub.requests if m == 'PUT'] == uploads

    def test_other_weights_need_replace(self, hub, folder, other):
        one()
        row = one(other)
        assert row.status == 'failed' and 'other weights or files (model.safetensors): --replace' in row.detail
        is_whole(hub, folder)
        assert one(other, dry_run=True).status == 'failed'
        assert one(other, dry_run=True, replace=True).status == 'would be replaced'
        is_whole(hub, folder)
        old = hub.repos[REPO].resolve('main')
        row = one(other, replace=True)
        assert row.status == 'replaced' and row.detail.endswith(f', the old ones under replaced-{old[:12]}')
        assert at(hub) == files(other) and at(hub, f'replaced-{old[:12]}') == files(folder)
        assert len(tags(hub)) == 3

    def test_foreign_files_are_kept_or_tagged(self, hub, folder):
        hub.add(REPO, {'.gitattributes': b'', 'pytorch_model.bin': b'theirs'})
        row = one()
        assert row.status == 'failed' and 'pytorch_model.bin' in row.detail
        assert at(hub) == {'pytorch_model.bin': b'theirs'}
        assert one(replace=True, dry_run=True).detail.endswith(', pytorch_model.bin (deleted)')
        assert one(replace=True).status == 'replaced'
        assert at(hub) == files(folder)
        (tag,) = (tag for tag in tags(hub) if tag.startswith('replaced-'))
        assert at(hub, tag) == {'pytorch_model.bin': b'theirs'}

    def test_dry_run_changes_nothing_and_needs_no_token(self, hub, monkeypatch):
        monkeypatch.delenv('HF_TOKEN')
        assert one(dry_run=True).status == 'would be published'
        assert not hub.repos and {method for method, _ in hub.requests} == {'GET'}

    def test_private(self, hub, folder):
        assert one(private=True).status == 'published' and hub.repos[REPO].private
        hub.repos[REPO].private = False
        row = one(private=True)
        assert row.status == 'failed' and 'is public: make it private' in row.detail

    def test_pull_request(self, hub, folder, other):
        one()
        hub.fault('GET', 'refs$', 'cut')  # the proposal was made, and its check cut short
        row = one(other, create_pr=True)
        assert row.status == 'failed' and 'the connection broke off: run again' in row.detail
        row = one(other, create_pr=True)
        assert (row.status, row.detail) == ('proposed', f'{hub.url}/{REPO}/discussions/1')
        assert list(hub.repos[REPO].titles) == [1]  # not another one
        assert at(hub) == files(folder) and at(hub, 'refs/pr/1') == files(other)
        assert tags(hub) == {tag for tag in tags(hub) if at(hub, tag) == files(folder)}

    def test_collection(self, hub):
        hub.collections['org/zoo-1'] = []
        one(collection='org/zoo-1')
        assert one(collection='org/zoo-1').status == 'unchanged'
        assert hub.collections['org/zoo-1'] == [REPO]

    def test_several_at_once(self, hub):
        names = ['resnet20_fa', 'resnet20_saam', 'resnet20_spem']
        hub.fault('POST', 'resnet20_fa.cifar10/commit', 403)
        rows = publish(names, 'org', workers=3)
        assert [(row.repo_id, row.status) for row in rows] == [
            ('org/resnet20_fa.cifar10', 'failed'),
            ('org/resnet20_saam.cifar10', 'published'),
            ('org/resnet20_spem.cifar10', 'published'),
        ]

    def test_an_unsound_config_leaves_the_others_be(self, hub, other):
        config = json.loads((other / 'config.json').read_text())
        (other / 'config.json').write_text(json.dumps({**config, 'model_args': []}))
        bad, good = publish([other, 'resnet20_fa.cifar10'], 'org')
        assert (bad.status, good.status) == ('failed', 'published') and 'model_args' in bad.detail

    @pytest.mark.parametrize('body', ['[]', 'null', '{}', '"x"', '[1]', 'no json'])
    @pytest.mark.parametrize(
        'method, path',
        [('GET', f'models/{REPO}$'), ('GET', 'tree'), ('POST', 'preupload'), ('POST', 'commit'), ('GET', 'refs')],
    )
    def test_a_server_that_answers_nonsense(self, hub, folder, method, path, body):
        hub.add(REPO, {'.gitattributes': b''})
        hub.fault(method, path, 200, times=9, body=body)
        assert one().status in ('failed', 'published')
        hub.faults.clear()
        assert one().status in ('published', 'unchanged')
        is_whole(hub, folder)

    def test_an_unsound_release_is_not_sent(self, hub, other):
        with open(other / 'model.safetensors', 'r+b') as f:
            f.seek(-1, 2)
            f.write(b'\x7f')
        row = one(other)
        assert row.status == 'failed' and 'is not sound, values: ' in row.detail
        assert not hub.repos and not hub.requests

    def test_name_of_the_folder(self, hub, other):
        renamed = other.rename(other.parent / 'resnet20_fa.cifar10')
        (row,) = publish([renamed], 'org')
        assert row.status == 'failed' and 'the folder holds resnet20_saam.cifar10' in row.detail

    def test_mistakes(self, hub, monkeypatch):
        with pytest.raises(ValueError, match="unknown release 'resnet9000'"):
            publish(['resnet9000'], 'org')
        with monkeypatch.context() as m, pytest.raises(HubError, match='needs a token'):
            m.delenv('HF_TOKEN')
            publish([NAME], 'org')
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
        row = one()
        assert row.status == 'failed' and 'HF_HUB_OFFLINE is set' in row.detail


class TestRefusals:
    """What the server itself refuses, as the Hub does."""

    def test_wrong_token(self, hub, monkeypatch):
        monkeypatch.setenv('HF_TOKEN', 'hf_NotAToken')
        row = one()
        assert row.status == 'failed' and 'the token is not valid' in row.detail and 'hf_NotAToken' not in row.detail
        assert not hub.repos

    def test_no_xet(self, hub, monkeypatch):
        """With hf_xet installed, the client takes no other way unless told so."""
        pytest.importorskip('hf_xet')
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', False)
        row = one()
        assert row.status == 'failed' and 'set HF_HUB_DISABLE_XET=1 for a server that has none' in row.detail
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
        assert one().status == 'published'

    def test_foreign_organisation(self, hub):
        (row,) = publish([NAME], 'theirs')
        assert row.status == 'failed' and 'take one with write access to the organisation [403]' in row.detail
        assert not hub.repos

    def test_stale_parent(self, hub, folder):
        def meanwhile(method, path):
            if 'preupload' in path:
                hub.repos[REPO].commit('refs/heads/main', {'README.md': hub.repos[REPO].head['.gitattributes']})

        hub.before = meanwhile
        row = one()
        assert row.status == 'failed' and 'somebody else changed it meanwhile: run again [412]' in row.detail
        assert list(at(hub)) == ['README.md'] and not tags(hub)  # theirs

    def test_flipped_on_the_way_up(self, hub, folder):
        hub.fault('PUT', 'storage', 'flip')
        row = one()
        assert row.status == 'failed' and 'does not have the announced size and SHA-256' in row.detail
        assert not at(hub) and not tags(hub)
        assert one().status == 'published'
        is_whole(hub, folder)

    def test_a_server_that_sends_the_token_back(self, hub):
        for body in ('{"error": "bad ' + TOKEN + '"}', TOKEN):
            hub.fault('POST', 'commit', 400, body=body)
            row = one()
            assert row.status == 'failed' and '***' in row.detail


class TestFaults:
    """A fault leaves the release unpublished or whole, says what to do, and running again completes it."""

    @pytest.mark.parametrize(
        'kind, message',
        [
            (401, 'the token is not valid'),
            (403, 'write access'),
            (409, 'another change is under way'),
            (429, 'too many requests: run again in 7 s'),
            (500, 'the Hub has a fault: run again later'),
        ],
    )
    def test_status_of_the_commit(self, hub, folder, kind, message):
        hub.fault('POST', 'commit', kind, headers={'Retry-After': '7'})
        row = one()
        assert row.status == 'failed' and message in row.detail and f'[{kind}]' in row.detail
        assert not at(hub) and not tags(hub)
        assert one().status == 'published'
        is_whole(hub, folder)

    def test_404_of_the_repository(self, hub, folder):
        """Deleted while we publish."""
        hub.fault('POST', 'commit', 404, headers={'X-Error-Code': 'RepoNotFound'})
        row = one()
        assert row.status == 'failed' and 'is not published, or is private' in row.detail
        assert one().status == 'published'
        is_whole(hub, folder)

    def test_client_waits_as_told(self, hub, folder):
        hub.fault('PUT', 'storage', 429, headers={'Retry-After': '7'})
        hub.fault('POST', 'preupload', 500)
        assert one().status == 'published' and hub.waits == [1, 8]  # 7 s, and one for rounding
        is_whole(hub, folder)

    def test_no_answer_to_the_commit(self, hub, folder, monkeypatch):
        monkeypatch.setattr(sys.modules[publish.__module__], 'TIMEOUT', 0.5)
        hub.fault('POST', 'commit', 'slow')
        row = one()
        assert row.status == 'failed' and 'no answer in time: run again' in row.detail and not tags(hub)
        assert one().status in ('published', 'unchanged')  # the server may have gone on with the first
        is_whole(hub, folder)

    @pytest.mark.parametrize('kind', ['slow', 'cut'])
    def test_download_afterwards(self, hub, folder, kind):
        """The client gives up after a second without an answer, and goes on where the connection ended."""
        hub.fault('GET', 'storage', kind)
        assert one().status == 'published'
        is_whole(hub, folder)

    def test_flipped_on_the_way_down(self, hub, folder):
        hub.fault('GET', 'storage', 'flip')
        row = one()
        assert row.status == 'failed' and 'model.safetensors came back other than it was sent' in row.detail
        assert not tags(hub)  # which would call it checked
        assert one().status == 'unchanged'
        is_whole(hub, folder)

    @pytest.mark.parametrize('kind', ['cut', 'lost'])
    @pytest.mark.parametrize('method, path', CHANGES)
    def test_interrupted_at_every_change(self, hub, folder, method, path, kind):
        """The connection ends before the Hub does what it is asked, or before it says that it did."""
        hub.fault(method, path, kind, times=6)  # the client itself tries up to six times
        row = one()
        hub.faults.clear()
        assert row.status == 'published' or 'the connection broke off: run again' in row.detail
        if REPO in hub.repos:
            assert at(hub) in ({}, files(folder))
        assert one().status in ('published', 'unchanged')
        is_whole(hub, folder)

    @pytest.mark.slow
    @pytest.mark.parametrize('kind', ['cut', 'lost', 500])
    def test_interrupted_at_every_request(self, hub, folder, kind):
        one()
        requests = len(hub.requests)
        for n in range(requests):
            hub.repos.clear()
            hub.requests.clear()
            hub.faults.clear()
            hub.before = lambda method, path, n=n: (
                hub.fault(method, f'^{path}$', kind, times=6) if len(hub.requests) == n and not hub.faults else None
            )
            one()
            hub.faults.clear()
            hub.before = lambda method, path: None
            assert one().status in ('published', 'unchanged')
            is_whole(hub, folder)


@pytest.mark.parametrize('point', KILL_POINTS)
def test_killed(hub, folder, tmp_path, point):
    """Killed at a twentieth of its requests, of which the Hub handles every other one; the same call completes it.

    A process of its own, not a fork: threads of this one hold locks that a forked child would find taken for ever.
    """
    one()
    requests = len(hub.requests)
    hub.repos.clear()
    hub.requests.clear()
    neighbour = hub.add('org/neighbour', {'README.md': b'theirs'})
    before = files(folder)
    env = dict(HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_HOME=str(tmp_path), HF_HUB_OFFLINE='0', HF_HUB_DISABLE_XET='1')
    command = [sys.executable, '-m', 'timm_poolattn', 'hub', 'publish', NAME, '--org', 'org']
    process = subprocess.Popen(command, env=os.environ | env)

    def kill(method, path):
        if len(hub.requests) == 1 + point * (requests - 1) // 19:
            process.kill()
            if point % 2:
                raise ConnectionResetError  # before the Hub does what it is asked

    hub.before = kill
    assert process.wait() == -signal.SIGKILL, 'it ended before it was killed'
    hub.before = lambda method, path: None
    assert files(folder) == before and [*neighbour.head] == ['README.md']
    if REPO in hub.repos:
        assert at(hub) in ({}, before)
    assert one().status in ('published', 'unchanged')
    is_whole(hub, folder)


class TestCommandLine:
    def test_publish_and_verify(self, hub, monkeypatch):
        def run(*args):
            result = CliRunner().invoke(main, list(args))
            assert TOKEN not in result.output
            return result

        result = run('hub', 'publish', NAME, '--org', 'org')
        assert result.exit_code == 0 and f'published           {REPO}' in result.output
        result = run('hub', 'verify', f'hf-hub:{REPO}')
        assert result.exit_code == 0 and result.stdout.count('ok  ') == 8
        monkeypatch.setenv('TIMM_POOLATTN_HUB_ORG', 'theirs')
        result = run('hub', 'publish', NAME)
        assert result.exit_code == 1 and 'failed' in result.output and '[403]' in result.output
        result = run('hub', 'publish')
        assert result.exit_code == 2 and 'name the releases to publish, or take --all of them' in result.output
        result = run('hub', 'verify', 'hf-hub:org/nothing')
        assert result.exit_code == 2 and 'org/nothing' in result.output and 'is not published' in result.output

    def test_a_killed_process_is_completed_by_the_next(self, hub, folder, tmp_path):
        """Real processes, their settings from the environment: one is killed while it uploads, one goes on."""
        env = {**os.environ, 'HF_ENDPOINT': hub.url, 'HF_HOME': str(tmp_path / 'home'), 'HF_HUB_DISABLE_XET': '1'}
        del env['HF_HUB_OFFLINE']
        command = [sys.executable, '-m', 'timm_poolattn', 'hub', 'publish', NAME, '--org', 'org']
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        hub.before = lambda method, path: process.send_signal(signal.SIGKILL) if 'lfs/verify' in path else None
        output, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL and TOKEN not in output
        assert not at(hub) and not tags(hub)
        hub.before = lambda method, path: None
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr and done.stdout.startswith('published ')
        is_whole(hub, folder)
        written = [p for p in (tmp_path / 'home').rglob('*') if p.is_file()]
        assert not any(TOKEN.encode() in p.read_bytes() for p in written)
