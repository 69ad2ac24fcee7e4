"""From a training run to a release folder: the Hub repository, byte for byte."""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import create_model, save_for_hf

from ..data import load_images
from ..inference import evaluate
from ..models import DATASETS, hub_configs_dir
from ..papers import table_rows
from ..training import read_summary

#: What a card says of a gate, in two sentences at most.
GATE_NOTES = dict(
    spem='SPEM scales each channel by a gate computed from a learned mix of its global maximum and minimum.',
    saam='SAAM scales each channel by a gate whose pooling weights positions by a learned, input-dependent score map.',
    fa='FA weights each residual block, and each stage, by a scalar computed from the input of the block and the'
    ' weights of the blocks before it.',
)
_DATA_NAMES = dict(cifar10='CIFAR-10', cifar100='CIFAR-100', tiny_imagenet='Tiny ImageNet')


def release(run_dir: str | Path, tag: str, *, data_dir: str | Path | None = None, out: Path | None = None) -> Path:
    """Lay out `<arch>.<tag>/` from the last checkpoint of a run of `poolattn train`.

    The folder holds config.json and model.safetensors (timm's save_for_hf), results.json and the model card
    README.md. The accuracy in them is measured on the written folder. An existing folder of the name is replaced
    once the new one is whole.

    Args:
        run_dir: output folder of the run.
        tag: the training data, one of `DATASETS`.
        data_dir: the data to evaluate on. Default: the run's own.
        out: where the folder goes. Default: `hub_configs/`.

    Raises:
        FileNotFoundError: no finished run in `run_dir`.
        ValueError: an unknown tag.
    """
    run_dir, out = Path(run_dir), out or hub_configs_dir()
    if tag not in DATASETS:
        raise ValueError(f'unknown tag {tag!r}; choose from {", ".join(DATASETS)}')
    for name in ('args.yaml', 'run.json', 'summary.csv', 'last.pth.tar'):
        if not (run_dir / name).is_file():
            raise FileNotFoundError(f'{run_dir}: no {name}; is it the output folder of a finished `poolattn train`?')
    args = yaml.safe_load((run_dir / 'args.yaml').read_text())
    arch = args['model'].split('.')[0]
    data = load_images(data_dir or args['data_dir'], args['val_split'], name=args['dataset'])

    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(run_dir / 'last.pth.tar', map_location='cpu', weights_only=True)
    model = create_model(f'{arch}.{tag}', num_classes=args['num_classes'], **args['model_kwargs'])
    model.load_state_dict(checkpoint.get('state_dict_ema', checkpoint['state_dict']))

    folder = out / f'{arch}.{tag}'
    out.mkdir(parents=True, exist_ok=True)
    temp = Path(tempfile.mkdtemp(dir=out, prefix=f'.{folder.name}-'))
    old = temp.with_suffix('.old')
    try:
        save_for_hf(
            model,
            temp,
            model_config=dict(label_names=data.classes),
            data_config={k: args[k] for k in ('mean', 'std') if args[k]},
            safe_serialization=True,
        )
        written = create_model(f'local-dir:{temp}', pretrained=True)
        results = _results(run_dir, arch, tag, written, evaluate(written, data))
        (temp / 'results.json').write_text(json.dumps(results, indent=2) + '\n')
        model_card(results).save(temp / 'README.md')
        os.chmod(temp, 0o755)  # mkdtemp and safetensors leave theirs to the user alone
        os.chmod(temp / 'model.safetensors', 0o644)
        if folder.exists():
            os.replace(folder, old)
        os.replace(temp, folder)
    finally:
        for leftover in (temp, old):
            shutil.rmtree(leftover, ignore_errors=True)
    return folder


def _results(run_dir: Path, arch: str, tag: str, model: torch.nn.Module, measured: dict[str, float]) -> dict[str, Any]:
    curve = read_summary(run_dir)
    best = max(curve, key=lambda row: row['eval_top1'])
    return dict(
        model=arch,
        tag=tag,
        parameters=sum(p.numel() for p in model.parameters()),
        test=measured,
        epochs=len(curve),
        last_epoch_top1=curve[-1]['eval_top1'],
        best_top1=best['eval_top1'],
        best_epoch=int(best['epoch']),
        **json.loads((run_dir / 'run.json').read_text()),
        curve=curve,
    )


def paper_top1(arch: str, dataset: str) -> float | None:
    """Top-1 accuracy in % that the model's own paper prints for it, if any."""
    for row in table_rows():
        if row['model'] == arch and row['dataset'] == dataset and row.get('variant') is None:
            if 'top1' in row:
                return row['top1']
            if 'top1_err' in row:
                return round(100 - row['top1_err'], 4)
    return None


def _resumed(results: dict[str, Any]) -> str:
    """What a card says of a run that was resumed with other arguments."""
    before = (yaml.safe_dump(run['arguments'], default_flow_style=False) for run in results.get('resumed', []))
    return ''.join(
        f'Resumed, with the test accuracy up to there known, from a run with\n\n```yaml\n{arguments.strip()}\n```\n\n'
        for arguments in before
    )


def model_card(results: dict[str, Any]) -> ModelCard:
    """The model card of a release, from its results.json alone."""
    arch, tag, test = results['model'], results['tag'], results['test']
    gate, data_name = arch.partition('_')[2], _DATA_NAMES[tag]
    card = ModelCardData(
        license='apache-2.0',
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm_poolattn'],
        datasets=[tag],
        model_name=f'{arch}.{tag}',
        eval_results=[
            EvalResult(
                task_type='image-classification',
                dataset_type=tag,
                dataset_name=data_name,
                dataset_split='test',
                metric_type='accuracy',
                metric_name='Top-1 accuracy (%)',
                metric_value=test['top1'],
            )
        ],
    )
    paper = paper_top1(arch, tag)
    paper = f'{paper:.2f}' if paper else ''
    versions = ', '.join(f'{k} {v}' for k, v in results['versions'].items())
    return ModelCard(f"""---
{card.to_yaml()}
---
# {arch}.{tag}

{arch} trained on {data_name}. {GATE_NOTES.get(gate, '')}

| top-1 | top-5 | test images | parameters | paper's top-1 |
|---|---|---|---|---|
| {test['top1']:.2f} | {test['top5']:.2f} | {test['images']} | {results['parameters']:,} | {paper} |

The weights are those of the last epoch of one run (seed {results['seed']}).

```python
import timm, timm_poolattn
model = timm.create_model('{arch}.{tag}', pretrained=True)
```

## Training

{results['epochs']} epochs in {results['wall_time_s'] / 60:.0f} minutes on {results['hardware']}; {versions}.
Arguments of timm's train.py that are not its defaults, and options of `poolattn train`:

```yaml
{yaml.safe_dump(results['arguments'], default_flow_style=False).strip()}
# poolattn train
{yaml.safe_dump(results['options'], default_flow_style=False).strip()}
```

{_resumed(results)}The curve of every epoch is in results.json.

## Licence and citation

Apache-2.0. CITATION.cff of timm_poolattn cites the package and the papers.
""")
