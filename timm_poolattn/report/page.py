"""How we stand beside the papers: every row of their tables with what our runs measured, as a page and as Markdown."""

import json
import os
import platform
import statistics
from collections import defaultdict
from collections.abc import Sequence
from datetime import date
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import timm
import torch
import yaml
from tqdm import tqdm

from ..models import multiply_adds, released
from ..papers import DATASETS, model_args, table_rows
from ..training import recipes
from ..version import __version__
from .results import load_results

_PAPERS = dict(spem='SPEM', saam='SAAM', fa='FA')
_DATASETS = dict(cifar10='CIFAR-10', cifar100='CIFAR-100', tiny_imagenet='Tiny ImageNet', imagenet5='ImageNet-5')
#: Training images; those of ImageNet-5 are the FA paper's, Sec. V.
_TRAIN_IMAGES = dict(cifar10=50_000, cifar100=50_000, tiny_imagenet=100_000, imagenet5=5 * 1040)


def _create(**args) -> torch.nn.Module:
    return timm.create_model(**args, device='meta')  # no memory, no initialisation


@cache
def _identity(args: str) -> tuple[str, int]:
    """What tells architectures apart: defaults that one place spells out and another does not are the same."""
    model = _create(**json.loads(args))
    return repr(model), sum(p.numel() for p in model.parameters())


def paper_accuracy(row: dict[str, Any]) -> float | None:
    """Top-1 accuracy in % that a row of `table_rows()` prints, as such or as an error; None where it has none."""
    return row['top1'] if 'top1' in row else round(100 - row['top1_err'], 4) if 'top1_err' in row else None


def _difference(measured: list[dict[str, Any]], paper: float | None) -> float | None:
    return round(measured[0]['top1'] - paper, 2) if measured and paper is not None else None


def _paper_parameters(row: dict[str, Any]) -> str:
    """Millions, as printed."""
    if 'params_k_with_bn_stats' in row:
        return f'{row["params_k_with_bn_stats"] / 1000:g} with BN statistics'
    return f'{row["params_m"]:g}' if 'params_m' in row else ''


def matching_results(row: dict[str, Any], results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of `results` whose model is the row's: same data, same architecture, whatever trained it."""
    args = model_args(row)
    same = [r for r in results if f'{r["model"]}.{r["tag"]}' == args['model_name']]
    if not same:
        return []
    own = [dict(model_name=args['model_name'], **r['arguments'].get('model_kwargs', {})) for r in same]
    wanted = _identity(json.dumps(args))
    return [r for r, of_run in zip(same, own, strict=True) if _identity(json.dumps(of_run)) == wanted]


def _measured(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs that differ in nothing but their seed as one entry; the longest training comes first."""
    groups = defaultdict(list)
    for r in results:
        arguments = {k: v for k, v in r['arguments'].items() if k not in ('seed', 'model')}
        groups[json.dumps([arguments, r['options'], r.get('checkpoint', {}).get('which')], sort_keys=True)].append(r)
    measured = []
    for runs in groups.values():
        top1 = [r['test']['top1'] for r in runs]
        name = f'{runs[0]["model"]}.{runs[0]["tag"]}'
        measured.append(
            dict(
                top1=round(statistics.mean(top1), 2),
                spread=round(statistics.stdev(top1), 2) if len(top1) > 1 else None,
                seeds=len({r['seed'] for r in runs}),
                epochs=runs[0]['epochs'],
                recipe=runs[0]['options'].get('recipe'),
                selected=runs[0].get('checkpoint', {}).get('which') == 'best',
                hardware=runs[0]['hardware'],
                minutes=round(statistics.mean(r['wall_time_s'] for r in runs) / 60),
                model=name,
            )
        )
    return sorted(measured, key=lambda m: (-m['epochs'], -m['seeds']))


def training_rate(results: Sequence[dict[str, Any]]) -> tuple[float, str]:
    """Multiply-adds of the forward pass that training gets through in a second, evaluation included.

    Returns:
        The median over the runs on the hardware with the most of them, and that hardware; (0, '') without runs.
    """
    rates = defaultdict(list)
    for r in results:
        if r['tag'] in _TRAIN_IMAGES and r['wall_time_s']:
            macs = multiply_adds(
                _create(model_name=f'{r["model"]}.{r["tag"]}', **r['arguments'].get('model_kwargs', {}))
            )
            rates[r['hardware']].append(macs * _TRAIN_IMAGES[r['tag']] * r['epochs'] / r['wall_time_s'])
    hardware = max(rates, key=lambda name: len(rates[name]), default='')
    return (statistics.median(rates[hardware]) if rates else 0.0), hardware


def _recipe(row: dict[str, Any]) -> str:
    return f'{row["paper"]}-{row["dataset"].replace("_", "-")}'


def _command(args: dict[str, Any], row: dict[str, Any]) -> str:
    parts = [f'poolattn train --recipe {_recipe(row)} --model {args["model_name"]}']
    if 'num_classes' in args:
        parts.append(f'--num-classes {args["num_classes"]}')
    kwargs = {k: args[k] for k in ('flavour', 'gate_kwargs') if k in args}
    if kwargs:
        values = (f"'{v}'" if isinstance(v, str) else str(v) for v in kwargs.values())
        parts.append('--model-kwargs ' + ' '.join(f'"{k}={v}"' for k, v in zip(kwargs, values, strict=True)))
    return ' '.join([*parts, '--data-dir DATA'])


@cache
def _trunk(args: str) -> tuple[int, int, int, str | None]:
    """Without the classifier: parameters and multiply-adds, the features that it gets, and the gate."""
    model = _create(**json.loads(args))
    model.reset_classifier(0)
    parameters = sum(p.numel() for p in model.parameters())
    # a CPU runs the empty model three times as fast as 'meta' does
    return parameters, multiply_adds(model.to_empty(device='cpu')), model.num_features, model.gate


def report_rows(images_per_s: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """Every row of the papers' tables with ours beside it.

    Args:
        images_per_s: by model, at inference. Default: none.

    Returns:
        For each row `paper`, `table_name`, `dataset`, `model`, `gate`, `variant`, `paper_parameters`, `paper_top1`,
        `parameters`, `multiply_adds` (of one image), `measured` (a list, longest training first, each `top1`,
        `spread`, `seeds`, `epochs`, ...), `difference` of the first of these to the paper, `command` and
        `estimated_hours` of the paper's own training where nothing was measured, and `images_per_s` where benchmarked.
    """
    results = load_results()
    rate, _ = training_rate(results)
    rows = []
    for row in tqdm(table_rows(), desc='counting', unit='row', delay=1, leave=False):
        args = model_args(row)
        # CIFAR-10 and CIFAR-100 differ in the classifier alone
        same = dict(args, model_name=args['model_name'].replace('.cifar100', '.cifar10'))
        parameters, macs, features, gate = _trunk(json.dumps(same))
        num_classes = args.get('num_classes') or DATASETS[row['dataset']]['num_classes']
        parameters, macs = parameters + (features + 1) * num_classes, macs + features * num_classes
        measured = _measured(matching_results(row, results))
        epochs = yaml.safe_load(recipes()[_recipe(row)].read_text())['epochs']
        paper = paper_accuracy(row)
        rows.append(
            dict(
                paper=_PAPERS[row['paper']],
                table_name=row['table'] if row['table'].startswith('Fig') else f'Table {row["table"]}',
                dataset=_DATASETS[row['dataset']],
                model=args['model_name'].split('.')[0],
                gate=gate or 'none',
                variant=row.get('variant', ''),
                paper_parameters=_paper_parameters(row),
                paper_top1=paper,
                parameters=parameters,
                multiply_adds=macs,
                measured=measured,
                difference=_difference(measured, paper),
                command=_command(args, row),
                estimated_hours=macs * _TRAIN_IMAGES[row['dataset']] * epochs / rate / 3600 if rate else None,
                images_per_s=(images_per_s or {}).get(args['model_name'].split('.')[0]),
            )
        )
    return rows


def _duration(hours: float | None) -> str:
    """For a person: 'about 9 days'."""
    if hours is None:
        return ''
    for unit, size in (('days', 24), ('hours', 1)):
        if hours >= 2 * size:
            return f'about {hours / size:.0f} {unit}'
    return f'about {max(60 * hours, 1):.0f} minutes'


def write_report(path: str | Path, benchmark: str | Path | None = None) -> Path:
    """Write the report: one HTML page that needs no network, or Markdown tables.

    Args:
        path: the suffix decides: .html or .md.
        benchmark: a file with what `poolattn bench models --json` printed. Default: none.

    Raises:
        FileNotFoundError: no such `benchmark`.
        ValueError: another suffix, or a `benchmark` that is not JSON of that command.
    """
    path = Path(path)
    if path.suffix not in ('.html', '.md'):
        raise ValueError(f'{path}: a report is .html or .md')
    rows = report_rows(read_benchmark(benchmark) if benchmark else None)
    _, hardware = training_rate(load_results())
    text = markdown_report(rows) if path.suffix == '.md' else _page(rows, path.parent, hardware)
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_suffix('.tmp')
    temp.write_text(text, encoding='utf-8')
    os.replace(temp, path)
    return path


def read_benchmark(path: str | Path) -> dict[str, float]:
    """Images/s at inference by model, from what `poolattn bench models --json` printed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: something else.
    """
    try:
        rows = json.loads(Path(path).read_text())['rows']
        return {row['model']: row['inference_images_per_s'] for row in rows if row['mode'] == 'eager'}
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such file; `poolattn bench models --json` writes one') from None
    except (ValueError, TypeError, KeyError):
        raise ValueError(f'{path}: not what `poolattn bench models --json` prints') from None


def _page(rows: list[dict[str, Any]], folder: Path, hardware: str) -> str:
    cards = {name: os.path.relpath(path / 'README.md', folder) for name, path in released().items()}
    for row in rows:
        row['duration'] = _duration(row['estimated_hours'])
    template = jinja2.Template((files(__package__) / 'page.html.jinja').read_text('utf-8'), autoescape=True)
    return template.render(
        rows=rows,
        cards=cards,
        measured=sum(bool(row['measured']) for row in rows),
        hardware=hardware,
        made=f'{date.today()}, timm_poolattn {__version__}, timm {timm.__version__}, torch {torch.__version__},'
        f' {platform.machine()}',
    )


def _top1(measured: list[dict[str, Any]]) -> str:
    if not measured:
        return ''
    m = measured[0]
    seeds = f'{m["seeds"]} seed{"s" * (m["seeds"] > 1)}, {m["epochs"]} epochs'
    spread = '' if m['spread'] is None else f' ± {m["spread"]:.2f}'
    return f'{m["top1"]:.2f}{spread} ({seeds})'


def markdown_report(rows: Sequence[dict[str, Any]]) -> str:
    """All rows as Markdown, a table for each of the papers'."""
    tables = defaultdict(list)
    for row in rows:
        tables[f'{row["paper"]}, {row["table_name"]}'].append(row)
    lines = ["# The papers' tables and ours", '', _summary(rows), '']
    for title, of_table in tables.items():
        lines += [f'## {title}', '']
        lines += [
            '| model | data | parameters (paper, M) | ours | Mmult-adds | top-1 (paper) | ours | difference | to run |',
            '|---|---|---|---|---|---|---|---|---|',
        ]
        for r in of_table:
            name = f'`{r["model"]}`' + (f' {r["variant"]}' if r['variant'] else '')
            paper_top1 = '' if r['paper_top1'] is None else f'{r["paper_top1"]:.2f}'
            difference = '' if r['difference'] is None else f'{r["difference"]:+.2f}'
            run = '' if r['measured'] else f'`{r["command"]}` ({_duration(r["estimated_hours"])})'
            lines.append(
                f'| {name} | {r["dataset"]} | {r["paper_parameters"]} | {r["parameters"]:,}'
                f' | {r["multiply_adds"] / 1e6:.1f} | {paper_top1} | {_top1(r["measured"]) or "not run"} | {difference}'
                f' | {run} |'
            )
        lines.append('')
    return '\n'.join(lines)


def _summary(rows: Sequence[dict[str, Any]]) -> str:
    groups = defaultdict(list)
    for row in rows:
        groups[row['paper'], row['dataset']].append(row)
    lines = ["| paper | data | rows | run | ours less the paper's top-1 |", '|---|---|---|---|---|']
    for (paper, data), of_group in groups.items():
        differences = [row['difference'] for row in of_group if row['difference'] is not None]
        span = ' to '.join(f'{d:+.2f}' for d in sorted({min(differences), max(differences)})) if differences else ''
        lines.append(f'| {paper} | {data} | {len(of_group)} | {sum(bool(r["measured"]) for r in of_group)} | {span} |')
    return '\n'.join(lines)


def papers_table() -> str:
    """For the README: how many rows of which paper were run, and how far from the paper they are."""
    results = load_results()
    rows = []
    for row in table_rows():
        measured = _measured(matching_results(row, results))
        rows.append(
            dict(
                paper=_PAPERS[row['paper']],
                dataset=_DATASETS[row['dataset']],
                measured=measured,
                difference=_difference(measured, paper_accuracy(row)),
            )
        )
    return _summary(rows)
