"""What a release says of itself: the model card and the Hub's evaluation result, from results.json alone."""

from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData

from ..models import hub_configs_dir, hub_org
from ..papers import paper_top1

#: What a card says of a gate, in two sentences.
GATE_NOTES = dict(
    se='SE scales each channel by a sigmoid gate. Two linear layers compute it from the global averages of all'
    ' channels.',
    se2='SE2 scales each channel by a sigmoid gate. Two linear layers, shared by global average and maximum, compute it'
    ' from their sum.',
    cbam='CBAM scales channels by a gate computed from their global average and maximum. A second gate, one convolution'
    ' over the mean and maximum of the channels, then scales positions.',
    eca='ECA scales each channel by a sigmoid gate. One small convolution across neighbouring channels computes it from'
    ' their global averages.',
    srm="SRM scales each channel by a sigmoid gate. It is computed from the channel's own mean and standard deviation.",
    sge='SGE scales positions by a gate, one map for each group of channels. A map is the similarity of each position'
    " to the group's global average.",
    spem='SPEM pools each channel by a learned mix of its global maximum and minimum, lambda to 1 - lambda. Two'
    ' per-channel affine gates, one on that mix and one on maximum and minimum together, scale the channel.',
    saam='SAAM pools each channel by a weighted sum over positions, whose weights a 5x5 convolution scores from the'
    ' image itself. Two linear layers turn the pooled values into the gate that scales the channels.',
    fa='FA weights what each residual block, and each stage, changes of its input by one scalar an image. The scalar is'
    ' computed from the input of the block (focus) and the scalars of the blocks before it (association).',
)
GATE_NOTES['saam2'] = f'{GATE_NOTES["saam"][:-1]}; two score maps are summed.'
GATE_NOTES['saam4'] = f'{GATE_NOTES["saam"][:-1]}; four score maps are summed.'
GATE_NOTES['fase'] = f'{GATE_NOTES["fa"][:-1]}; inside the blocks, SE scales the channels.'

#: By tag: the name that a reader knows, and the Hub's id.
_DATA_SETS = dict(
    cifar10=('CIFAR-10', 'uoft-cs/cifar10'),
    cifar100=('CIFAR-100', 'uoft-cs/cifar100'),
    tiny_imagenet=('Tiny ImageNet', 'zh-plus/tiny-imagenet'),
)


def eval_result(results: dict[str, Any]) -> EvalResultEntry:
    """The top-1 accuracy of a release as the Hub's `.eval_results/*.yaml` has it."""
    return EvalResultEntry(
        dataset_id=_DATA_SETS[results['tag']][1],
        task_id='default',
        value=results['test']['top1'],
        notes=f'top-1 accuracy in % on {results["test"]["images"]} test images, single view',
    )


def _citation(gate: str | None) -> str:
    """BibTeX of the gate's paper, where CITATION.cff has it."""
    references = yaml.safe_load((hub_configs_dir().parent / 'CITATION.cff').read_text())['references']
    paper = dict(fase='fa').get(gate, (gate or '').rstrip('24'))
    for reference in references:
        if reference['notes'].lower() == paper:
            authors = ' and '.join(f'{a["family-names"]}, {a["given-names"]}' for a in reference['authors'])
            fields = f'  title = {{{reference["title"]}}},\n  author = {{{authors}}}'
            return f'\n```bibtex\n@{reference["type"]}{{{paper},\n{fields}\n}}\n```\n'
    return ''


def _yaml(arguments: dict[str, Any]) -> str:
    return f'```yaml\n{yaml.safe_dump(arguments, default_flow_style=False).strip()}\n```'


def _flags(options: dict[str, Any]) -> str:
    """Options of `poolattn train` as it takes them."""
    flags = []
    for name, value in options.items():
        name = name.replace('_', '-')
        if isinstance(value, bool):
            flags.append(f'--{name}' if value else f'--no-{name}')
        elif value is not None:
            flags.append(f'--{name} {value}')
    return ' '.join(flags)


def model_card(results: dict[str, Any]) -> ModelCard:
    """The model card of a release, from its results.json alone."""
    arch, tag, gate, test = results['model'], results['tag'], results['gate'], results['test']
    data_name, data_id = _DATA_SETS.get(tag, (tag, tag))  # one's own data have no id on the Hub
    name = f'{arch}.{tag}'
    card = ModelCardData(
        license='apache-2.0',
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm_poolattn'],
        datasets=[data_id] if tag in _DATA_SETS else None,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type='image-classification',
                dataset_type=data_id,
                dataset_name=data_name,
                dataset_split='test',
                metric_type='accuracy',
                metric_name='Top-1 accuracy (%)',
                metric_value=test['top1'],
            )
        ],
    )
    paper = paper_top1(arch, tag)
    chosen = dict(
        last='The weights are those of the last epoch',
        best='The weights are those of the epoch that did best on these test images, which flatters the accuracy,',
    )[results['checkpoint']['which']]
    average = ' (the exponential moving average)' if results['checkpoint']['ema'] else ''
    versions = ', '.join(f'{k} {v}' for k, v in results['versions'].items())
    recipe = f'The recipe is `{results["recipe"]}`. ' if 'recipe' in results else ''
    bfloat16 = ' with bfloat16' if results['arguments'].get('amp_dtype') == 'bfloat16' else ''
    start = results['arguments'].get('initial_checkpoint')
    if 'warm_start' in results:
        start = f'{start}`, made by `poolattn warm-start {results["warm_start"]} -o {start}'
    start = f'The first weights are those of `{start}`.\n\n' if start else ''
    afters = (
        f' after {run["after_epochs"]} epochs' if 'after_epochs' in run else '' for run in results.get('resumed', [])
    )
    resumed = ''.join(
        f'Resumed{next(afters)}, with the test accuracy up to there known, from a run with\n\n'
        f'{_yaml(run["arguments"])}\n\n'
        for run in results.get('resumed', [])
    )
    return ModelCard(f"""---
{card.to_yaml()}
---
# {name}

{arch} trained on {data_name}. {GATE_NOTES[gate] if gate else 'It has no gate: a baseline of the papers.'}

| top-1 (%) | paper's top-1 (%) | top-5 (%) | loss | calibration error (%) | parameters | multiply-adds |
|---|---|---|---|---|---|---|
| {test['top1']:.2f} | {f'{paper:.2f}' if paper else ''} | {test['top5']:.2f} | {test['loss']:.4f} | {test['ece']:.2f} \
| {results['parameters']:,} | {results['multiply_adds']:,} |

Measured on these very files and {test['images']:,} test images, single view. {chosen} of one run{average}: epoch
{results['checkpoint']['epoch'] + 1} of {results['epochs']}, seed {results['seed']}.

## Use

```bash
pip install timm_poolattn
```

```python
import timm
import timm_poolattn  # registers the models

model = timm.create_model('{name}', pretrained=True)
model = timm.create_model('hf-hub:{hub_org()}/{name}', pretrained=True)
```

With transformers, after the same import:

```python
import timm_poolattn
from transformers import pipeline

pipeline('image-classification', '{hub_org()}/{name}')('photo.png')
```

Without the import, transformers says: "The model architecture '{arch}' is not supported in your version of timm".

## Training

{results['epochs']} epochs in {results['wall_time_s'] / 60:.0f} minutes on {results['hardware']}{bfloat16}; {versions}.
{recipe}All arguments of timm's train.py that are not its defaults, as a `recipe.yaml`:

{_yaml(results['arguments'])}

```bash
poolattn train --config recipe.yaml {_flags(results['options'])} --data-dir DIR
```

{start}{resumed}The curve of every epoch is in results.json.

## Licence and citation

Apache-2.0. CITATION.cff of timm_poolattn cites the package and the papers.
{_citation(gate)}""")
