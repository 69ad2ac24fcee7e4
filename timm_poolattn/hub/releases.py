"""From a training run to a release folder: the Hub repository, byte for byte."""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import eval_result_entries_to_yaml
from timm.models import clean_state_dict, create_model, save_for_hf

from ..data import load_images
from ..inference import evaluate
from ..models import data_sha256, hub_configs_dir, multiply_adds
from ..papers import DATASETS
from ..training import read_summary
from ..version import __version__
from .card import eval_result, model_card

#: timm's names of the checkpoints to choose from.
CHECKPOINTS = dict(last='last.pth.tar', best='model_best.pth.tar')


def release(
    run_dir: str | Path,
    tag: str,
    *,
    name: str | None = None,
    checkpoint: str = 'last',
    data_dir: str | Path | None = None,
    out: Path | None = None,
) -> Path:
    """Lay out `<name>.<tag>/` from a run of `poolattn train`.

    The folder holds config.json and model.safetensors (timm's save_for_hf), results.json, the model card README.md and
    `.eval_results/`. The metadata of model.safetensors names the architecture, the package's version, the git commit of
    its checkout and `data_sha256`, the SHA-256 of all bytes behind the header: a file cannot hold its own hash.
    results.json has the SHA-256 of the whole file, and accuracy as measured on the written folder. An existing folder
    of the name is replaced once the new one is whole.

    Args:
        run_dir: output folder of the run.
        tag: the training data, one of `DATASETS`.
        name: the model. Default: the run's, and any other is refused.
        checkpoint: 'last', or 'best' on the test set, which flatters its accuracy there. Default: 'last'. Of either,
            the exponential moving average where the run kept one.
        data_dir: the data to evaluate on. Default: the run's own.
        out: where the folder goes. Default: `hub_configs/`.

    Raises:
        FileNotFoundError: no finished run in `run_dir`.
        ValueError: an unknown tag or checkpoint, a `name` that the run did not train, or a network that is not its
            name's.
    """
    run_dir, out = Path(run_dir), out or hub_configs_dir()
    if tag not in DATASETS:
        raise ValueError(f'unknown tag {tag!r}; choose from {", ".join(DATASETS)}')
    if checkpoint not in CHECKPOINTS:
        raise ValueError(f'unknown checkpoint {checkpoint!r}; choose from {", ".join(CHECKPOINTS)}')
    for file in ('args.yaml', 'run.json', 'summary.csv', CHECKPOINTS[checkpoint]):
        if not (run_dir / file).is_file():
            raise FileNotFoundError(f'{run_dir}: no {file}; is it the output folder of a finished `poolattn train`?')
    args = yaml.safe_load((run_dir / 'args.yaml').read_text())
    arch = args['model'].split('.')[0]
    if name not in (None, arch):
        raise ValueError(f'{run_dir}: the run trained {arch}, not {name}; release it as --name {arch}')
    if args['model_kwargs']:
        raise ValueError(
            f'{run_dir}: trained with --model-kwargs {args["model_kwargs"]}, but a release is loaded by its name alone'
        )
    data = load_images(data_dir or args['data_dir'], args['val_split'], name=args['dataset'])

    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(run_dir / CHECKPOINTS[checkpoint], map_location='cpu', weights_only=True)
    model = create_model(f'{arch}.{tag}', num_classes=args['num_classes'])
    model.load_state_dict(clean_state_dict(saved.get('state_dict_ema', saved['state_dict'])))

    folder = out / f'{arch}.{tag}'
    out.mkdir(parents=True, exist_ok=True)
    temp = Path(tempfile.mkdtemp(dir=out, prefix=f'.{folder.name}-'))
    old = temp.with_name(f'{temp.name}.old')
    try:
        save_for_hf(
            model,
            temp,
            model_config=dict(label_names=data.classes),
            data_config={k: args[k] for k in ('mean', 'std') if args[k]},
            safe_serialization=True,
        )
        source = dict(timm_poolattn=__version__, git_commit=git_commit())
        weights = seal(temp / 'model.safetensors', dict(format='pt', architecture=arch, tag=tag, **source))
        written = create_model(f'local-dir:{temp}', pretrained=True)
        test = evaluate(written, data)
        curve = read_summary(run_dir)
        best = max(curve, key=lambda row: row.get('eval_top1', 0.0))  # --val-interval leaves epochs out
        results = dict(
            model=arch,
            tag=tag,
            gate=written.gate,
            parameters=sum(p.numel() for p in written.parameters()),
            multiply_adds=multiply_adds(written),
            weights=weights,
            checkpoint=dict(which=checkpoint, epoch=saved['epoch'], ema='state_dict_ema' in saved),
            released_by=source,
            test=test,
            epochs=int(curve[-1]['epoch']) + 1,  # --val-interval leaves some out of the curve
            last_epoch_top1=curve[-1]['eval_top1'],
            best_top1=best['eval_top1'],
            best_epoch=int(best['epoch']),
            **json.loads((run_dir / 'run.json').read_text()),
            curve=curve,
        )
        (temp / 'results.json').write_text(json.dumps(results, indent=2) + '\n')
        write_texts(temp, results)
        os.chmod(temp, 0o755)  # mkdtemp and safetensors leave theirs to the user alone
        os.chmod(temp / 'model.safetensors', 0o644)
        if folder.exists():
            os.replace(folder, old)
        os.replace(temp, folder)
    finally:
        for leftover in (temp, old):
            shutil.rmtree(leftover, ignore_errors=True)
    return folder


def write_texts(folder: Path, results: dict[str, Any]) -> None:
    """The card and the Hub's evaluation result, from results.json alone."""
    entries = yaml.safe_dump(eval_result_entries_to_yaml([eval_result(results)]), sort_keys=False)
    for name, text in (('README.md', str(model_card(results))), (f'.eval_results/{results["tag"]}.yaml', entries)):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        temp = folder.with_name(f'{folder.name}.tmp')  # beside it: the folder never holds anything else
        temp.write_text(text)
        os.replace(temp, path)


def git_commit() -> str:
    """HEAD of the checkout that the package lies in, with `-dirty` where its code differs; '' outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / '.git').exists():
        return ''

    def git(*args: str) -> str:
        return subprocess.run(['git', '-C', root, *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git('rev-parse', 'HEAD') + ('-dirty' if git('status', '--porcelain', '--', 'timm_poolattn') else '')
    except (OSError, subprocess.CalledProcessError):
        return ''


def seal(path: Path, metadata: dict[str, str]) -> dict[str, str]:
    """Put `metadata` and `data_sha256` into the header of a safetensors file; returns its `sha256` and `data_sha256`.

    In this order, so that the same weights are the same file: safetensors' own order of metadata varies.
    """
    file, data_hash = path.read_bytes(), data_sha256(path)
    size = int.from_bytes(file[:8], 'little')
    tensors = json.loads(file[8 : 8 + size])
    header = {**tensors, '__metadata__': {**metadata, 'data_sha256': data_hash}}
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    file = len(text).to_bytes(8, 'little') + text + file[8 + size :]
    path.write_bytes(file)
    return dict(sha256=hashlib.sha256(file).hexdigest(), data_sha256=data_hash)
