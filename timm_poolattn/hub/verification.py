"""Is a release what it says it is? Checks of a folder or of a Hub repository, of which nothing is executed."""

import hashlib
import json
import math
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, eval_result_entries_to_yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.hf_api import RepoFile
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..data.view import CROP_MODES, INTERPOLATIONS
from ..inference import evaluate, load_data
from ..models import FAMILIES, HubError, data_sha256, hub_errors, redact
from ..papers import DATASETS
from ..utils import UserError, look_up, released
from .card import eval_result, figures, metadata, model_card
from .onnx_files import FLOAT, INT8, LARGEST_LOSS, OnnxModel, check_onnx

#: Every file of a release; `.gitattributes` is the Hub's own.
REQUIRED = ('config.json', 'model.safetensors', 'README.md', 'results.json')
_ALLOWED = re.compile(
    rf'({"|".join(map(re.escape, (*REQUIRED, FLOAT, INT8)))}|\.gitattributes|\.eval_results/\w+\.yaml)'
)
_OTHER_WEIGHTS = re.compile(r'.*\.(bin|pt|pth|pth\.tar|tar|pkl|pickle|ckpt|npz|h5|onnx|msgpack|safetensors)')
#: Arguments that timm writes into config.json and that leave the architecture as its name says.
CONFIG_ARGS = {'in_chans', 'num_classes', 'global_pool', 'stem_stride', 'img_size'}
#: Keys of config.json, and of its pretrained_cfg: nothing that names a file, an address or code.
_CONFIG_KEYS = {
    *('architecture', 'num_classes', 'num_features', 'global_pool', 'label_names', 'model_args', 'pretrained_cfg'),
}
_PRETRAINED_CFG = {
    *('tag', 'custom_load', 'input_size', 'fixed_input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std'),
    *('num_classes', 'label_names', 'pool_size', 'first_conv', 'classifier'),
}
_POOLS = ('avg', 'max', 'avgmax', 'catavgmax')
#: What a card, a table and the checks read of results.json.
_RESULTS = dict(
    model=str, tag=str, parameters=int, multiply_adds=int, weights=dict, checkpoint=dict, test=dict, epochs=int,
    seed=int, wall_time_s=int | float, arguments=dict, options=dict, versions=dict, hardware=str, curve=list,
)  # fmt: skip
#: What they read of it where it is there.
_OPTIONAL = dict(
    released_by=dict, last_epoch_top1=int | float, best_top1=int | float, best_epoch=int, recipe=str, warm_start=str,
    resumed=list, onnx=dict, without_gradient=list,
)  # fmt: skip
#: The file that each check is about.
_FILES = (
    dict(header='model.safetensors', config='config.json', card='README.md')
    | dict.fromkeys(('parameters', 'values', 'hashes', 'forward'), 'model.safetensors')
    | dict(onnx='onnx/')
)
#: The largest weight that is sound.
LARGEST = 1e6
#: The largest text file that is read, in bytes.
_LARGEST_TEXT = 2**24
#: The largest file that is downloaded, in bytes: several times a release's weights.
_LARGEST_FILE = 2**30
_REWRITE = 'release the run again, which writes both'
#: How far the measured top-1 may lie from the claimed, in percentage points.
TOLERANCE = 0.05


def check_labels(labels: list[str], where: str | Path) -> None:
    """Refuse names of classes that a page or a terminal would not show as they are.

    Raises:
        UserError: one of them; the message begins with `where`.
    """
    for label in labels:
        shown = label.replace('\u200c', '').replace('\u200d', '')  # joiners, of Persian and of emoji
        if not shown.strip() or len(label) > 300 or any(unicodedata.category(c)[0] == 'C' for c in shown):
            raise UserError(
                f'{where}: label name {label!r} is empty, too long, or holds control characters; rename the class'
            )


class Check(NamedTuple):
    """One row of the table."""

    name: str
    ok: bool
    detail: str


def resolve(target: str | Path) -> Path:
    """Return the release folder that `target` names: `<arch>.<tag>`, `<arch>`, or a folder, as `local-dir:` too.

    Raises:
        UserError: neither, or both.
    """
    folders, path = released(), Path(str(target).removeprefix('local-dir:'))
    for name, folder in folders.items():
        if str(target) in (name, name.partition('.')[0]):
            if path.is_dir() and not path.samefile(folder):
                raise UserError(f'{target} is a release of the package and a folder here; for that, local-dir:{target}')
            return folder
    if not path.is_dir():
        look_up('release', str(target), folders, 'or name a folder, or hf-hub:REPO to verify')
    return path


def verify(
    target: str | Path,
    *,
    data_dir: str | Path | None = None,
    dataset: str = '',
    split: str | None = None,
    endpoint: str | None = None,
) -> list[Check]:
    """Check a release: files, header, config, parameters, values, hashes, card, forward, and with data its accuracy.

    Args:
        target: `<arch>.<tag>`, a folder, or `hf-hub:<repository>[@revision]`, which is downloaded afresh.
        data_dir: the images on which results.json claims its accuracy. Default: accuracy is not checked.
        dataset: as `load_images` takes it. Default: a folder or a tar.
        split: of the data. Default: the one that the run evaluated on.
        endpoint: of the Hub. Default: huggingface_hub's.

    Returns:
        The checks in order. The first that fails is the last: what comes after it would rest on it. A file that
        cannot be read or fetched, and a server that answers nonsense, are a failed check too.

    Raises:
        UserError: `target` names nothing.
        HubError: there is no such repository, or no way to it.
    """
    data = dict(data_dir=data_dir, dataset=dataset, split=split)
    if not str(target).startswith('hf-hub:'):
        return verify_folder(resolve(target), **data)
    repo_id, _, revision = str(target).removeprefix('hf-hub:').partition('@')
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp, 'release')
        failed = download(HfApi(endpoint=endpoint), repo_id, revision or None, folder)
        return [failed] if failed else verify_folder(folder, **data)


def download(api: HfApi, repo_id: str, revision: str | None, folder: Path) -> Check | None:
    """Fetch every file of a repository, past every cache, into `folder`.

    Returns:
        The failed check of what was refused or could not be fetched; None if all is there.

    Raises:
        HubError: there is no such repository, or no way to it.
    """
    try:
        with hub_errors(repo_id, api.endpoint):
            entries = list(api.list_repo_tree(repo_id, recursive=True, revision=revision))
    except HFValidationError as e:
        raise UserError(f'{repo_id!r} names no repository: {e}') from e
    except HubError as e:
        if not isinstance(e.__cause__, json.JSONDecodeError):
            raise
        return Check('files', False, str(e))
    except Exception as e:  # an answer that huggingface_hub did not expect
        said = redact(f'{type(e).__name__}: {e}')[:300]
        return Check('files', False, f'{repo_id}: {api.endpoint} does not answer as a Hub does ({said})')
    files = [entry for entry in entries if isinstance(entry, RepoFile)]
    try:
        _check_names([file.path for file in files])
    except UserError as e:
        return Check('files', False, str(e))
    for file in files:
        if not isinstance(file.size, int) or file.size > _LARGEST_FILE:
            return Check('files', False, f'{file.path}: its size is {file.size!r:.20}, {_LARGEST_FILE:,} is the most')
    for file in files:
        try:
            with hub_errors(repo_id, api.endpoint):
                api.hf_hub_download(repo_id, file.path, revision=revision, local_dir=folder, force_download=True)
        except Exception as e:
            said = str(e) if isinstance(e, HubError) else f'{type(e).__name__}: {e}'
            return Check('files', False, f'{file.path} cannot be fetched: {redact(said)[:500]}')
    shutil.rmtree(folder / '.cache', ignore_errors=True)  # huggingface_hub's notes on the download
    return None


def verify_folder(
    folder: Path, *, data_dir: str | Path | None = None, dataset: str = '', split: str | None = None
) -> list[Check]:
    """Do as `verify`, for a folder."""
    release = _Release(folder)
    functions: dict[str, Callable[[], str]] = {
        name: getattr(release, name)
        for name in ('files', 'header', 'config', 'parameters', 'values', 'hashes', 'card', 'forward')
    }
    if (folder / 'onnx').exists():
        functions['onnx'] = release.onnx
    if data_dir is not None:
        functions['accuracy'] = partial(release.accuracy, data_dir, split, dataset)
    checks = []
    for name, function in functions.items():
        try:
            checks.append(Check(name, True, function()))
        except UserError as e:
            checks.append(Check(name, False, str(e)))
            break
        except Exception as e:  # a check that cannot run is a failed one, whatever timm or torch says of it
            file = _FILES.get(name, folder)
            checks.append(Check(name, False, f'{file}: the check cannot run, {type(e).__name__}: {str(e)[:300]}'))
            break
    return checks


def _read_json(path: Path) -> dict[str, Any]:
    """Read a mapping from a JSON file, without NaN, and with each key once."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise UserError(f'{path.name}: a key is there twice')
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise UserError(f'{path.name}: {constant} is no number')

    if path.stat().st_size > _LARGEST_TEXT:
        raise UserError(f'{path.name}: over {_LARGEST_TEXT:,} bytes')
    try:
        data = json.loads(path.read_text('utf-8'), object_pairs_hook=unique, parse_constant=refuse)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise UserError(f'{path.name}: not JSON ({e})') from e
    if not isinstance(data, dict):
        raise UserError(f'{path.name}: holds a {type(data).__name__}, not a mapping')
    return data


def _in_range(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f'{name} is {value!r}, and must be {low:g} to {high:g}')


def _check_names(paths: list[str]) -> None:
    for path in paths:
        if '..' in Path(path).parts or Path(path).is_absolute() or '\\' in path or ':' in path:
            raise UserError(f'{path!r} leads out of the folder')
        if not _ALLOWED.fullmatch(path):
            kind = 'weights other than model.safetensors' if _OTHER_WEIGHTS.fullmatch(path) else 'unexpected'
            may = f'.eval_results/*.yaml, {FLOAT} and {INT8}'
            raise UserError(f'{path}: {kind}; a release holds {", ".join(REQUIRED)}, and may hold {may}')
    if missing := set(REQUIRED).difference(paths):
        raise UserError(f'lacks {", ".join(sorted(missing))}')


@dataclass(frozen=True)
class _Release:
    """The checks of a folder, each of which returns what it found, or raises what is wrong. Their order matters."""

    folder: Path

    @property
    def weights(self) -> Path:
        return self.folder / 'model.safetensors'

    @cached_property
    def results(self) -> dict[str, Any]:
        results = _read_json(self.folder / 'results.json')
        for key, kind in (_RESULTS | {k: kind for k, kind in _OPTIONAL.items() if k in results}).items():
            if not isinstance(results.get(key), kind) or isinstance(results[key], bool):
                raise UserError(f'results.json: {key} is {results.get(key)!r:.100}')
        test = results['test']
        for key in ('top1', 'top5', 'ece'):
            _in_range(f'results.json: test {key}', test.get(key), 0, 100)
        _in_range('results.json: test loss', test.get('loss'), 0, 1e6)
        _in_range('results.json: test images', test.get('images'), 1, 1e9)
        return results

    def files(self) -> str:
        paths = [p for p in self.folder.rglob('*') if p.is_symlink() or not p.is_dir()]
        for path in paths:
            if path.is_symlink() or not path.is_file():
                raise UserError(f'{path.name}: not a regular file')
        _check_names([p.relative_to(self.folder).as_posix() for p in paths])
        return f'{len(paths)} files, safetensors the only weights' + ' beside ONNX' * (self.folder / 'onnx').exists()

    def header(self) -> str:
        try:
            with safe_open(self.weights, 'pt') as f:  # refuses a header that is oversized or points outside the file
                metadata, tensors = f.metadata() or {}, len(f.keys())
        except SafetensorError as e:
            raise UserError(f'model.safetensors: {e}') from e
        name = f'{metadata.get("architecture")}.{metadata.get("tag")}'
        if name != self.name:
            raise UserError(f'model.safetensors is of {name}, results.json of {self.name}')
        return f'{tensors} tensors of {name}'

    @property
    def name(self) -> str:
        return f'{self.results["model"]}.{self.results["tag"]}'

    def config(self) -> str:
        config = _read_json(self.folder / 'config.json')
        arch, args, cfg = config.get('architecture'), config.get('model_args', {}), config.get('pretrained_cfg')
        if arch not in timm.list_models(module=FAMILIES):
            raise UserError(f'config.json: unknown architecture {arch!r}; `poolattn list` has those that there are')
        if arch != self.results['model']:
            raise UserError(f'config.json is of {arch}, results.json of {self.results["model"]}')
        if unknown := sorted(config.keys() - _CONFIG_KEYS):
            raise UserError(f'config.json: {", ".join(unknown)}: no such key; it has {", ".join(sorted(_CONFIG_KEYS))}')
        if not isinstance(args, dict) or not isinstance(cfg, dict):
            raise UserError('config.json: model_args and pretrained_cfg are mappings')
        own = timm.model_entrypoint(arch).model_args  # the name's own arguments may be repeated
        if unknown := sorted(k for k in args if k not in CONFIG_ARGS and (k not in own or args[k] != own[k])):
            raise UserError(f'config.json: model_args {", ".join(unknown)} would build another network than {arch}')
        if unknown := sorted(cfg.keys() - _PRETRAINED_CFG):
            raise UserError(f'config.json: pretrained_cfg has {", ".join(unknown)}, which is not of a release')
        self._check_classes(config, args, cfg)
        self._check_images(cfg)
        size = cfg['input_size']
        pool = config.get('global_pool')
        for key, value, known in (
            ('in_chans', args.get('in_chans', size[0]), (size[0],)),
            ('stem_stride', args.get('stem_stride', 1), (1, 2)),
            ('img_size', args.get('img_size', size[1:]), (size[1:],)),
            ('global_pool', pool, _POOLS),
            ('global_pool', args.get('global_pool', pool), (pool,)),
            ('tag', cfg.get('tag', self.results['tag']), (self.results['tag'],)),
            ('custom_load', cfg.get('custom_load', False), (False,)),
            ('fixed_input_size', cfg.get('fixed_input_size', False), (False,)),
        ):
            if value not in known or type(value) is not type(known[0]):
                raise UserError(f'config.json: {key} is {value!r}, not {" or ".join(map(repr, known))}')
        model = self.model('meta')
        if self.results.get('gate') != model.gate:
            raise UserError(f'results.json: gate is {self.results.get("gate")!r}, and {arch} has {model.gate!r}')
        plain = timm.create_model(arch, device='meta').pretrained_cfg
        for key in ('first_conv', 'classifier'):
            if cfg.get(key) != plain.get(key):
                raise UserError(f'config.json: {key} is {cfg.get(key)!r}, not {plain.get(key)!r}')
        if config.get('num_features') != model.num_features:
            raise UserError(f'config.json: num_features is {config.get("num_features")!r}, not {model.num_features}')
        return f'{arch} with {config["num_classes"]} classes, by timm'

    def _check_classes(self, config: dict[str, Any], args: dict[str, Any], cfg: dict[str, Any]) -> None:
        count, labels, tag = config.get('num_classes'), config.get('label_names'), self.results['tag']
        if type(count) is not int or not 0 < count <= 100_000:
            raise UserError(f'config.json: num_classes is {count!r}, and must be 1 to 100,000')
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise UserError('config.json: label_names must be a list of texts')
        if len(labels) != count:
            raise UserError(f'config.json: {count} classes, {len(labels)} label names')
        for where in (args, cfg):
            if type(where.get('num_classes', count)) is not int or where.get('num_classes', count) != count:
                raise UserError(f'config.json: {count} classes, and {where["num_classes"]!r} in a part of it')
        if cfg.get('label_names', labels) != labels:
            raise UserError('config.json: its two lists of label names differ')
        check_labels(labels, 'config.json')
        if len(set(labels)) < count:
            twice = next(label for label in labels if labels.count(label) > 1)
            raise UserError(f'config.json: label name {twice!r} is there twice')
        if tag in DATASETS and (
            count != DATASETS[tag]['num_classes'] or labels != DATASETS[tag].get('classes', labels)
        ):
            raise UserError(f'config.json: label_names are not those of {tag} in its order')

    def _check_images(self, cfg: dict[str, Any]) -> None:
        size, tag = cfg.get('input_size'), self.results['tag']
        if not isinstance(size, list) or len(size) != 3 or any(type(n) is not int for n in size):
            raise UserError(f'config.json: input_size is {size!r}, and must be channels, height and width')
        if not (1 <= size[0] <= 16 and all(8 <= n <= 1024 for n in size[1:])):
            raise UserError(f'config.json: input_size is {size!r}; 1 to 16 channels and sides of 8 to 1024 are sound')
        if tag in DATASETS and tuple(size) != DATASETS[tag]['input_size']:
            raise UserError(f'config.json: input_size is {size}, {tag} has {list(DATASETS[tag]["input_size"])}')
        for key, low in (('mean', 0), ('std', 1e-3)):
            values = cfg.get(key)
            if not isinstance(values, list) or len(values) != size[0]:
                raise UserError(f'config.json: {key} is {values!r}, and must be a list of {size[0]} numbers')
            for value in values:
                _in_range(f'config.json: {key}', value, low, 1)
        _in_range('config.json: crop_pct', cfg.get('crop_pct'), 0.1, 1)
        for key, known in (('interpolation', INTERPOLATIONS), ('crop_mode', CROP_MODES)):
            if cfg.get(key) not in known:
                raise UserError(f'config.json: {key} is {cfg.get(key)!r}, not one of {", ".join(known)}')
        pool = cfg.get('pool_size')
        if pool is not None and not (
            isinstance(pool, list) and len(pool) == 2 and all(type(n) is int and 0 < n <= 1024 for n in pool)
        ):
            raise UserError(f'config.json: pool_size is {pool!r}, and must be height and width')

    def model(self, device: str = 'cpu') -> torch.nn.Module:
        """Build it as timm does from config.json; with its weights, unless on 'meta'."""
        with torch.device(device):
            return timm.create_model(f'local-dir:{self.folder}', pretrained=device != 'meta').eval()

    def parameters(self) -> str:
        model = self.model('meta')
        with safe_open(self.weights, 'pt') as f:
            shapes = {name: f.get_slice(name).get_shape() for name in f.keys()}  # noqa: SIM118  no mapping
        expected = {name: list(weight.shape) for name, weight in model.state_dict().items()}
        if differing := sorted(n for n in shapes.keys() | expected.keys() if shapes.get(n) != expected.get(n)):
            name = differing[0]
            raise UserError(
                f'{len(differing)} tensors are not those of {self.results["model"]}, {name} the first: '
                f'{shapes.get(name, "absent")} in the file, {expected.get(name, "absent")} in the registry'
            )
        count = sum(math.prod(p.shape) for p in model.parameters())
        if count != self.results['parameters']:
            raise UserError(f'results.json says {self.results["parameters"]:,}, the registry {count:,}')
        names = [name for name, _ in model.named_parameters()]
        silent = self.results.get('without_gradient', [])
        if len(silent) > len(names) or silent != [name for name in names if name in silent]:
            raise UserError(
                f'results.json: without_gradient must name parameters of {self.results["model"]}, each once, in order'
            )
        return f'{count:,}, as in the registry'

    def values(self) -> str:
        expected = self.model('meta').state_dict()
        for name, weight in load_file(self.weights).items():
            if weight.dtype != expected[name].dtype:
                raise UserError(f'{name} is {weight.dtype}, and must be {expected[name].dtype}')
            if not weight.isfinite().all():
                raise UserError(f'{name} holds NaN or infinity')
            if weight.is_floating_point() and weight.abs().max() > LARGEST:
                raise UserError(f'{name} holds {weight.abs().max():.1e}: no training ends beyond {LARGEST:.0e}')
            if name.endswith(('running_var', 'num_batches_tracked')) and (weight < 0).any():
                raise UserError(f'{name} is negative')
        return 'all finite, of the right type'

    def hashes(self) -> str:
        with safe_open(self.weights, 'pt') as f:
            metadata = f.metadata()
        whole, data = hashlib.sha256(self.weights.read_bytes()).hexdigest(), data_sha256(self.weights)
        claimed = self.results['weights']
        if (whole, data) != (claimed['sha256'], claimed['data_sha256']) or data != metadata.get('data_sha256'):
            raise UserError(f'model.safetensors is {whole[:12]}, results.json says {claimed["sha256"][:12]}')
        return f'sha256 {whole[:12]}, as in results.json'

    def card(self) -> str:
        """Check what the card and the Hub's evaluation result say against results.json."""
        try:
            model_card(self.results)
        except Exception as e:  # whatever the template misses
            raise UserError(f'results.json: no card can be written from it ({type(e).__name__}: {e})') from e
        top1, tag = self.results['test']['top1'], self.results['tag']
        if self.results.get('onnx') and not (self.folder / 'onnx').exists():
            raise UserError(f'results.json names {", ".join(self.results["onnx"])}, which are not there')
        path = self.folder / 'README.md'
        if path.stat().st_size > _LARGEST_TEXT:
            raise UserError(f'README.md: over {_LARGEST_TEXT:,} bytes')
        try:
            card = ModelCard(path.read_text('utf-8'))
        except (ValueError, yaml.YAMLError) as e:
            raise UserError(f'README.md: not a model card ({" ".join(str(e).split())[:200]})') from e
        said, right = card.data.to_dict(), metadata(self.results).to_dict()
        if differing := sorted(key for key in said.keys() | right.keys() if said.get(key) != right.get(key)):
            raise UserError(f'README.md: {differing[0]} in its head is not what results.json says; {_REWRITE}')

        def cells(line: str) -> list[str]:
            return [cell.strip() for i, cell in enumerate(line.split('|')) if i != 2]  # the paper's may be corrected

        if cells(figures(self.results)) not in map(cells, card.text.splitlines()):
            raise UserError(f'README.md: its table is not that of results.json, {top1:.2f}%; {_REWRITE}')
        silent = self.results.get('without_gradient', [])
        if silent != re.findall(r'^`([\w.]+)`[.,]$', card.text, re.MULTILINE):
            raise UserError(f'README.md: names other parameters without a gradient than results.json; {_REWRITE}')
        there = {p.relative_to(self.folder).as_posix() for p in self.folder.glob('.eval_results/*')}
        expected = {f'.eval_results/{tag}.yaml'} if tag in DATASETS else set()
        if there != expected:
            name = sorted(there ^ expected)[0]
            raise UserError(f'{name}: {"is missing" if name in expected else f"not of a release of {tag}"}; {_REWRITE}')
        for name in expected:
            try:
                entries = yaml.safe_load((self.folder / name).read_text('utf-8'))
            except (ValueError, yaml.YAMLError) as e:
                raise UserError(f'{name}: not YAML ({" ".join(str(e).split())[:200]})') from e
            if entries != eval_result_entries_to_yaml([eval_result(self.results)]):
                raise UserError(f'{name}: is not what results.json says, {top1:.2f}%; {_REWRITE}')
        return f'{top1:.2f}%, as in results.json'

    @torch.inference_mode()
    def forward(self) -> str:
        model = self.model()
        images = torch.randn(2, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
        output = model(images)
        if output.shape != (2, model.num_classes) or not output.isfinite().all():
            raise UserError('model.safetensors: an image gives no finite number for each class')
        if output[0].equal(output[1]):
            raise UserError('model.safetensors: two images that differ give the very same numbers')
        return f'an image gives {model.num_classes} finite numbers'

    def onnx(self) -> str:
        return check_onnx(self.folder, self.model(), self.results.get('onnx', {}), self.results['test']['top1'])

    def accuracy(self, data_dir: str | Path, split: str | None, dataset: str) -> str:
        claimed, model = self.results['test'], self.model()
        split = split or self.results['arguments'].get('val_split') or 'validation'  # as `Run.load_data`
        for hold_out in (True, False):  # a fine-tuned model's claim is of what was held out, others' of all
            try:
                data = load_data(model, data_dir, split, name=dataset, hold_out=hold_out)
            except UserError:  # a class of one image, of which none can be held out
                if not hold_out:
                    raise
                continue
            if len(data) == claimed['images']:
                break
        measured = evaluate(model, data)
        if measured['images'] != claimed['images']:
            raise UserError(f'claimed on {claimed["images"]:,} images, this data has {measured["images"]:,}')
        detail = f'{measured["top1"]:.2f}% measured, {claimed["top1"]:.2f}% claimed'
        if abs(measured['top1'] - claimed['top1']) > TOLERANCE + 1e-9:
            raise UserError(f'{detail}: more than {TOLERANCE} apart')
        for name, facts in self.results.get('onnx', {}).items():
            top1 = evaluate(OnnxModel(self.folder / name, model), data)['top1']
            apart = TOLERANCE if name == FLOAT else LARGEST_LOSS  # 8 bits are rounded as the processor does
            if abs(top1 - facts['top1']) > apart + 1e-9:
                raise UserError(f'{name}: {top1:.2f}% measured, {facts["top1"]:.2f}% claimed')
        return detail
