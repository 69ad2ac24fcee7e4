"""Figures of training runs: their curves, the lambda that they learned, and the papers' ablations."""

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import nn

from ..explain.attention import block_label
from ..explain.figures import check_suffix, lambda_axes, plain_text, save
from ..inference import load_pretrained
from ..layers import SPEM
from ..papers import DATASETS, model_args, table_rows
from ..training import read_curve
from ..utils import MissingFileError, UserError, look_up
from .results import read_results, with_results
from .rows import start_of, training_of

#: Okabe and Ito's colours, which people of any colour vision tell apart.
_COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000')
_MARKS = ('o', 's', '^', 'D', 'v', 'p', '*', 'X', '<', '>', 'h')


def find_curve(run: str | Path) -> list[dict[str, float]]:
    """Return the epochs of a run: from its folder's summary.csv, a release folder's results.json, or a results file.

    Raises:
        MissingFileError: neither is there.
        UserError: no epoch has ended, or a file of another kind.
    """
    run = Path(run)
    file = next((run / name for name in ('summary.csv', 'results.json') if (run / name).is_file()), run)
    if not file.is_file():
        what = 'no summary.csv and no results.json in it' if run.is_dir() else 'no such folder or results file'
        raise MissingFileError(f'{run}: {what}; `poolattn train` prints the folder of its run')
    curve = read_curve(file.parent) if file.name == 'summary.csv' else read_results(file)['curve']
    try:
        curve = [{k: float(v) for k, v in row.items() if v is not None} for row in curve]
        if any('epoch' not in row for row in curve):
            raise ValueError('an epoch without its number')
    except (AttributeError, TypeError, ValueError) as e:
        raise UserError(f'{file}: its curve is not one of numbers by epoch ({e})') from None
    if not curve:
        raise UserError(f'{run}: no epoch of this run has ended yet')
    return curve


def curves(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Draw the curves of runs (see `find_curve`) on shared axes into `out`, a PNG, SVG or PDF file.

    Raises:
        MissingFileError, UserError: as `find_curve` and `save`.
    """
    check_suffix(out)
    read = {_place(run): find_curve(run) for run in runs}
    return save(curves_figure(dict(zip(_labels(list(read)), read.values(), strict=True))), out)


def _place(run: str | Path) -> Path:
    """Return what names a run: its folder, or the results file of one that has none."""
    path = Path(run).resolve()
    return path.parent if path.name in ('results.json', 'summary.csv') else path


def _labels(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of `paths` that no other of them has."""
    labels = []
    for path in paths:
        for count in range(1, len(path.parts) + 1):
            end = path.parts[-count:]
            if sum(other.parts[-count:] == end for other in paths) == 1:
                break
        labels.append(str(Path(*end)))
    return labels


def curves_figure(runs: dict[str, list[dict[str, float]]]) -> Figure:
    """Draw top-1 error, loss and learning rate by epoch, for SPEM penalty and mean lambda too: the FA paper's Fig. 6.

    Args:
        runs: by name; an epoch without evaluation has no `eval_...` fields.
    """
    panels = [
        ('top-1 error in evaluation (%)', [('eval_top1', '-')]),
        ('loss', [('eval_loss', '-'), ('train_loss', ':')]),
        ('learning rate', [('lr', '-')]),
        (r'SPEM: sum of $p_0^2 + p_1^2$', [('train_penalty', '-')]),
        (r'SPEM: mean $\lambda$ of the blocks', [('train_mean_lambda', '-')]),
    ]
    # a colour and a hollow mark of its own for each run: of curves that cover one another, the marks still show
    looks = [
        dict(
            color=_COLOURS[i % len(_COLOURS)],
            lw=1.4,
            marker=_MARKS[i % len(_MARKS)],
            mfc='none',
            markevery=(0.02 * (i % 5), 0.1),
        )
        for i in range(len(runs))
    ]
    panels = [p for p in panels if any(p[1][0][0] in row for curve in runs.values() for row in curve)]
    if not panels:
        raise UserError(f'{", ".join(runs)}: no accuracy, loss or learning rate to draw')
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * rows + 0.3 * len(runs)), layout='constrained')
    axes = figure.subplots(rows, columns, sharex=True, squeeze=False).flatten()
    for ax, (title, fields) in zip(axes, panels, strict=False):
        for curve, look in zip(runs.values(), looks, strict=True):
            for field, style in fields:
                points = [(row['epoch'], row[field]) for row in curve if field in row]
                points = [(x, 100 - y if field == 'eval_top1' else y) for x, y in points]
                (line,) = ax.plot([x for x, _ in points], [y for _, y in points], style, **look)
                if len(points) == 1:  # of which matplotlib would leave out the mark
                    line.set_markevery(None)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel('epoch')
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.tick_params(labelbottom=True)
        ax.grid(alpha=0.3)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    handles = [Line2D([], [], label=plain_text(name), **look) for name, look in zip(runs, looks, strict=True)]
    styles = [Line2D([], [], color='grey', ls=s, label=n) for s, n in (('-', 'evaluation'), (':', 'training'))]
    figure.legend(
        handles=handles + styles, loc='outside upper center', ncols=min(columns + 2, len(handles) + 2), frameon=False
    )
    return figure


def learned_lambda(model: nn.Module) -> dict[str, float]:
    """Return lambda of each SPEM gate (Eq. 3), by stage and block.

    Raises:
        UserError: the model has no SPEM gates.
    """
    values = {block_label(n): m.pool_lambda().item() for n, m in model.named_modules() if isinstance(m, SPEM)}
    if not values:
        raise UserError(f'{type(model).__name__} has no SPEM gates, and so no lambda; *_spem models have')
    return values


def draw_lambda(name: str, out: str | Path) -> Path:
    """Draw lambda over depth as a trained model learned it.

    Args:
        name: as `load_pretrained` takes it.
        out: a PNG, SVG or PDF file.

    Raises:
        UserError: as `load_pretrained` and `save`; a model without SPEM gates.
    """
    check_suffix(out)
    model = load_pretrained(name)
    try:
        values = learned_lambda(model)
    except UserError as e:
        raise UserError(f'{name}: {e}') from None
    figure = Figure(figsize=(max(6, min(14, 0.28 * len(values))), 3), layout='constrained')
    figure.suptitle(plain_text(name))
    lambda_axes(figure.subplots(), list(values), list(values.values()))
    return save(figure, out)


def _fixed_lambda(model: str, gate_kwargs: dict[str, Any]) -> float | str | None:
    return gate_kwargs.get('fixed_lambda', 'learned') if model.endswith('_spem') else None


def _paths(model: str, gate_kwargs: dict[str, Any]) -> int | None:
    gate = model.partition('_')[2]
    return gate_kwargs.get('paths', int(gate[4:] or 1)) if gate in ('saam', 'saam2', 'saam4') else None


#: By name: what a model varies (None: not its gate), whose table rows stand beside it, the axis, a command.
ABLATIONS: dict[str, tuple[Callable[[str, dict[str, Any]], float | str | None], Callable[[dict], bool], str, str]] = {
    'lambda': (
        _fixed_lambda,
        lambda row: row['paper'] == 'spem' and row['table'] == '3',
        r'fixed $\lambda$',
        'poolattn train --recipe spem-cifar10 --model resnet164_spem.cifar10'
        ' --model-kwargs "gate_kwargs={\'fixed_lambda\': 0.3}" --data-dir DATA, likewise 0.1, 0.5, 0.7, 0.9',
    ),
    'paths': (
        _paths,
        lambda row: row['paper'] == 'saam' and 'top1' in row,
        'paths',
        'poolattn train --recipe saam-cifar10 --model resnet56_saam2.cifar10 --data-dir DATA,'
        ' likewise resnet56_saam and resnet56_saam4',
    ),
}


def ablation_points(
    name: str, results: Iterable[dict[str, Any]]
) -> dict[str, dict[str, dict[float | str, list[float]]]]:
    """Return top-1 accuracies by data set, series (a backbone, one way to train it) and what the ablation varies."""
    value_of = ABLATIONS[name][0]
    points: dict[str, Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    series: dict[str, str] = {}
    for r in results:
        others = dict(r['arguments'].get('model_kwargs', {}))
        gate_kwargs = others.pop('gate_kwargs', {})
        value = value_of(r['model'], gate_kwargs)
        if value is not None:
            others['gate_kwargs'] = {k: v for k, v in gate_kwargs.items() if k not in ('fixed_lambda', 'paths')}
            label = f'{r["model"].partition("_")[0]}, {r["epochs"]} epochs'
            of_label = [k for k, v in series.items() if v.startswith(label)]
            key = json.dumps([label, training_of(r), start_of(r), others], sort_keys=True)
            series.setdefault(key, label + (f' ({len(of_label) + 1})' if of_label else ''))
            points[r['tag']][series[key]][value].append(r['test']['top1'])
    return {
        data: {label: dict(values) for label, values in of_data.items() if len(values) > 1}
        for data, of_data in points.items()
    }


def ablation(name: str, out: str | Path, results: Sequence[str | Path] = ()) -> Path:
    """Draw the SPEM paper's Fig. 2 (accuracy against fixed lambda) or the SAAM paper's Fig. 3 (against paths).

    Args:
        name: 'lambda' or 'paths'.
        out: a PNG, SVG or PDF file.
        results: release folders, run folders or results files, besides those that the package has.

    Raises:
        MissingFileError: no results there.
        UserError: an unknown `name`; no two runs that differ in this alone; as `read_results` and `save`.
    """
    look_up('ablation', name, ABLATIONS)
    check_suffix(out)
    ours = ablation_points(name, with_results(results))
    if not any(ours.values()):
        raise UserError(
            f'accuracy against {name} needs runs that differ in it alone, and there are no two; make them with'
            f' {ABLATIONS[name][3]}, and name their folders'
        )
    return save(ablation_figure(name, ours), out)


def ablation_figure(name: str, ours: dict[str, dict[str, dict[float | str, list[float]]]]) -> Figure:
    """Draw `ours`, as `ablation_points` has it, beside what the paper prints: a panel for each data set of ours."""
    value_of, is_papers, axis, _ = ABLATIONS[name]
    papers: dict[str, Any] = defaultdict(lambda: defaultdict(dict))
    for row in filter(is_papers, table_rows()):
        value = value_of(row['model'], model_args(row).get('gate_kwargs', {}))
        if value is not None:
            papers[row['dataset']][f'{row["model"].partition("_")[0]}, paper'][value] = [row['top1']]
    shown = [data for data in sorted(ours) if ours[data]]
    figure = Figure(figsize=(5 * len(shown), 3.8), layout='constrained')
    for ax, data in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        series = {**papers.get(data, {}), **ours[data]}
        backbones = list(dict.fromkeys(label.partition(',')[0] for label in series))
        steps = sorted({x for values in series.values() for x in values if x != 'learned'})
        aside = 0.04 * min((b - a for a, b in pairwise(steps)), default=0)  # so that no point covers another
        for i, (label, values) in enumerate(series.items()):
            style = '--' if label in papers.get(data, {}) else '-'
            colour = _COLOURS[backbones.index(label.partition(',')[0]) % len(_COLOURS)]
            xs = sorted(x for x in values if x != 'learned')
            means = [statistics.mean(values[x]) for x in xs]
            spread = [statistics.stdev(values[x]) if len(values[x]) > 1 else 0 for x in xs]
            hollow = 'white' if style == '--' else colour
            places = [x + aside * (i - (len(series) - 1) / 2) for x in xs]
            ax.errorbar(places, means, spread, ls=style, color=colour, marker='o', mfc=hollow, capsize=3, label=label)
            if 'learned' in values:
                learned = statistics.mean(values['learned'])
                ax.axhline(learned, ls=style, lw=1, color=colour)
                ax.annotate('learned', (1, learned), xycoords=('axes fraction', 'data'), fontsize=8, color=colour,
                            ha='right', va='bottom')  # fmt: skip
            if name == 'paths':
                ax.set_xticks(sorted({1, 2, 4, *xs}))
        ax.set_title(DATASETS[data]['title'] if data in DATASETS else data, fontsize=10)
        ax.set_xlabel(axis)
        ax.set_ylabel('top-1 (%)')
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    return figure
