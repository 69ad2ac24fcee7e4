"""From a training run to a release folder: the Hub repository, byte for byte."""

import hashlib
import json
import logging
import math
import re
import subprocess
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from huggingface_hub import eval_result_entries_to_yaml
from timm.models import create_model
from torch import nn
from torch.nn import functional as F

from ..data import ImageData
from ..data.listing import TRAIN_SPLITS
from ..inference import evaluate, evaluation_loader
from ..models import FAMILIES, data_sha256, multiply_adds, save_model
from ..papers import DATASETS
from ..training.runs import CHECKPOINTS, read_run
from ..utils import MissingFileError, UserError, hub_configs_dir, look_up, progress, replacing, require, write_text
from ..version import __version__
from .card import eval_result, model_card
from .onnx_files import NEEDED, write_onnx
from .verification import CONFIG_ARGS, check_labels

_logger = logging.getLogger(__name__)


def release(
    run_dir: str | Path,
    tag: str,
    *,
    checkpoint: str = 'last',
    data_dir: str | Path | None = None,
    out: Path | None = None,
    onnx: bool = False,
    replace: bool = False,
) -> Path:
    """Lay out `<model>.<tag>/` from a run of `poolattn train`.

    The folder holds config.json and model.safetensors (timm's save_for_hf), results.json, the model card README.md and
    `.eval_results/`. The metadata of model.safetensors names the architecture, the package's version, the git commit of
    its checkout and `data_sha256`, the SHA-256 of all bytes behind the header: a file cannot hold its own hash.
    results.json has the SHA-256 of the whole file, and accuracy as measured on the written folder, as is
    `without_gradient`: parameters that got none from any of the images, of which a warning is given. An existing folder
    of the same weights is replaced once the new one is whole.

    Args:
        run_dir: output folder of the run.
        tag: the training data: one of `DATASETS`, or a word of one's own, of small letters, digits, _ and -.
        checkpoint: 'last', or 'best' on the test set, which flatters its accuracy there. Of either, the exponential
            moving average where the run kept one.
        data_dir: the data to evaluate on. Default: the run's own.
        out: where the folder goes. Default: `hub_configs/` of the checkout.
        onnx: add `onnx/model.onnx`, and `onnx/model_quantized.onnx` in 8 bits where that costs at most 0.5 points of
            top-1. results.json has the figures of both.
        replace: put these weights into the place of others.

    Raises:
        MissingFileError: no finished run in `run_dir`.
        UserError: no `out` and no checkout, a bad tag, an unknown checkpoint, a network that is not its name's, data
            that are not the run's or the tag's, a folder that holds other weights, or a place that cannot be written
            to.
    """
    if out is None and (hub_configs_dir().parent / '__init__.py').is_file():
        raise UserError('no checkout here, and an installed package keeps its weights: --out names a folder')
    run_dir, out = Path(run_dir), out or hub_configs_dir()
    if not re.fullmatch('[a-z0-9_-]+', tag):
        raise UserError(f'tag {tag!r}: small letters, digits, _ and - make one up; {", ".join(DATASETS)} are taken')
    if onnx:
        require('onnx', *NEEDED)
    run = read_run(run_dir)
    look_up('checkpoint', checkpoint, CHECKPOINTS)
    for file in ('run.json', 'summary.csv', CHECKPOINTS[checkpoint]):
        if not (run_dir / file).is_file():
            raise MissingFileError(f'{run_dir}: no {file}; is it the output folder of a finished `poolattn train`?')
    arch, kwargs = run.untrained_model().pretrained_cfg['architecture'], run.args.get('model_kwargs') or {}
    look_up('model', arch, timm.list_models(module=FAMILIES), f'{run_dir}: a release is of one of our models')
    own = timm.model_entrypoint(arch).model_args
    allowed = {**own, **{k: kwargs.get(k) for k in CONFIG_ARGS}}
    if differing := {k: v for k, v in kwargs.items() if k not in allowed or v != allowed[k]}:
        raise UserError(f'{run_dir}: trained with --model-kwargs {differing}, which is another network than {arch}')
    if (run.args.get('val_split') or 'validation') in (*TRAIN_SPLITS, run.args.get('train_split')):
        raise UserError(
            f'{run_dir}: evaluated on {run.args["val_split"]}, which is for training; train with --val-split test'
        )
    saved, model = run.read_checkpoint(checkpoint), run.build_model(checkpoint)
    curve = [{k: v for k, v in row.items() if math.isfinite(v)} for row in run.curve]  # of which JSON has no others
    if curve and checkpoint == 'last' and saved['epoch'] < curve[-1]['epoch']:
        raise UserError(
            f'{run_dir}: {CHECKPOINTS[checkpoint]} is of epoch {saved["epoch"]}, summary.csv ends with'
            f' {curve[-1]["epoch"]:.0f}: two runs share the folder, or one was cut short; train into another folder'
        )
    if not any('eval_top1' in row for row in curve):  # --val-interval leaves epochs out
        raise UserError(
            f'{run_dir}: summary.csv has no evaluated epoch; train with a --val-split, for more epochs or with'
            f' --val-interval 1'
        )
    chosen_by = run.args.get('eval_metric') or 'top1'
    if checkpoint == 'last' and 'metric' in saved and saved['epoch'] > curve[-1]['epoch']:
        # its row was lost; the checkpoint has its accuracy too
        curve = [*curve, {'epoch': float(saved['epoch']), f'eval_{chosen_by}': saved['metric']}]
    evaluated = [row for row in curve if 'eval_top1' in row]
    best = max(evaluated, key=lambda row: row['eval_top1'])
    if checkpoint == 'best' and chosen_by == 'top1' and saved['epoch'] != best['epoch']:
        raise UserError(
            f'{run_dir}: {CHECKPOINTS["best"]} is of epoch {saved["epoch"]}, and epoch {best["epoch"]:.0f} did best: a'
            f' resume lost it; release the last epoch'
        )
    model.pretrained_cfg['tag'] = tag
    config, data = run.data_config(model), run.load_data(model, data_dir)
    _check_fit(run_dir, tag, model.num_classes, config, data.classes)

    folder = out / f'{arch}.{tag}'
    with replacing(folder) as temp:
        save_model(model, temp, data.classes, config)
        source = dict(timm_poolattn=__version__, git_commit=git_commit())
        weights = seal(temp / 'model.safetensors', dict(format='pt', architecture=arch, tag=tag, **source))
        if not replace:
            _check_same(folder, weights['data_sha256'])
        written = create_model(f'local-dir:{temp}', pretrained=True)
        test = evaluate(written, data)
        _compare(run_dir, test, next((row for row in evaluated if row['epoch'] == saved['epoch']), None))
        if silent := without_gradient(written, data):
            _logger.warning(
                f'{run_dir}: none of {len(data)} images gives a gradient to {", ".join(silent)}; fine-tuning may not'
                ' move them'
            )
        results = dict(
            model=arch,
            tag=tag,
            gate=written.gate,
            parameters=sum(p.numel() for p in written.parameters()),
            multiply_adds=multiply_adds(written),
            weights=weights,
            checkpoint=dict(which=checkpoint, epoch=saved['epoch'], ema=run.has_ema(saved)),
            released_by=source,
            test=test,
            without_gradient=silent,
            **(dict(onnx=write_onnx(written, temp, data, test['top1'])) if onnx else {}),
            epochs=int(curve[-1]['epoch']) + 1,
            last_epoch_top1=evaluated[-1]['eval_top1'],
            best_top1=best['eval_top1'],
            best_epoch=int(best['epoch']),
            **{k: v for k, v in run.record.items() if k not in ('classes', 'ended')},  # config.json has the classes
            curve=curve,
        )
        (temp / 'results.json').write_text(json.dumps(results, indent=2) + '\n')
        write_texts(temp, results)
    return folder


def _check_fit(run_dir: Path, tag: str, num_classes: int, config: dict[str, Any], classes: list[str]) -> None:
    """Refuse a run whose classes, image size or data are not those of its tag."""
    if len(classes) != num_classes:
        raise UserError(f'{run_dir}: a model of {num_classes} classes, and the data have {len(classes)}: not its data')
    check_labels(classes, run_dir)
    if tag not in DATASETS:
        return
    facts, own = DATASETS[tag], 'choose a tag of your own, as in --tag photos'
    if num_classes != facts['num_classes'] or classes != facts.get('classes', classes):
        raise UserError(f'{run_dir}: its {num_classes} classes ({classes[0]}, ...) are not those of {tag}; {own}')
    if tuple(config['input_size']) != facts['input_size']:
        raise UserError(f'{run_dir}: images of {config["input_size"]}, {tag} has {facts["input_size"]}; {own}')


def _check_same(folder: Path, sha256: str) -> None:
    """Refuse a folder that holds other weights than those whose `data_sha256` this is."""
    weights = folder / 'model.safetensors'
    if not weights.is_file() or data_sha256(weights) == sha256:
        return
    try:
        there = json.loads((folder / 'results.json').read_text(encoding='utf-8'))
        said = f' ({there["test"]["top1"]:.2f}% top-1, {there["epochs"]} epochs, seed {there["seed"]})'
    except (OSError, ValueError, KeyError, TypeError):  # of another version, cut, or not there
        said = ''
    raise UserError(
        f'{folder}: holds other weights{said}; --replace puts these in their place, --out names another folder'
    )


def _compare(run_dir: Path, test: dict[str, float], row: dict[str, float] | None) -> None:
    """Say where an accuracy is not the run's but for rounding, which it may have evaluated in 16 bits."""
    if row and abs(test['top1'] - row['eval_top1']) / 100 * test['images'] > 3 + 0.02 * test['images']:
        _logger.warning(
            f'{run_dir}: the run says {row["eval_top1"]:.2f}% of epoch {row["epoch"]:.0f}, and {test["top1"]:.2f}% is'
            ' measured and released: args.yaml, run.json or the data may not be those that it was trained with'
        )


def without_gradient(model: nn.Module, data: ImageData) -> list[str]:
    """Name the parameters to which no image of `data` gives a gradient, in evaluation mode.

    They are mostly those of a gate whose hidden units are behind a ReLU that is 0 for all images, so that it is a
    constant. Before the first step they are also those of a gate whose scale starts at 0, as p of SPEM.

    Args:
        model: whose parameters are all trainable.
        data: as `evaluate` takes it.
    """
    left = dict(model.eval().named_parameters())
    for input, target in progress(evaluation_loader(model, data, batch_size=32), desc='gradients', unit='batch'):
        loss = F.cross_entropy(model(input), target)
        gradients = torch.autograd.grad(loss, list(left.values()))
        left = {name: p for (name, p), g in zip(left.items(), gradients, strict=True) if not g.any()}
        if not left:
            break
    return [*left]


def write_texts(folder: Path, results: dict[str, Any]) -> None:
    """Write the card and, for the papers' data sets, the Hub's evaluation result, from results.json alone."""
    write_text(folder / 'README.md', str(model_card(results)))
    if results['tag'] in DATASETS:
        entries = yaml.safe_dump(eval_result_entries_to_yaml([eval_result(results)]), sort_keys=False)
        write_text(folder / '.eval_results' / f'{results["tag"]}.yaml', entries)


def git_commit() -> str:
    """Return HEAD of the package's checkout, with `-dirty` where its code differs; '' outside a checkout."""
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
