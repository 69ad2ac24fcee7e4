"""The generated tables of the READMEs, and all results as one CSV.

`python -m timm_poolattn.report.readme_tables` writes them, in a checkout.
"""

import csv
import io
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..models import paper_top1
from ..utils import UserError, write_text
from .page import summary_table
from .results import RESULTS_DIR, load_insertions, load_results, released_results
from .rows import recipe_name, report_rows

_PACKAGE = Path(__file__).parents[1]
#: The files with tables between marks.
READMES = tuple(
    _PACKAGE.parent / name
    for name in (
        'README.md',
        'hub_configs/README.md',
        'timm_poolattn/bench/README.md',
        'timm_poolattn/models/README.md',
    )
)
RESULTS_CSV = RESULTS_DIR / 'results.csv'


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in (columns, ['---'] * len(columns), *rows))


def models_table() -> str:
    """Return the trained models, from their results files."""
    rows = []
    for name, r in released_results().items():
        paper = paper_top1(r['model'], r['tag'])
        top1, printed = f'{r["test"]["top1"]:.2f}', '' if paper is None else f'{paper:.2f}'
        rows.append([f'`{name}`', f'{r["parameters"]:,}', top1, printed, str(r['epochs']), recipe_name(r)])
    return _table(['model', 'parameters', 'top-1 (%)', 'paper', 'epochs', 'recipe'], rows)


def benchmark_files(kind: str) -> list[dict[str, Any]]:
    """Return what `poolattn bench KIND --json` printed, 'models' or 'gates', in order of the files' names."""
    return [json.loads(path.read_text()) for path in sorted((_PACKAGE / 'bench' / 'results').glob(f'{kind}*.json'))]


def _conditions(result: dict[str, Any]) -> str:
    facts = ('batch_size', 'repeats', 'fused_pool', 'torch', 'timm', 'timm_poolattn', 'date')
    known = ', '.join(f'{fact.replace("_", " ")} {result[fact]}' for fact in facts if fact in result)
    return f'{result["machine"]}, {result["threads"]} thread{"s" * (result["threads"] != 1)}, {known}'


def _ratios(row: dict[str, Any], keys: Iterable[str], digits: int) -> list[str]:
    return [f'{row[key]:.{digits}f}' if key in row else '' for key in keys]


_MODEL_RATIOS = {
    'inference': 'inference_to_plain',
    'training': 'training_to_plain',
    'memory': 'peak_to_plain',
    'inference, to authors': 'inference_to_authors',
    'training, to authors': 'training_to_authors',
}


def benchmark_tables() -> str:
    """Return the benchmarks of networks and gates."""
    tables = []
    for result in benchmark_files('models'):
        shown = {title: key for title, key in _MODEL_RATIOS.items() if any(key in r for r in result['rows'])}
        rows = (
            [r['model'], r['layout'], r['dtype'], r['mode'], *_ratios(r, shown.values(), 2)] for r in result['rows']
        )
        tables.append(f'Networks. {_conditions(result)}:\n\n')
        tables[-1] += _table(['model', 'layout', 'dtype', 'mode', *shown], rows)
    keys = [f'{kind}_ms_to_{other}' for other in ('identity', 'se') for kind in ('forward', 'training')]
    keys += ['forward_moved', 'peak_maps']
    for result in benchmark_files('gates'):
        largest = max(r['size'] for r in result['rows'])
        rows = (
            [r['gate'], f'{r["channels"]}x{r["size"]}x{r["size"]}', r['layout'], r['dtype'], *_ratios(r, keys, 1)]
            for r in result['rows']
            if r['size'] == largest
        )
        columns = ['gate', 'map', 'layout', 'dtype', 'forward', 'training', 'forward, to SE', 'training, to SE']
        tables.append(f'Gates on the largest map. {_conditions(result)}:\n\n')
        tables[-1] += _table([*columns, 'moved', 'peak'], rows)
    return '\n\n'.join(tables)


def insertions_table() -> str:
    """Return trained plain networks with inserted gates, each fine-tuned as long as the plain one beside it."""
    runs: dict[tuple[str, int, float, str], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for run in load_insertions():
        runs[run['model'], run['epochs'], run['before']['top1'], run['before']['data_sha256']][run['gate']].append(run)
    rows = []
    now = {name: r['weights']['data_sha256'] for name, r in released_results().items()}
    for (model, epochs, before, weights), gates in sorted(runs.items()):
        start = f'{before:.2f}{"" if now.get(model) == weights else " (weights released before)"}'
        plain = {r['seed']: r['top1'] for r in gates.get('', [])}
        for gate in sorted(gates):
            top1 = {r['seed']: r['top1'] for r in gates[gate]}
            after = f'{statistics.mean(top1.values()):.2f}'
            gains = ', '.join(f'{top1[seed] - plain[seed]:+.2f}' for seed in sorted(top1) if gate and seed in plain)
            parameters = f'{gates[gate][0]["parameters"]:,}'
            rows.append([f'`{model}`', gate or 'plain', parameters, start, str(epochs), after, gains])
    columns = ['network', 'gate', 'parameters', 'top-1 before (%)', 'epochs', 'after, mean', 'gain over plain, by seed']
    return _table(columns, rows)


def readme_tables() -> dict[str, str]:
    """Write the generated tables, by the name that `with_tables` finds their marks by."""
    papers = summary_table(report_rows(load_results()))
    tables = dict(models=models_table(), papers=papers, benchmarks=benchmark_tables())
    return dict(tables, insertions=insertions_table())


def with_tables(text: str, tables: dict[str, str]) -> str:
    """Return `text` with each of `tables` put between the marks that it has for it.

    Raises:
        UserError: a first mark without its last, or the reverse, or a name twice.
    """
    for name, table in tables.items():
        start, end = rf'<!-- {name}: generated[^\n]*-->', f'<!-- /{name} -->'
        firsts = len(re.findall(start, text))
        if firsts != text.count(end) or firsts > 1:
            raise UserError(f'needs one line <!-- {name}: generated --> and one line {end}, for the table between them')
        block = f'<!-- {name}: generated by `python -m timm_poolattn.report.readme_tables` -->\n{table}\n{end}'
        text = re.sub(rf'{start}.*?{re.escape(end)}', lambda _, block=block: block, text, flags=re.DOTALL)
    return text


def results_csv() -> str:
    """Write all runs as one table for a spreadsheet, a line each; images/s at inference, eager, where benchmarked."""
    speed = {
        row['model']: row['inference_images_per_s']
        for result in benchmark_files('models')
        for row in reversed(result['rows'])
        if (row['mode'], row['dtype']) == ('eager', 'float32')
    }
    out = io.StringIO()
    writer = csv.writer(out, lineterminator='\n')
    writer.writerow(
        ['model', 'data', 'recipe', 'epochs', 'seed', 'top-1', 'parameters', 'multiply-adds', 'images/s', 'hardware']
    )
    for r in sorted(load_results(), key=lambda r: (r['tag'], r['model'], -r['test']['top1'])):
        images_per_s = f'{speed[r["model"]]:.0f}' if r['model'] in speed else ''
        run = [r['model'], r['tag'], recipe_name(r), r['epochs'], r['seed'], r['test']['top1']]
        writer.writerow([*run, r['parameters'], r['multiply_adds'], images_per_s, r['hardware']])
    return out.getvalue()


def write_tables() -> list[Path]:
    """Bring `READMES` and `RESULTS_CSV` up to date."""
    tables = readme_tables()
    for path in READMES:
        write_text(path, with_tables(path.read_text(encoding='utf-8'), tables))
    write_text(RESULTS_CSV, results_csv())
    return [*READMES, RESULTS_CSV]


if __name__ == '__main__':
    print('wrote', *write_tables(), sep='\n')
