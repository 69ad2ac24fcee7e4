"""What exists: every model with its gate and parameters, and the results of those with a release folder."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
from tqdm import tqdm

from ..models import FAMILIES, multiply_adds, released
from ..papers import paper_top1
from ..utils import cache_dir


def released_results() -> dict[str, dict[str, Any]]:
    """results.json by `<arch>.<tag>`."""
    return {name: json.loads((folder / 'results.json').read_text()) for name, folder in released().items()}


def _facts(names: list[str]) -> dict[str, dict[str, Any]]:
    """`gate`, `parameters` and `multiply_adds` by name. A cache file keeps them for one state of the code."""
    sources = [
        path for room in ('layers', 'models') for path in sorted((Path(__file__).parent.parent / room).glob('*.py'))
    ]
    state = hashlib.sha256(b''.join(path.read_bytes() for path in sources) + timm.__version__.encode())
    path = cache_dir() / f'models-{state.hexdigest()[:16]}.json'
    facts = json.loads(path.read_text()) if path.is_file() else {}
    missing = [name for name in names if name not in facts]
    for name in tqdm(missing, desc='counting', unit='model', delay=1, leave=False):
        model = timm.create_model(name, device='meta').to_empty(device='cpu')  # no initialisation
        parameters = sum(p.numel() for p in model.parameters())
        facts[name] = dict(gate=model.gate, parameters=parameters, multiply_adds=multiply_adds(model))
    if missing:
        with contextlib.suppress(OSError):  # a read-only disk costs the next call a count, no more
            path.parent.mkdir(parents=True, exist_ok=True)
            temp = path.with_suffix(f'.{os.getpid()}.tmp')
            temp.write_text(json.dumps(facts))
            os.replace(temp, path)
    return facts


def list_models(filter: str = '') -> list[dict[str, Any]]:
    """Our models, by family and in order of name.

    Args:
        filter: a name or a pattern as in timm.list_models. Default: all.

    Returns:
        For each `model`, `family`, `gate` (None for none), `parameters`, `multiply_adds`, and `top1` in % by tag, of
        those trained.
    """
    families = {name: family for family in FAMILIES for name in timm.list_models(filter, module=family)}
    facts = _facts(list(families))
    results = released_results().values()
    top1 = {name: {r['tag']: r['test']['top1'] for r in results if r['model'] == name} for name in families}
    return [dict(model=name, family=family, **facts[name], top1=top1[name]) for name, family in families.items()]


def markdown_table() -> str:
    """The trained models as a Markdown table, from their results files."""
    lines = [
        '| model | parameters | top-1 (%) | paper | epochs | trained on |',
        '|---|---|---|---|---|---|',
    ]
    for name, r in released_results().items():
        paper = paper_top1(r['model'], r['tag'])
        lines.append(
            f'| `{name}` | {r["parameters"]:,} | {r["test"]["top1"]:.2f} | {f"{paper:.2f}" if paper else ""}'
            f' | {r["epochs"]} | {r["hardware"]} |'
        )
    return '\n'.join(lines)


def _conditions(result: dict[str, Any]) -> str:
    facts = ('machine', 'layout', 'batch_size', 'repeats', 'torch', 'timm', 'timm_poolattn', 'date')
    known = ', '.join(f'{fact.replace("_", " ")} {result[fact]}' for fact in facts if fact in result)
    return f'{known}, {result["threads"]} thread{"s" if result["threads"] > 1 else ""}, float32'


def _benchmark_table(title: str, result: dict[str, Any], columns: str, rows: Iterable[Sequence[str]]) -> str:
    lines = [f'{title}, {_conditions(result)}:', '', columns, '|---' * (columns.count('|') - 1) + '|']
    return '\n'.join([*lines, *(f'| {" | ".join(cells)} |' for cells in rows)])


def benchmark_tables() -> str:
    """The benchmarks as Markdown tables, from what `poolattn bench models` and `bench gates` printed as JSON."""
    folder = Path(__file__).parent.parent / 'bench' / 'results'
    tables = []
    columns = '| model | mode | inference | training | inference, to authors | training, to authors | memory | build |'
    keys = [f'{kind}_to_{other}' for other in ('plain', 'authors') for kind in ('inference', 'training')]
    keys += ['peak_to_plain', 'construct_to_plain']
    for path in sorted(folder.glob('models*.json')):
        result = json.loads(path.read_text())
        rows = ([r['model'], r['mode'], *(f'{r[k]:.2f}' if k in r else '' for k in keys)] for r in result['rows'])
        tables.append(_benchmark_table('Networks', result, columns, rows))
    columns = '| gate | map | layout | forward | training | forward, to SE | training, to SE | moved | peak |'
    keys = [f'{kind}_ms_to_{other}' for other in ('identity', 'se') for kind in ('forward', 'training')]
    keys += ['forward_moved', 'peak_maps']
    for path in sorted(folder.glob('gates*.json')):
        result = json.loads(path.read_text())
        largest = max(r['size'] for r in result['rows'])
        rows = (
            [r['gate'], f'{r["channels"]}x{r["size"]}x{r["size"]}', r['layout'], *(f'{r[k]:.1f}' for k in keys)]
            for r in result['rows']
            if r['size'] == largest
        )
        tables.append(_benchmark_table('Gates on the largest map', result, columns, rows))
    return '\n\n'.join(tables)


def readme_tables() -> dict[str, str]:
    """The generated parts of README.md: between lines `<!-- NAME: generated ... -->` and `<!-- /NAME -->`."""
    from .page import papers_table

    tables = dict(models=markdown_table(), papers=papers_table(), benchmarks=benchmark_tables())
    return {
        f'<!-- {name}: generated by `poolattn readme` -->': f'{table}\n<!-- /{name} -->'
        for name, table in tables.items()
    }


def write_tables(readme: Path) -> None:
    """Bring the tables of `readme` up to date; those that it has no marks for are left out.

    Raises:
        ValueError: there are no marks, or a first without its last.
    """
    text, found = readme.read_text(), 0
    for start, table in readme_tables().items():
        end = table.rpartition('\n')[2]
        if text.count(start) != text.count(end) or text.count(start) > 1:
            raise ValueError(f'{readme}: needs one line {start} and one line {end}, for the table to go between')
        if start in text:
            found += 1
            head, _, rest = text.partition(start)
            text = f'{head}{start}\n{table}{rest.partition(end)[2]}'
    if not found:
        raise ValueError(f'{readme}: needs lines {", ".join(readme_tables())} for the tables to go to')
    temp = readme.with_suffix('.tmp')
    temp.write_text(text)
    os.replace(temp, readme)
