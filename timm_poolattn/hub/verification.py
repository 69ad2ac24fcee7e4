"""Is a release what it says it is? Checks of a folder or of a Hub repository, of which nothing is executed."""

import hashlib
import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..data import load_images
from ..inference import evaluate
from ..models import FAMILIES, data_sha256, hub_errors, released

#: Every file of a release; `.gitattributes` is the Hub's own.
REQUIRED = ('config.json', 'model.safetensors', 'README.md', 'results.json')
_ALLOWED = re.compile(rf'({"|".join(map(re.escape, REQUIRED))}|\.gitattributes|\.eval_results/\w+\.yaml)')
_OTHER_WEIGHTS = re.compile(r'.*\.(bin|pt|pth|pth\.tar|tar|pkl|pickle|ckpt|npz|h5|onnx|msgpack|safetensors)')
#: Arguments that timm writes into config.json and that leave the architecture as its name says.
_MODEL_ARGS = {'in_chans', 'num_classes', 'global_pool', 'stem_stride'}
#: How far the measured top-1 may lie from the claimed, in percentage points.
TOLERANCE = 0.05


class Check(NamedTuple):
    """One row of the table."""

    name: str
    ok: bool
    detail: str


def resolve(target: str | Path) -> Path:
    """The release folder that `target` names: `<arch>.<tag>`, `<arch>`, or a folder.

    Raises:
        ValueError: neither.
    """
    folders = released()
    for name, folder in folders.items():
        if str(target) in (name, name.partition('.')[0]):
            return folder
    if not Path(target).is_dir():
        raise ValueError(f'{target}: neither a release ({", ".join(folders) or "there are none"}) nor a folder')
    return Path(target)


def verify(
    target: str | Path,
    *,
    data_dir: str | Path | None = None,
    dataset: str = '',
    split: str = 'test',
    endpoint: str | None = None,
) -> list[Check]:
    """Check a release: its files, header, config, parameters, values, hashes, and with data its accuracy.

    Args:
        target: `<arch>.<tag>`, a folder, or `hf-hub:<repository>[@revision]`, which is downloaded afresh.
        data_dir: the images on which results.json claims its accuracy. Default: accuracy is not checked.
        dataset: as `load_images` takes it. Default: a folder or a tar.
        split: of the data. Default: 'test'.
        endpoint: of the Hub. Default: huggingface_hub's.

    Returns:
        The checks in order. The first that fails is the last: what comes after it would rest on it.

    Raises:
        ValueError: `target` names nothing.
        HubError: the Hub does not give the repository.
    """
    data = dict(data_dir=data_dir, dataset=dataset, split=split)
    if not str(target).startswith('hf-hub:'):
        return verify_folder(resolve(str(target).removeprefix('local-dir:')), **data)
    repo_id, _, revision = str(target).removeprefix('hf-hub:').partition('@')
    with tempfile.TemporaryDirectory() as temp, hub_errors(repo_id, endpoint):
        folder = Path(temp, 'release')
        failed = download(HfApi(endpoint=endpoint), repo_id, revision or None, folder)
        return [failed] if failed else verify_folder(folder, **data)


def download(api: HfApi, repo_id: str, revision: str | None, folder: Path) -> Check | None:
    """Every file of a repository, past every cache, into `folder`; where a name is refused, nothing but its check."""
    entries = [e for e in api.list_repo_tree(repo_id, recursive=True, revision=revision) if isinstance(e, RepoFile)]
    paths = [entry.path for entry in entries]
    try:
        _check_names(paths)
    except ValueError as e:
        return Check('files', False, str(e))
    for path in paths:
        api.hf_hub_download(repo_id, path, revision=revision, local_dir=folder, force_download=True)
    shutil.rmtree(folder / '.cache', ignore_errors=True)  # huggingface_hub's notes on the download
    return None


def verify_folder(
    folder: Path, *, data_dir: str | Path | None = None, dataset: str = '', split: str = 'test'
) -> list[Check]:
    """`verify` for a folder."""
    release = _Release(folder)
    functions: list[Callable[[], str]] = [
        release.files,
        release.header,
        release.config,
        release.parameters,
        release.values,
        release.hashes,
    ]
    if data_dir is not None:
        data = load_images(data_dir, split, name=dataset)
        functions.append(lambda: release.accuracy(data))
    checks = []
    for function in functions:
        name = getattr(function, '__name__', '').replace('<lambda>', 'accuracy')
        try:
            checks.append(Check(name, True, function()))
        except (ValueError, KeyError, TypeError, RuntimeError, AssertionError, OSError) as e:  # timm's, of a config
            checks.append(Check(name, False, str(e) if isinstance(e, ValueError) else f'{type(e).__name__}: {e}'))
            break
    return checks


def _check_names(paths: list[str]) -> None:
    for path in paths:
        if '..' in Path(path).parts or Path(path).is_absolute() or '\\' in path or ':' in path:
            raise ValueError(f'{path!r} leads out of the folder')
        if not _ALLOWED.fullmatch(path):
            kind = 'weights other than model.safetensors' if _OTHER_WEIGHTS.fullmatch(path) else 'unexpected'
            raise ValueError(f'{path}: {kind}; a release holds {", ".join(REQUIRED)} and .eval_results/*.yaml')
    if missing := set(REQUIRED).difference(paths):
        raise ValueError(f'lacks {", ".join(sorted(missing))}')


@dataclass(frozen=True)
class _Release:
    """The checks of a folder, each of which returns what it found, or raises what is wrong. Their order matters."""

    folder: Path

    @property
    def weights(self) -> Path:
        return self.folder / 'model.safetensors'

    @cached_property
    def results(self) -> dict[str, Any]:
        return json.loads((self.folder / 'results.json').read_text())

    def files(self) -> str:
        paths = [p for p in self.folder.rglob('*') if p.is_symlink() or not p.is_dir()]
        for path in paths:
            if path.is_symlink() or not path.is_file():
                raise ValueError(f'{path.name}: not a regular file')
        _check_names([p.relative_to(self.folder).as_posix() for p in paths])
        return f'{len(paths)} files, safetensors the only weights'

    def header(self) -> str:
        try:
            with safe_open(self.weights, 'pt') as f:  # refuses a header that is oversized or points outside the file
                metadata, tensors = f.metadata() or {}, len(f.keys())
        except SafetensorError as e:
            raise ValueError(f'model.safetensors: {e}') from e
        name = f'{metadata.get("architecture")}.{metadata.get("tag")}'
        if name != self.name:
            raise ValueError(f'model.safetensors is of {name}, results.json of {self.name}')
        return f'{tensors} tensors of {name}'

    @property
    def name(self) -> str:
        return f'{self.results["model"]}.{self.results["tag"]}'

    def config(self) -> str:
        config = json.loads((self.folder / 'config.json').read_text())
        arch, args, labels = config['architecture'], config.get('model_args', {}), config['label_names']
        if arch not in timm.list_models(module=FAMILIES):
            raise ValueError(f'config.json: unknown architecture {arch!r}; `poolattn list` has those that there are')
        if arch != self.results['model']:
            raise ValueError(f'config.json is of {arch}, results.json of {self.results["model"]}')
        if unknown := sorted(set(args) - _MODEL_ARGS):
            raise ValueError(f'config.json: model_args {", ".join(unknown)} would build another network than {arch}')
        if len(labels) != config['num_classes'] or args.get('num_classes', len(labels)) != len(labels):
            raise ValueError(f'config.json: {config["num_classes"]} classes, {len(labels)} label names')
        self.model('meta')
        return f'{arch} with {config["num_classes"]} classes, by timm'

    def model(self, device: str = 'cpu') -> torch.nn.Module:
        """As timm builds it from config.json; with its weights, unless on 'meta'."""
        with torch.device(device):
            return timm.create_model(f'local-dir:{self.folder}', pretrained=device != 'meta').eval()

    def parameters(self) -> str:
        model = self.model('meta')
        with safe_open(self.weights, 'pt') as f:
            shapes = {name: f.get_slice(name).get_shape() for name in f.keys()}  # noqa: SIM118  no mapping
        expected = {name: list(weight.shape) for name, weight in model.state_dict().items()}
        if differing := sorted(n for n in shapes.keys() | expected.keys() if shapes.get(n) != expected.get(n)):
            name = differing[0]
            raise ValueError(
                f'{len(differing)} tensors are not those of {self.results["model"]}, {name} the first: '
                f'{shapes.get(name, "absent")} in the file, {expected.get(name, "absent")} in the registry'
            )
        count = sum(math.prod(p.shape) for p in model.parameters())
        if count != self.results['parameters']:
            raise ValueError(f'results.json says {self.results["parameters"]:,}, the registry {count:,}')
        return f'{count:,}, as in the registry'

    def values(self) -> str:
        for name, weight in load_file(self.weights).items():
            if not weight.isfinite().all():
                raise ValueError(f'{name} holds NaN or infinity')
        return 'all finite'

    def hashes(self) -> str:
        with safe_open(self.weights, 'pt') as f:
            metadata = f.metadata()
        whole, data = hashlib.sha256(self.weights.read_bytes()).hexdigest(), data_sha256(self.weights)
        claimed = self.results['weights']
        if (whole, data) != (claimed['sha256'], claimed['data_sha256']) or data != metadata.get('data_sha256'):
            raise ValueError(f'model.safetensors is {whole[:12]}, results.json says {claimed["sha256"][:12]}')
        return f'sha256 {whole[:12]}, as in results.json'

    def accuracy(self, data) -> str:
        claimed = self.results['test']
        measured = evaluate(self.model(), data)
        if measured['images'] != claimed['images']:
            raise ValueError(f'claimed on {claimed["images"]:,} images, this data has {measured["images"]:,}')
        detail = f'{measured["top1"]:.2f}% measured, {claimed["top1"]:.2f}% claimed'
        if abs(measured['top1'] - claimed['top1']) > TOLERANCE + 1e-9:
            raise ValueError(f'{detail}: more than {TOLERANCE} apart')
        return detail
