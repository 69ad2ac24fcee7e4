"""Figures of what a network looked at. matplotlib and captum come with the `explain` extra."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captum.attr import LayerAttribution, LayerGradCam
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import nn
from tqdm import tqdm

from ..inference import class_names, load_pretrained, read_image
from .attention import attention_trace, block_label, evaluating, find_gates

Trace = dict[str, dict[str, Any]]

#: Classes with a Grad-CAM, and of a channel gate, how many of the most raised and most lowered channels are drawn.
_CLASSES = _CHANNELS = 3
_WIDTH = 7.5  # of a model's column, in inches
_MAPS_IN_ROW = 9
_RAISED, _LOWERED, _STAGE, _INK = '#c2410c', '#1d4ed8', '#94a3b8', '#334155'


def grad_cam(model: nn.Module, x: torch.Tensor, classes: Sequence[int]) -> np.ndarray:
    """Grad-CAM of the network's last feature map of at least 3x3, by captum. The model is left as it was.

    Args:
        model: a timm CNN.
        x: one image (1, C, H, W), normalised.
        classes: their indices.

    Returns:
        (len(classes), H, W), each class's map with maximum 1; all 0 where nothing speaks for the class.
    """
    x = x.detach().requires_grad_()
    with evaluating(model), torch.enable_grad():
        for info in reversed(list(model.feature_info)):  # VGG-19's last map of a 32x32 image is a single position
            layer = LayerGradCam(model, model.get_submodule(info['module']))
            cams = torch.cat([layer.attribute(x, target=c, relu_attributions=True).detach() for c in classes])
            if min(cams.shape[2:]) >= 3:
                break
    cams = LayerAttribution.interpolate(cams, tuple(x.shape[2:]), 'bilinear')[:, 0]
    return (cams / cams.amax((1, 2), keepdim=True).clamp(min=1e-12)).cpu().numpy()


def explain(paths: Iterable[str | Path], name: str, out: str | Path, compare: Sequence[str] = ()) -> list[Path]:
    """Write a figure for each image: what trained models predict, by Grad-CAM where they see it, what their gates did.

    Args:
        paths: image files, resized as each model's config says.
        name: a model with gates, as `load_pretrained` takes it.
        out: the folder to write `<image's name>.png` into.
        compare: more models, side by side with it; these may be without gates.

    Raises:
        FileNotFoundError, ValueError: as `load_pretrained` and `read_image`; a model without gates.
    """
    paths, out = [Path(path) for path in paths], Path(out)
    models = {n: load_pretrained(n) for n in (name, *compare)}
    if not find_gates(models[name]):
        raise ValueError(f'{name} has no gates to explain; --compare takes it beside a model that has')
    images = [read_image(path) for path in paths]  # all, or nothing is drawn
    written = []
    for path, image in zip(tqdm(paths, desc='explaining', unit='image', delay=1, leave=False), images, strict=True):
        same_stem = sum(p.stem == path.stem for p in paths) > 1
        target = out / f'{path.parent.name}-{path.name}.png' if same_stem else out / f'{path.stem}.png'
        written.append(save(explain_figure(models, image, path.name), target))
    return written


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, SVG or PDF by its suffix, whole or not at all.

    Raises:
        ValueError: another suffix.
    """
    path = Path(path)
    if path.suffix not in ('.png', '.svg', '.pdf'):
        raise ValueError(f'{path}: a figure is .png, .svg or .pdf')
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f'.{path.stem}.tmp{path.suffix}')
    figure.savefig(temp, dpi=130, facecolor='white')
    os.replace(temp, path)
    return path


def explain_figure(models: dict[str, nn.Module], image: Image.Image, title: str = '') -> Figure:
    """The figure of `explain` for one image. Each model gets a column.

    Args:
        models: by the name to print.
        image: of any size.
        title: Default: none.
    """
    first = next(iter(models.values()))
    classes = _top_classes(first, image)
    columns = []
    for name, model in models.items():
        same = class_names(model) == class_names(first)  # Grad-CAMs to compare are of the same classes
        columns.append(_column(name, model, image, classes if same else _top_classes(model, image)))
    height = max(sum(h for h, _ in column) for column in columns)
    # rows have heights in inches and margins of their own: matplotlib's layout engines take seconds for so many axes
    figure = Figure(figsize=(_WIDTH * len(columns), height + 0.3))
    head, body = figure.subfigures(2, 1, height_ratios=(0.3, height))
    head.text(0.5, 0.3, title, ha='center', fontsize=10, color=_INK)
    for part, column in zip(np.atleast_1d(body.subfigures(1, len(columns))), columns, strict=True):
        heights = [*(h for h, _ in column), height - sum(h for h, _ in column) or 1e-6]
        for row, (_, draw) in zip(part.subfigures(len(heights), 1, height_ratios=heights)[:-1], column, strict=True):
            draw(row)
    return figure


def _axes(
    row: SubFigure,
    rows: int = 1,
    columns: int = 1,
    *,
    left: float = 0.5,
    top: float = 0.35,
    bottom: float = 0.45,
    wspace: float = 0.1,
    hspace: float = 0.1,
    **kwargs,
) -> np.ndarray:
    """(rows, columns) axes inside margins in inches; the gaps are in parts of an axis, as in matplotlib."""
    width, height = row.bbox.width / row.figure.dpi, row.bbox.height / row.figure.dpi
    margins = dict(left=left / width, right=1 - 0.15 / width, top=1 - top / height, bottom=bottom / height)
    grid = dict(margins, wspace=wspace, hspace=hspace)
    return row.subplots(rows, columns, squeeze=False, gridspec_kw=grid, **kwargs)


def _input(model: nn.Module, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    """What goes into the model, (1, C, H, W), and its pixels in [0, 1], (H, W, C)."""
    config = resolve_data_config(model=model)
    x = create_transform(**config)(image.convert('L' if config['input_size'][0] == 1 else 'RGB'))
    std, mean = (torch.tensor(config[key]).view(-1, 1, 1) for key in ('std', 'mean'))
    return x.unsqueeze(0), (x * std + mean).clamp(0, 1).permute(1, 2, 0)


def _probabilities(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), evaluating(model):
        return model(x).float().softmax(1)[0]


def _top_classes(model: nn.Module, image: Image.Image) -> list[int]:
    probabilities = _probabilities(model, _input(model, image)[0])
    return probabilities.topk(min(_CLASSES, len(probabilities))).indices.tolist()


def _column(
    name: str, model: nn.Module, image: Image.Image, classes: list[int]
) -> list[tuple[float, Callable[[SubFigure], None]]]:
    """The rows of a model's column: height in inches and what draws them."""
    x, pixels = _input(model, image)
    grey, colour = pixels.mean(2).numpy(), pixels.numpy()
    top = _probabilities(model, x).topk(_CLASSES if model.num_classes > _CLASSES else model.num_classes)
    names = class_names(model)
    predicted = [names[i] for i in top.indices]
    labels = [names[i] for i in classes]
    cams = grad_cam(model, x, classes)

    rows = [
        (2.3, lambda f: _predictions(f, name, image, colour, predicted, top.values.tolist())),
        (2.6, lambda f: _cams(f, grey, cams, labels)),
    ]
    trace = attention_trace(model, x) if find_gates(model) else {}
    fa = {n: t for n, t in trace.items() if 'k' in t}
    spem = {n: t for n, t in trace.items() if 'pool_lambda' in t}
    weights = {n: t for n, t in trace.items() if 'weight' in t}
    if fa:
        rows.append((2.2, lambda f: _fa_bars(f, fa)))
    if spem:
        rows.append((1.9, lambda f: lambda_axes(_axes(f, left=1.05)[0, 0], *_lambdas(spem))))
    for key, caption, row_name in (
        ('score_map', 'SAAM: score map V of each block', 'path'),
        ('spatial', 'Weight of each position, by block', 'group'),
    ):
        maps = [(n, t[key][0]) for n, t in trace.items() if key in t]
        if maps:
            rows.append(_map_rows(maps, grey, caption, row_name))
    if weights:
        rows.append((1.9, lambda f: _weights(f, weights)))
        rows.append((2.6, lambda f: _channels(f, weights, grey)))
    return rows


def _caption(ax_or_figure: Axes | SubFigure, text: str) -> None:
    if isinstance(ax_or_figure, Axes):
        ax_or_figure.set_title(text, fontsize=9, loc='left', color=_INK)
    else:
        ax_or_figure.text(0.02, 0.98, text, fontsize=9, va='top', color=_INK)


def _show(ax: Axes, pixels: np.ndarray, **kwargs) -> None:
    ax.imshow(pixels, vmin=0, vmax=1, interpolation='nearest', **kwargs)
    ax.set_xticks([])
    ax.set_yticks([])


def _overlay(ax: Axes, grey: np.ndarray, heat: np.ndarray, **kwargs) -> None:
    """A heat map over the grey image; it may have fewer pixels."""
    h, w = grey.shape
    _show(ax, grey, cmap='gray', extent=(0, w, h, 0))
    ax.imshow(heat, cmap='inferno', alpha=0.65, extent=(0, w, h, 0), **kwargs)


def _predictions(
    figure: SubFigure, name: str, image: Image.Image, colour: np.ndarray, labels: list[str], values: list[float]
) -> None:
    figure.text(0.5, 0.99, name, fontsize=13, fontweight='bold', ha='center', va='top')
    ratios = dict(width_ratios=(1, 1, 1.3))
    (original, seen, bars) = _axes(figure, 1, 3, left=0.15, top=0.55, bottom=0.05, wspace=0.25, **ratios)[0]
    _show(original, np.asarray(image.convert('RGB')))
    _caption(original, f'image, {image.width}x{image.height}')
    _show(seen, colour)
    _caption(seen, f'as the model sees it, {colour.shape[1]}x{colour.shape[0]}')
    bars.barh(labels[::-1], values[::-1], color=_STAGE, height=0.55)
    for i, value in enumerate(values[::-1]):
        bars.text(0.02, i, f'{value:.1%}', va='center', fontsize=9)
    bars.set_xlim(0, 1)
    bars.set_xticks([])
    bars.tick_params(axis='y', labelsize=9, length=0)
    bars.spines[:].set_visible(False)
    _caption(bars, 'prediction')


def _cams(figure: SubFigure, grey: np.ndarray, cams: np.ndarray, labels: list[str]) -> None:
    _caption(figure, 'Grad-CAM: where the last feature map speaks for a class (bright: most)')
    for ax, cam, label in zip(_axes(figure, 1, len(cams), left=0.15, bottom=0.3)[0], cams, labels, strict=True):
        _overlay(ax, grey, cam, vmin=0, vmax=1, interpolation='bilinear')
        ax.set_xlabel(label if cam.any() else f'{label}: nothing speaks for it', fontsize=9)


def _lambdas(trace: Trace) -> tuple[list[str], list[float]]:
    return [block_label(n) for n in trace], [float(t['pool_lambda'][0]) for t in trace.values()]


def lambda_axes(ax: Axes, labels: Sequence[str], values: Sequence[float]) -> None:
    """SPEM's lambda over depth.

    Args:
        ax: to draw into.
        labels: of the blocks.
        values: lambda of each, in [0, 1].
    """
    at = np.arange(len(values))
    ax.axhline(0.5, color=_STAGE, lw=1, ls='--')
    ax.vlines(at, 0.5, values, color=[_RAISED if v >= 0.5 else _LOWERED for v in values], lw=2)
    ax.scatter(at, values, color=[_RAISED if v >= 0.5 else _LOWERED for v in values], s=22, zorder=3)
    ax.set_ylim(-0.05, 1.05)
    ax.set_yticks([0, 0.5, 1], ['min pooling  0', 'start  0.5', 'max pooling  1'])
    _block_axis(ax, labels)
    _caption(ax, r'SPEM: learned $\lambda$ of each block, the weight of max against min pooling')


def _block_axis(ax: Axes, labels: Sequence[str]) -> None:
    step = -(-len(labels) // 20)
    ax.set_xticks(range(0, len(labels), step), labels[::step])
    ax.tick_params(labelsize=8)
    ax.set_xlabel('block (stage.block, from 0)', fontsize=8)
    ax.set_xlim(-0.7, len(labels) - 0.3)
    ax.spines[['top', 'right']].set_visible(False)


def _fa_bars(figure: SubFigure, trace: Trace) -> None:
    ax = _axes(figure)[0, 0]
    labels = [block_label(n) for n in trace]
    of_stages = {label for label in labels if any(other.startswith(f'{label}.') for other in labels)}
    # a stage's own gate comes behind its blocks
    order = sorted(range(len(labels)), key=lambda i: (labels[i].split('.')[0], labels[i] in of_stages, i))
    records = [list(trace.values())[i] for i in order]
    labels = [labels[i] for i in order]
    for at, (label, t) in enumerate(zip(labels, records, strict=True)):
        k, skipped = float(t['k'][0]), bool(t['skipped'][0])
        colour = _LOWERED if label in of_stages else _RAISED
        ax.bar(at, 0 if np.isnan(k) else k, color='none' if skipped else colour, edgecolor=colour, width=0.7)
        if skipped:
            ax.text(at, (0 if np.isnan(k) else k) + 0.02, 'skipped', rotation=90, ha='center', fontsize=7, color=_INK)
        elif len(labels) <= 20:
            ax.text(at, k + 0.02, f'{k:.2f}', ha='center', fontsize=7, color=_INK)
    ax.set_ylim(0, 1.18)
    ax.set_yticks([0, 0.5, 1])
    _block_axis(ax, [f'stage {label}' if label in of_stages else label for label in labels])
    handles = [Patch(color=_RAISED, label='block')]
    if of_stages:
        handles.append(Patch(color=_LOWERED, label='whole stage'))
    if any(t['skipped'][0] for t in records):
        handles.append(Patch(facecolor='none', edgecolor=_INK, label='skipped'))
    ax.legend(handles=handles, fontsize=8, ncols=3, loc='lower right', bbox_to_anchor=(1, 1), frameon=False)
    _caption(ax, 'FA: k, how much of each block is used')


def _map_rows(
    maps: list[tuple[str, np.ndarray]], grey: np.ndarray, caption: str, row_name: str
) -> tuple[float, Callable[[SubFigure], None]]:
    """Small maps: a row for each path or group, in as many lines as the blocks need."""
    paths = maps[0][1].shape[0]
    lines = [maps[i : i + _MAPS_IN_ROW] for i in range(0, len(maps), _MAPS_IN_ROW)]

    def draw(figure: SubFigure) -> None:
        _caption(figure, f'{caption}, dark to bright from its least to its most (number: its peak over its mean)')
        axes = _axes(figure, paths * len(lines), _MAPS_IN_ROW, left=0.35, top=0.4, bottom=0.2, hspace=0.35)
        for ax in axes.flat:
            ax.set_axis_off()
        for i, line in enumerate(lines):
            for path in range(paths):
                for ax, (name, value) in zip(axes[i * paths + path], line, strict=False):
                    ax.set_axis_on()
                    v = value[path]
                    _overlay(ax, grey, v, interpolation='nearest')
                    ax.set_title(block_label(name) if path == 0 else '', fontsize=8, pad=2)
                    ax.set_xlabel(f'{np.nanmax(v) / np.nanmean(v):.1f}', fontsize=7, labelpad=1)
                if paths > 1:
                    axes[i * paths + path, 0].set_ylabel(f'{row_name} {path}', fontsize=7)

    return 0.35 + 1.08 * paths * len(lines), draw


def _weights(figure: SubFigure, trace: Trace) -> None:
    ax = _axes(figure)[0, 0]
    gates = ', '.join(dict.fromkeys(t['gate'].upper() for t in trace.values()))
    for at, t in enumerate(trace.values()):
        v = t['weight'][0][np.isfinite(t['weight'][0])]
        if len(v):
            low, q1, median, q3, high = np.percentile(v, [0, 25, 50, 75, 100])
            ax.vlines(at, low, high, color=_STAGE, lw=1.2)
            ax.vlines(at, q1, q3, color=_INK, lw=5)
            ax.hlines(median, at - 0.35, at + 0.35, color=_RAISED, lw=2, zorder=3)
    ax.set_ylim(bottom=0)
    handles = [
        Line2D([], [], color=_STAGE, lw=1.2, label='all channels'),
        Line2D([], [], color=_INK, lw=5, label='middle half'),
        Line2D([], [], color=_RAISED, lw=2, label='median'),
    ]
    ax.legend(handles=handles, fontsize=8, ncols=3, loc='lower right', bbox_to_anchor=(1, 1), frameon=False)
    _block_axis(ax, [block_label(n) for n in trace])
    _caption(ax, f'{gates}: weights of the channels')


def _channels(figure: SubFigure, trace: Trace, grey: np.ndarray) -> None:
    """The channels that the last blocks of the stages raised and lowered most; for SPEM with their extremes."""
    last = {block_label(n).split('.')[0]: (block_label(n), t) for n, t in trace.items()}
    shown = list(last.values())[-3:]
    has_extremes = any('argmax' in t for _, t in shown)
    caption = 'Channels weighted most (orange) and least (blue)'
    if has_extremes:
        caption += ', with the position of their maximum (up) and minimum (down)'
    _caption(figure, caption)
    per_block = 2 if has_extremes else 1
    left, wspace = (0.15, 0.5) if has_extremes else (0.6, 0.35)
    ratios = dict(width_ratios=(1.9, 1)[-per_block:] * 3)
    axes = _axes(figure, 1, 3 * per_block, left=left, top=0.55, wspace=wspace, **ratios)[0]
    for ax in axes[per_block * len(shown) :]:
        ax.set_axis_off()
    h, w = grey.shape
    for i, (label, t) in enumerate(shown):
        weight = t['weight'][0]
        known = np.flatnonzero(np.isfinite(weight))  # not of channels that are zero everywhere
        order = known[np.argsort(weight[known])]
        count = min(_CHANNELS, len(order) // 2)
        chosen = [*order[:count], *order[len(order) - count :]]
        colours = [_LOWERED] * count + [_RAISED] * count
        bars = axes[i * per_block + per_block - 1]
        bars.barh(range(len(chosen)), weight[chosen], color=colours, height=0.6)
        bars.set_yticks(range(len(chosen)), [f'ch {c}' for c in chosen])
        bars.tick_params(labelsize=7, pad=2)
        bars.spines[['top', 'right']].set_visible(False)
        for at, value in enumerate(weight[chosen]):
            bars.text(value, at, f' {value:.2f}', va='center', fontsize=6, color=_INK)
        bars.set_xlim(0, 1.3 * max([*weight[chosen], 1e-6]))
        bars.set_xlabel('weight', fontsize=7)
        if not has_extremes:
            _caption(bars, f'block {label}')
            continue
        ax = axes[i * per_block]
        _show(ax, grey * 0.6 + 0.4, cmap='gray', extent=(0, w, h, 0))
        side_h, side_w = np.divide(grey.shape, t['map_size'][0])
        for c, colour in zip(chosen, colours, strict=True):
            for key, marker in (('argmax', '^'), ('argmin', 'v')):
                row, column = t[key][0, c]
                y, x = (row + 0.5) * side_h, (column + 0.5) * side_w
                ax.plot(x, y, marker, color=colour, ms=6, mec='white', mew=0.7)
        _caption(ax, f'block {label}')
