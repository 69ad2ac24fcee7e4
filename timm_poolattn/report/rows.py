"""How we stand beside the papers: every row of their tables with what our runs measured."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any

import yaml

from ..bench.backbones import plain_args
from ..models import architecture
from ..papers import DATASETS, model_args, row_top1, table_rows
from ..training import recipes, teachers_of
from .counts import look_up_count
from .results import released_results

_PAPERS = dict(spem='SPEM', saam='SAAM', fa='FA')
#: train.py's names of what makes another network, by create_model's.
_OPTIONS = dict(num_classes='num_classes', in_chans='in_chans', global_pool='gp')
#: ImageNet-5 is the FA paper's, Sec. IV-D, and no model's tag.
_DATASETS = dict(DATASETS, imagenet5=dict(title='ImageNet-5', train_images=5 * 1040))


def _run_args(result: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of timm.create_model for the model of a run, those that make it another network."""
    given = result['arguments']
    options = {ours: given[theirs] for ours, theirs in _OPTIONS.items() if theirs in given}
    return dict(model_name=f'{result["model"]}.{result["tag"]}', **options, **given.get('model_kwargs', {}))


def results_of(args: dict[str, Any], results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return those of `results` whose model is the one that timm.create_model(**args) builds, whatever trained it."""
    same = [r for r in results if f'{r["model"]}.{r["tag"]}' == args['model_name']]
    if not same:
        return []
    return [r for r in same if architecture(_run_args(r)) == architecture(args)]


def recipe_name(result: dict[str, Any]) -> str:
    """Return the recipe of a run, what its weights started from and what taught it: 'cpu, from resnet20.cifar10'."""
    source = result.get('warm_start', '').split()[:1]
    teachers = teachers_of(result)
    taught = [f'taught by {teachers[0] if len(teachers) == 1 else f"{len(teachers)} models"}'] if teachers else []
    return ', '.join([', from '.join([result.get('recipe') or 'own recipe', *source]), *taught])


def start_of(result: dict[str, Any]) -> str:
    """Return what the first weights of a run are: the source of a warm start, or a file; '' for none."""
    source = result.get('warm_start', '').split()[:1] or [result['arguments'].get('initial_checkpoint', '')]
    return source[0]


def training_of(result: dict[str, Any]) -> str:
    """Return what runs share that differ in nothing but their model, seed and first weights."""
    own = ('seed', 'model', 'model_kwargs', 'initial_checkpoint')
    arguments = {k: v for k, v in result['arguments'].items() if k not in own}
    which = result.get('checkpoint', {}).get('which')
    how = [result.get('recipe'), bool(start_of(result)), arguments, result['options'], which]
    compared = ('arguments', 'options', 'teacher_weights')
    changed = [
        part for part in result.get('resumed', []) if any(part[k] != result.get(k) for k in compared if k in part)
    ]
    processes = result.get('hardware', '').rpartition(' processes,')[0]  # each has a batch of its own
    how += [result.get('teacher_weights'), changed, processes, result['test'].get('images'), result['epochs']]
    return json.dumps(how, sort_keys=True)


def _top1(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return mean, spread and number of runs that differ in their seed alone."""
    top1 = [r['test']['top1'] for r in runs]
    spread = round(statistics.stdev(top1), 2) if len(top1) > 1 else None
    return dict(top1=round(statistics.mean(top1), 2), spread=spread, runs=len(runs))


def _error(*groups: Sequence[dict[str, Any]]) -> float | None:
    """Return the standard error of the difference of two groups' means; None where one of them is a single run."""
    top1 = [[r['test']['top1'] for r in runs] for runs in groups]
    if min(map(len, top1)) < 2:
        return None
    return round(math.sqrt(sum(statistics.variance(values) / len(values) for values in top1)), 2)


def measured_runs(args: dict[str, Any], results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what was measured of a model: runs that differ only in their seed as one entry, longest training first.

    Args:
        args: of timm.create_model.
        results: of all runs.

    Returns:
        For each `top1`, `spread` (standard deviation over them; None for one), `runs`, `epochs`, `recipe`,
        `selected` (the best epoch's weights), `hardware`, `minutes`, `model`, `is_released` (its model card is that of
        one of these runs), and `gain`: how far it is above the backbone without its gates, trained alike; `difference`,
        `error` (its standard error; None for one run), and `plain_runs`. None where that was not run.
    """
    groups = defaultdict(list)
    for r in results_of(args, results):
        groups[training_of(r), start_of(r)].append(r)
    plain = defaultdict(list)
    if groups and (backbone := _plain_of(args)):
        for r in results_of(backbone, results):
            plain[training_of(r)].append(r)
    released = released_results() if groups else {}
    measured = []
    for (training, _), runs in groups.items():
        first = runs[0]
        model = f'{first["model"]}.{first["tag"]}'
        entry = dict(
            **_top1(runs),
            epochs=first['epochs'],
            recipe=recipe_name(first),
            selected=first.get('checkpoint', {}).get('which') == 'best',
            hardware=first['hardware'],
            minutes=round(statistics.mean(r['wall_time_s'] for r in runs) / 60),
            model=model,
            is_released=released.get(model) in runs,
            gain=None,
        )
        if plain[training]:
            other = _top1(plain[training])
            difference, error = round(entry['top1'] - other['top1'], 2), _error(runs, plain[training])
            entry['gain'] = dict(difference=difference, error=error, plain_runs=other['runs'])
        measured.append(entry)
    return sorted(measured, key=lambda m: (-m['epochs'], -m['runs']))


def _plain_of(args: dict[str, Any]) -> dict[str, Any] | None:
    """Return arguments of the backbone of `args` without its gates; None for one that has none."""
    plain = plain_args(args['model_name'])
    if plain['model_name'] == args['model_name']:
        return None
    return {**plain, **({'flavour': args['flavour']} if 'flavour' in args else {})}


def _paper_parameters(row: dict[str, Any]) -> str:
    """Return millions, as printed."""
    if 'params_k_with_bn_stats' in row:
        return f'{row["params_k_with_bn_stats"] / 1000:g} with BN statistics'
    return f'{row["params_m"]:g}' if 'params_m' in row else ''


def training_rate(results: Sequence[dict[str, Any]]) -> tuple[float, str]:
    """Return the multiply-adds of the forward pass that training gets through in a second, evaluation included.

    Returns:
        The median over the runs on the hardware with the most of them, and that hardware; (0, '') without runs.
    """
    rates = defaultdict(list)
    for r in results:
        if r['tag'] in DATASETS and r['wall_time_s']:
            images = DATASETS[r['tag']]['train_images'] * r['epochs']
            rates[r['hardware']].append(r['multiply_adds'] * images / r['wall_time_s'])
    hardware = max(rates, key=lambda name: len(rates[name]), default='')
    return (statistics.median(rates[hardware]) if rates else 0.0), hardware


def _recipe(row: dict[str, Any]) -> str:
    """Return the paper's own for the data set."""
    return f'{row["paper"]}-{row["dataset"].replace("_", "-")}'


@cache
def _epochs(recipe: str) -> int:
    return yaml.safe_load(recipes()[recipe].read_text())['epochs']


def _command(args: dict[str, Any], row: dict[str, Any]) -> str:
    parts = [f'poolattn train --recipe {_recipe(row)} --model {args["model_name"]}']
    if 'num_classes' in args:
        parts.append(f'--num-classes {args["num_classes"]}')
    kwargs = {k: args[k] for k in ('flavour', 'gate_kwargs') if k in args}
    if kwargs:
        values = (f"'{v}'" if isinstance(v, str) else str(v) for v in kwargs.values())
        parts.append('--model-kwargs ' + ' '.join(f'"{k}={v}"' for k, v in zip(kwargs, values, strict=True)))
    return ' '.join([*parts, '--data-dir DATA'])


def report_rows(
    results: Sequence[dict[str, Any]], images_per_s: dict[str, float] | None = None
) -> list[dict[str, Any]]:
    """Return every row of the papers' tables with ours beside it.

    Args:
        results: of all runs, as `load_results` reads them.
        images_per_s: at inference, by model.

    Returns:
        For each row `paper`, `table_name`, `dataset`, `model`, `gate`, `variant`, `paper_parameters`, `paper_top1`,
        `parameters`, `multiply_adds` (of one image), `measured` (see `measured_runs`; each with its `difference` to the
        paper), `command` and `estimated_hours` of the paper's own training, and `images_per_s` where benchmarked.
    """
    rate, _ = training_rate(results)
    rows = []
    for row in table_rows():
        args = model_args(row)
        counts = look_up_count(**args)
        paper = row_top1(row)
        measured = measured_runs(args, results)
        for run in measured:
            run['difference'] = None if paper is None else round(run['top1'] - paper, 2)
        images = _DATASETS[row['dataset']]['train_images'] * _epochs(_recipe(row))
        rows.append(
            dict(
                paper=_PAPERS[row['paper']],
                table_name=row['table'] if row['table'].startswith('Fig') else f'Table {row["table"]}',
                dataset=_DATASETS[row['dataset']]['title'],
                model=args['model_name'].split('.')[0],
                gate=counts['gate'] or 'none',
                variant=row.get('variant', ''),
                paper_parameters=_paper_parameters(row),
                paper_top1=paper,
                parameters=counts['parameters'],
                multiply_adds=counts['multiply_adds'],
                measured=measured,
                command=_command(args, row),
                estimated_hours=counts['multiply_adds'] * images / rate / 3600 if rate else None,
                images_per_s=(images_per_s or {}).get(args['model_name'].split('.')[0]),
            )
        )
    return rows
