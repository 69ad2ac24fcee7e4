"""Weights from the Hub: which organisation's, whole or not at all, and what an error of the Hub means."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path

from huggingface_hub import constants, get_token, hf_hub_download
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg

from ..utils import HUB_ORG, UserError


def hub_org() -> str:
    """Return the Hub organisation whose `<arch>.<tag>` repositories are ours. Default: timm-poolattn."""
    return os.environ.get(HUB_ORG, 'timm-poolattn')


class HubError(UserError, RuntimeError):
    """The Hub did not give or take something. The message says why, and what to do."""


@contextmanager
def hub_errors(repo_id: str, endpoint: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises about a repository into a `HubError`. The token is in none of its messages.

    Args:
        repo_id: `<organisation>/<name>`.
        endpoint: of the Hub. Default: huggingface_hub's, which HF_ENDPOINT sets.
    """
    try:
        yield
    except HubError:  # of a call within, which knows the repository better
        raise
    except Exception as error:
        causes = [error]
        while cause := causes[-1].__cause__:
            causes.append(cause)
        message = next(filter(None, (_explain(cause, repo_id, endpoint or constants.ENDPOINT) for cause in causes)), '')
        if not message:
            raise
        leaks = any(redact(str(cause)) != str(cause) for cause in causes)
        raise HubError(redact(message)) from (None if leaks else error)


def redact(text: str) -> str:
    """Return `text` without the token, which a server may send back."""
    token = get_token()
    return text.replace(token, '***') if token else text


def _explain(error: BaseException, repo_id: str, endpoint: str) -> str:
    """Say what one exception of huggingface_hub means; '' if it is none of them."""
    where = f'{repo_id} at {endpoint}'
    login = '`hf auth login`, or set HF_TOKEN'
    if isinstance(error, GatedRepoError):
        return f'{where} is gated: agree to its terms on {endpoint}/{repo_id}, and log in ({login})'
    if isinstance(error, RepositoryNotFoundError):
        if get_token():
            return (
                f'{where} is not published, or is private and not yours to read; `poolattn list` shows what is trained'
            )
        return f'{where} is not published, or is private, which shows only with a token ({login})'
    if isinstance(error, RevisionNotFoundError):
        return f'{where} has no such revision: {endpoint}/{repo_id}/tree/main lists its branches and tags'
    if isinstance(error, RemoteEntryNotFoundError):
        return f'{where} lacks the file {error.response.url.path.rpartition("/")[2]}; no other format is loaded'
    if isinstance(error, OfflineModeIsEnabled):
        return f'HF_HUB_OFFLINE is set and {where} is not in the cache: unset it to reach the Hub'
    if isinstance(error, FileMetadataError | JSONDecodeError):
        return f'{endpoint} does not answer as a Hub does: check HF_ENDPOINT and any proxy'
    if isinstance(error, HfHubHTTPError):
        said = f' ({" ".join(error.server_message.split())[:200]})' if error.server_message else ''
        wait = error.response.headers.get('Retry-After')
        remedies = {
            401: f'the token is not valid: make a new one and log in ({login})',
            403: 'the token may not do this: take one with write access to the organisation',
            409: 'another change is under way there: run again',
            412: 'somebody else changed it meanwhile: run again',
            429: f'too many requests: run again {f"in {wait} s" if wait else "in some minutes"}',
        }
        status = error.response.status_code
        fault = 'the Hub has a fault: run again later' if status >= 500 else 'the Hub refuses this'
        return f'{where}: {remedies.get(status, fault)} [{status}]{said}'
    if isinstance(error, HTTPError):  # of the transport
        kind = type(error).__name__
        if kind in ('ConnectError', 'ConnectTimeout', 'ProxyError'):
            return f'no connection to {endpoint}: check the network, or name a mirror in HF_ENDPOINT ({error})'
        if 'Timeout' in kind:
            return f'{where}: no answer in time: run again, or allow more (HF_HUB_DOWNLOAD_TIMEOUT, in s)'
        return f'{where}: the connection broke off: run again, it goes on from there ({error})'
    if isinstance(error, ConnectionError) and 'xet' in str(error):
        return f'{where}: no Xet storage: set HF_HUB_DISABLE_XET=1 for a server that has none, else run again ({error})'
    if 'Consistency check failed' in str(error):
        return f'{where}: the download was cut short and is not used: run again'
    return ''


def data_sha256(file: str | Path | bytes) -> str:
    """Hash what follows the header in a safetensors file by SHA-256: the tensors. Its metadata can hold the hash."""
    data = file if isinstance(file, bytes) else Path(file).read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], 'little') :]).hexdigest()


def fetch_weights(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> None:
    """Bring the weights that timm is about to load from the Hub, if it is, into the cache.

    Raises:
        HubError: none that are safetensors, or damaged ones (which leave the cache).
    """
    if not cfg.hf_hub_id or (cfg.source != 'hf-hub' and (cfg.file or cfg.state_dict)):
        return
    file = cfg.hf_hub_filename or 'model.safetensors'
    if not re.fullmatch(r'[\w.-]+\.safetensors', file):
        raise HubError(f'{cfg.hf_hub_id}: {file!r} is not loaded: weights are a .safetensors file beside config.json')
    repo_id, _, revision = cfg.hf_hub_id.partition('@')
    with hub_errors(repo_id):
        path = Path(hf_hub_download(repo_id, file, revision=revision or None, cache_dir=cache_dir))
    try:
        with safe_open(path, 'pt') as f:
            expected = (f.metadata() or {}).get('data_sha256')
        whole = expected in (None, data_sha256(path))
    except SafetensorError:
        whole = False
    if not whole:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise HubError(f'{repo_id}: {file} came damaged, and is not used or kept: run again')
