"""Publish release folders to the Hub: one commit each, checked afterwards. Run again, it goes on where it ended."""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_session, get_token
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from ..models import HubError, hub_errors, redact
from ..utils import UserError, progress
from .verification import download, resolve, verify_folder

#: Seconds to wait for an answer, where HF_HUB_DOWNLOAD_TIMEOUT is not more. huggingface_hub would wait for ever.
TIMEOUT = 60
_STEPS = ('verifying', 'looking up', 'uploading', 'downloading', 'tagging')


class Published(NamedTuple):
    """What became of a release.

    Attributes:
        repo_id: `<organisation>/<arch>.<tag>`.
        status: 'published', 'updated' (all but the weights), 'replaced', 'proposed' (as a pull request) or 'unchanged';
            'would be published' and so on in a dry run; 'failed'.
        detail: where it is, or what went wrong and what to do.
    """

    repo_id: str
    status: str
    detail: str


def publish(
    targets: Iterable[str | Path],
    org: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    dry_run: bool = False,
    replace: bool = False,
    collection: str | None = None,
    endpoint: str | None = None,
    workers: int = 4,
) -> list[Published]:
    """Publish releases as `<org>/<arch>.<tag>`, several at once.

    Each is verified, addressed to `org` in its card, uploaded in one commit, downloaded again past every cache,
    compared in files and outputs, and only then tagged `weights-<SHA-256>`. What is there already is skipped.
    huggingface_hub finds the token.

    Args:
        targets: releases or folders of them, as `resolve` takes them.
        org: organisation or user.
        private: create private repositories; one that is public already is refused.
        create_pr: propose the files in a pull request.
        dry_run: only say what would be done.
        replace: replace other weights, and delete files that are not the release's. The commit that has them is tagged
            `replaced-<commit>` first.
        collection: slug of a collection to add the repositories to.
        endpoint: of the Hub. Default: huggingface_hub's, which HF_ENDPOINT sets.
        workers: how many at once.

    Returns:
        What became of each, in order of `targets`. A failure of one leaves the others be.

    Raises:
        UserError: a target that names nothing.
        HubError: no token.
    """
    folders = [resolve(target) for target in targets]
    if not dry_run and not get_token():
        raise HubError('publishing needs a token with write access: `hf auth login`, or set HF_TOKEN')
    api = HfApi(endpoint=endpoint)
    get_session().timeout = max(TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT)

    def run(folder: Path) -> Published:
        repo_id = f'{org}/{folder.name}'
        steps = iter(_STEPS)

        def step() -> None:
            bar.set_postfix_str(f'{folder.name}: {next(steps)}')
            bar.update()

        try:
            step()
            _check(folder)
            with tempfile.TemporaryDirectory() as temp, hub_errors(repo_id, api.endpoint):
                copy = _address(folder, repo_id, Path(temp))
                status, detail = _upload(api, copy, repo_id, step, private, create_pr, dry_run, replace, collection)
        except UserError as e:
            status, detail = 'failed', redact(str(e))
        except Exception as e:  # an answer that huggingface_hub did not expect; the others go on
            said = redact(f'{type(e).__name__}: {e}')
            status, detail = 'failed', f'{repo_id}: {api.endpoint} does not answer as a Hub does ({said})'
        bar.update(len(list(steps)))
        return Published(repo_id, status, detail)

    quiet = len(folders) > 1 and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()  # those of several uploads would mix
    try:
        with progress(total=len(_STEPS) * len(folders), desc='publishing', unit='step') as bar:
            pool = ThreadPoolExecutor(workers)
            try:
                return list(pool.map(run, folders))
            finally:
                pool.shutdown(cancel_futures=True)
    finally:
        if quiet:
            enable_progress_bars()


def _check(folder: Path) -> None:
    """Raise what is wrong with a release, if anything is."""
    for check in verify_folder(folder):
        if not check.ok:
            raise UserError(f'{folder.name} is not sound, {check.name}: {check.detail}')
    results = json.loads((folder / 'results.json').read_text())
    name = f'{results["model"]}.{results["tag"]}'
    if name != folder.name:
        raise UserError(f'{folder.name}: the folder holds {name}, and must have its name')


def _address(folder: Path, repo_id: str, temp: Path) -> Path:
    """Copy a release to `temp`, so that its card names the repository that it goes to.

    In another organisation's, the model's bare name is not the same weights.
    """
    copy = shutil.copytree(folder, temp / folder.name)
    card = copy / 'README.md'
    written = card.read_text('utf-8')
    text = re.sub(rf"[\w.-]+/{re.escape(folder.name)}(?=')", repo_id, written)
    if text != written:
        text = re.sub(r'^.*  # the same\n', '', text, flags=re.MULTILINE)
    card.write_text(text, encoding='utf-8', newline='')
    return copy


def _upload(
    api: HfApi,
    folder: Path,
    repo_id: str,
    step: Callable[[], None],
    private: bool,
    create_pr: bool,
    dry_run: bool,
    replace: bool,
    collection: str | None,
) -> tuple[str, str]:
    """Return `Published.status` and `.detail` of a sound release."""
    step()
    url = f'{api.endpoint}/{repo_id}'
    try:
        info = api.repo_info(repo_id)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        if dry_run:
            return 'would be published', f'as {url}, new'
        api.create_repo(repo_id, private=private, exist_ok=True)
        info = api.repo_info(repo_id)
    if private and not info.private:
        raise HubError(f'{url} is public: make it private in its settings, or publish without --private')

    there = api.verify_repo_checksums(repo_id, revision=info.sha, local_dir=folder)
    differing = [mismatch['path'] for mismatch in there.mismatches]
    foreign = [path for path in there.missing_paths if path != '.gitattributes']  # which the Hub writes
    changed = [*differing, *there.extra_paths]
    lost = [path for path in differing if path == 'model.safetensors'] + foreign
    status = (
        'unchanged'
        if not changed + foreign
        else 'proposed'
        if create_pr
        else 'replaced'
        if lost
        else 'published'
        if 'model.safetensors' in changed
        else 'updated'
    )
    if status == 'replaced' and not replace:
        raise HubError(
            f'{url} holds other weights or files ({", ".join(lost)}): --replace puts this release in their place, and'
            ' keeps them under a tag'
        )
    if dry_run:
        files = ', '.join([*changed, *(f'{path} (deleted)' for path in foreign)])
        return ('unchanged', url) if status == 'unchanged' else (f'would be {status}', f'{url}: {files}')

    step()
    weights = json.loads((folder / 'results.json').read_text())['weights']['sha256']
    tag, revision, kept = f'weights-{weights[:12]}', info.sha, ''
    operations = [CommitOperationAdd(path, folder / path) for path in changed]
    operations += [CommitOperationDelete(path) for path in foreign]
    title = f'{folder.name}, weights {weights[:12]}'
    commit = dict(operations=operations, commit_message=title, parent_commit=info.sha)
    if status == 'proposed':
        revision = (
            _proposal(api, folder, repo_id, title) or api.create_commit(repo_id, create_pr=True, **commit).pr_revision
        )
        url = f'{url}/discussions/{revision.rpartition("/")[2]}'
    elif status != 'unchanged':
        if lost:
            api.create_tag(repo_id, tag=f'replaced-{info.sha[:12]}', revision=info.sha, exist_ok=True)
            kept = f', the old ones under replaced-{info.sha[:12]}'
        # create_commit and not upload_folder, which may take several commits
        revision = api.create_commit(repo_id, **commit).oid

    step()
    tagged = any(ref.name == tag for ref in api.list_repo_refs(repo_id).tags)
    if status != 'unchanged' or not tagged:
        _compare(api, folder, repo_id, revision)
    step()
    if status != 'proposed' and not tagged:
        api.create_tag(repo_id, tag=tag, revision=revision, exist_ok=True)
    if collection:
        api.add_collection_item(collection, repo_id, 'model', exists_ok=True)
    return status, url if status == 'proposed' else f'{url}, tag {tag}{kept}'


def _proposal(api: HfApi, folder: Path, repo_id: str, title: str) -> str | None:
    """Find the open pull request that proposes these very files, left by a run that was cut short."""
    for pr in api.get_repo_discussions(repo_id, discussion_type='pull_request', discussion_status='open'):
        if pr.title == title:
            there = api.verify_repo_checksums(repo_id, revision=pr.git_reference, local_dir=folder)
            if not there.mismatches and not there.extra_paths:
                return pr.git_reference
    return None


@torch.inference_mode()
def _compare(api: HfApi, folder: Path, repo_id: str, revision: str) -> None:
    """Download what was published and raise where it is not the folder, in its bytes or its outputs."""
    with tempfile.TemporaryDirectory() as temp:
        back = Path(temp, folder.name)
        if refused := download(api, repo_id, revision, back):
            raise HubError(f'{repo_id}: {refused.detail}')
        for path in folder.rglob('*'):
            if path.is_file() and path.read_bytes() != (back / path.relative_to(folder)).read_bytes():
                raise HubError(f'{repo_id}: {path.name} came back other than it was sent, and is not tagged: run again')
        _check(back)
        ours, theirs = (timm.create_model(f'local-dir:{path}', pretrained=True).eval() for path in (folder, back))
        images = torch.randn(2, *ours.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
        if not ours(images).equal(theirs(images)):
            raise HubError(f'{repo_id}: its outputs are not those of {folder.name}')
