"""The report: all rows as one page that needs no network, or as Markdown."""

import json
import logging
import os
import platform
from collections import defaultdict
from collections.abc import Sequence
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import timm
import torch

from ..papers import model_args, table_rows
from ..utils import MissingFileError, UserError, released, write_text
from ..version import __version__
from .results import read_results, with_results
from .rows import report_rows, results_of, training_rate

_logger = logging.getLogger(__name__)


def write_report(path: str | Path, benchmark: str | Path | None = None, results: Sequence[str | Path] = ()) -> Path:
    """Write the report.

    Args:
        path: a .html file for the page, or .md for Markdown tables.
        benchmark: a file with what `poolattn bench models --json` printed.
        results: release folders, run folders or results files, besides those that the package has. One of a model
            that no row has is left out, with a warning.

    Raises:
        MissingFileError: no such `benchmark` or results.
        UserError: another suffix, a `benchmark` that is not JSON of that command, a `path` that cannot be written, or
            as `read_results`.
    """
    path = Path(path)
    if path.suffix not in ('.html', '.md'):
        raise UserError(f'{path}: a report is .html or .md')
    known = with_results(results)
    for source in results:
        result = read_results(source)
        if not any(results_of(model_args(row), [result]) for row in table_rows()):
            _logger.warning(f'{source}: its model is in no table of the papers, so the report leaves it out')
    rows = report_rows(known, read_benchmark(benchmark) if benchmark else None)
    _, hardware = training_rate(known)
    write_text(path, markdown_report(rows) if path.suffix == '.md' else _page(rows, path.parent, hardware))
    return path


def read_benchmark(path: str | Path) -> dict[str, float]:
    """Read images/s at inference by model, eager and in float32, from what `poolattn bench models --json` printed.

    Raises:
        MissingFileError: no such file.
        UserError: something else.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding='utf-8'))['rows']
        rows = [row for row in rows if (row['mode'], row['dtype']) == ('eager', 'float32')]
        # of layouts the first
        return {row['model'].partition('.')[0]: row['inference_images_per_s'] for row in reversed(rows)}
    except FileNotFoundError:
        raise MissingFileError(f'{path}: no such file; `poolattn bench models --json` prints one') from None
    except OSError as e:
        raise UserError(f'{path}: cannot be read: {e.strerror}') from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f'{path}: not what `poolattn bench models --json` prints') from None


def _duration(hours: float | None) -> str:
    """Write it for a person: 'about 9 days'."""
    if hours is None:
        return ''
    for unit, size in (('days', 24), ('hours', 1)):
        if hours >= 2 * size:
            return f'about {hours / size:.0f} {unit}'
    return f'about {max(60 * hours, 1):.0f} minutes'


def describe_run(run: dict[str, Any]) -> str:
    """Describe what tells the runs of a cell apart: 'cpu-short, 3 epochs, 1 run'."""
    plural = lambda n, noun: f'{n} {noun}{"s" * (n != 1)}'  # noqa: E731
    return f'{run["recipe"]}, {plural(run["epochs"], "epoch")}, {plural(run["runs"], "run")}'


def describe_gain(run: dict[str, Any]) -> str:
    """Describe a gate less the plain backbone: '+0.31 ± 0.12 (3 and 3 runs)'; '' where that was not run."""
    gain = run['gain']
    if gain is None:
        return ''
    error = '' if gain['error'] is None else f' ± {gain["error"]:.2f}'
    return f'{gain["difference"]:+.2f}{error} ({run["runs"]} and {gain["plain_runs"]} runs)'


def _page(rows: list[dict[str, Any]], folder: Path, hardware: str) -> str:
    cards = {}
    for name, path in released().items():
        try:
            cards[name] = Path(os.path.relpath(path / 'README.md', folder)).as_posix()
        except ValueError:  # on another drive of Windows
            cards[name] = (path / 'README.md').as_uri()
    for row in rows:
        row['duration'] = _duration(row['estimated_hours'])
        for run in row['measured']:
            run.update(label=describe_run(run), gain_label=describe_gain(run))
    template = jinja2.Template((files(__package__) / 'page.html.jinja').read_text('utf-8'), autoescape=True)
    return template.render(
        rows=rows,
        cards=cards,
        measured=sum(bool(row['measured']) for row in rows),
        hardware=hardware,
        made=f'{date.today()}, timm_poolattn {__version__}, timm {timm.__version__}, torch {torch.__version__},'
        f' {platform.machine()}',
    )


def markdown_report(rows: Sequence[dict[str, Any]]) -> str:
    """Write what was run, a line for each run; then all rows, a table for each of the papers'."""
    lines = ["# The papers' tables and ours", '', summary_table(rows), '']
    lines += ['## Rows that were run', '']
    lines += ['| model | data | in | top-1 (paper) | ours | difference | less plain | trained by |', '|---' * 8 + '|']
    for r in rows:
        for run in r['measured']:
            spread = '' if run['spread'] is None else f' ± {run["spread"]:.2f}'
            lines.append(
                f'| {_name(r)} | {r["dataset"]} | {r["paper"]}, {r["table_name"]} | {_number(r["paper_top1"])}'
                f' | {run["top1"]:.2f}{spread} | {_number(run["difference"], "+")} | {describe_gain(run)}'
                f' | {describe_run(run)} |'
            )
    tables = defaultdict(list)
    for row in rows:
        tables[f'{row["paper"]}, {row["table_name"]}'].append(row)
    lines += ['', '## Every row', '']
    for title, of_table in tables.items():
        lines += [f'<details><summary>{title}</summary>', '']
        lines += ['| model | data | parameters (paper, M) | ours | Mmult-adds | top-1 (paper) | ours | to run |']
        lines += ['|---' * 8 + '|']
        for r in of_table:
            ours = '; '.join(f'{run["top1"]:.2f} ({describe_run(run)})' for run in r['measured']) or 'not run'
            command = f'`{r["command"]}` ({_duration(r["estimated_hours"])})'
            lines.append(
                f'| {_name(r)} | {r["dataset"]} | {r["paper_parameters"]} | {r["parameters"]:,}'
                f' | {r["multiply_adds"] / 1e6:.1f} | {_number(r["paper_top1"])} | {ours} | {command} |'
            )
        lines += ['', '</details>', '']
    return '\n'.join(lines)


def _name(row: dict[str, Any]) -> str:
    return f'`{row["model"]}`' + (f' {row["variant"]}' if row['variant'] else '')


def _number(value: float | None, sign: str = '') -> str:
    return '' if value is None else f'{value:{sign}.2f}'


def summary_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return how many rows of which paper were run, and how far from it the released weights or the longest run is."""
    groups = defaultdict(list)
    for row in rows:
        groups[row['paper'], row['dataset']].append(row)
    lines = ["| paper | data | rows | run | ours less the paper's top-1 |", '|---|---|---|---|---|']
    for (paper, data), of_group in groups.items():
        # the longest comes first; max takes the first of equals
        runs = [max(row['measured'], key=lambda run: run['is_released']) for row in of_group if row['measured']]
        differences = [run['difference'] for run in runs if run['difference'] is not None]
        span = ' to '.join(f'{d:+.2f}' for d in sorted({min(differences), max(differences)})) if differences else ''
        lines.append(f'| {paper} | {data} | {len(of_group)} | {len(runs)} | {span} |')
    return '\n'.join(lines)
