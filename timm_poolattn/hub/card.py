"""What a release says of itself: the model card and the Hub's evaluation result, from results.json alone."""

import os
from importlib.resources import files
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData

from ..models import hub_org, paper_top1
from ..papers import DATASETS
from ..training import teachers_of
from ..utils import HUB_ORG, hub_configs_dir

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


def eval_result(results: dict[str, Any]) -> EvalResultEntry:
    """Return the top-1 accuracy of a release as the Hub's `.eval_results/*.yaml` has it."""
    return EvalResultEntry(
        dataset_id=DATASETS[results['tag']]['hub_id'],
        task_id='default',
        value=results['test']['top1'],
        notes=f'top-1 accuracy in % on {results["test"]["images"]} test images, single view',
    )


def _citation(gate: str | None) -> str:
    """Return BibTeX of the gate's paper, where CITATION.cff has it."""
    references = yaml.safe_load((hub_configs_dir().parent / 'CITATION.cff').read_text())['references']
    paper = dict(fase='fa').get(gate, (gate or '').rstrip('24'))
    for reference in references:
        if reference['notes'].lower() == paper:
            authors = ' and '.join(f'{a["family-names"]}, {a["given-names"]}' for a in reference['authors'])
            fields = f'  title = {{{reference["title"]}}},\n  author = {{{authors}}}'
            return f'@{reference["type"]}{{{paper},\n{fields}\n}}'
    return ''


def _yaml(arguments: dict[str, Any]) -> str:
    return yaml.safe_dump(arguments, default_flow_style=False).strip()


def _flags(options: dict[str, Any]) -> str:
    """Write options of `poolattn train` as it takes them."""
    flags = []
    for name, value in options.items():
        name = name.replace('_', '-')
        if isinstance(value, bool):
            flags.append(f'--{name}' if value else f'--no-{name}')
        elif value is not None:
            flags += [f'--{name} {item}' for item in (value if isinstance(value, list) else [value])]
    return ' '.join(flags)


def metadata(results: dict[str, Any]) -> ModelCardData:
    """Return what the Hub reads of a card: the block at its top."""
    tag = results['tag']
    facts = DATASETS.get(tag, dict(title=tag, hub_id=tag))  # one's own data have no id on the Hub
    return ModelCardData(
        license='apache-2.0',
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm_poolattn'],
        datasets=[facts['hub_id']] if tag in DATASETS else None,
        model_name=f'{results["model"]}.{tag}',
        eval_results=[
            EvalResult(
                task_type='image-classification',
                dataset_type=facts['hub_id'],
                dataset_name=facts['title'],
                dataset_split='test' if tag in DATASETS else results['arguments'].get('val_split') or 'validation',
                metric_type='accuracy',
                metric_name='Top-1 accuracy (%)',
                metric_value=results['test']['top1'],
            )
        ],
    )


def figures(results: dict[str, Any]) -> str:
    """Return the row of a card's table."""
    test, paper = results['test'], paper_top1(results['model'], results['tag'])
    cells = [f'{test["top1"]:.2f}', f'{paper:.2f}' if paper else '', f'{test["top5"]:.2f}', f'{test["loss"]:.4f}']
    cells += [f'{test["ece"]:.2f}', f'{results["parameters"]:,}', f'{results["multiply_adds"]:,}']
    return f'| {" | ".join(cells)} |'


def model_card(results: dict[str, Any]) -> ModelCard:
    """Write the model card of a release, from its results.json alone."""
    gate, tag = results['gate'], results['tag']
    ours = tag in DATASETS or HUB_ORG in os.environ
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters['yaml'] = _yaml
    template = environment.from_string((files(__package__) / 'card.md.jinja').read_text('utf-8'))
    return ModelCard(
        template.render(
            r=results,
            name=f'{results["model"]}.{tag}',
            metadata=metadata(results).to_yaml(),
            named=tag in DATASETS and HUB_ORG not in os.environ,
            is_test=tag in DATASETS,
            org=hub_org() if ours else 'ORG',
            data_name=DATASETS[tag]['title'] if tag in DATASETS else tag,
            note=GATE_NOTES[gate] if gate else 'It has no gate: a baseline of the papers.',
            row=figures(results),
            versions=', '.join(f'{k} {v}' for k, v in results['versions'].items()),
            teachers=teachers_of(results),
            flags=_flags(results['options']),
            citation=_citation(gate),
            onnx=results.get('onnx'),
        )
    )
