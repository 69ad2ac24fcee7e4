"""Figures of what a network looked at. matplotlib and captum come with the `explain` extra."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captum.attr import LayerAttribution, LayerGradCam
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from PIL import Image, UnidentifiedImageError
from torch import nn

from ..data import read_image
from ..inference import class_names, device_of, load_pretrained, model_input, view_of
from ..utils import MissingFileError, UserError, progress, replacing
from .attention import attention_trace, block_label, evaluating, find_gates

Trace = dict[str, dict[str, Any]]

#: What a figure of `explain` says of itself in its PNG, so that running it again may replace it.
_SOFTWARE = 'timm_poolattn explain'
#: Classes with a Grad-CAM, and of a channel gate, how many of the most raised and most lowered channels are drawn.
_CLASSES = _CHANNELS = 3
#: In inches: a single model's figure is so wide; of a comparison, the width, its head and each model's row.
_WIDTH, _WIDE, _HEAD, _ROW = 7.5, 14.0, 1.75, 2.3
_MAPS_IN_ROW = 9
_RAISED, _LOWERED, _STAGE, _INK = '#c2410c', '#1d4ed8', '#94a3b8', '#334155'


def grad_cam(model: nn.Module, x: torch.Tensor, classes: Sequence[int]) -> np.ndarray:
    """Compute Grad-CAM of the network's last feature map of at least 3x3, by captum. The model is left as it was.

    Args:
        model: a timm CNN.
        x: one image (1, C, H, W), normalised.
        classes: their indices.

    Returns:
        (len(classes), H, W), each class's map with maximum 1; all 0 where nothing speaks for the class.
    """
    x = x.detach().requires_grad_()
    cams = None
    with evaluating(model), torch.enable_grad():
        for info in reversed(list(getattr(model, 'feature_info', []))):
            layer = LayerGradCam(model, model.get_submodule(info['module']))
            found = torch.cat([layer.attribute(x, target=c, relu_attributions=True).detach() for c in classes])
            sides = zip(found.shape[2:], x.shape[2:], strict=False)
            # tokens, or maps with their channels last, have other sides
            if found.ndim != 4 or any(
                abs(side * info['reduction'] - whole) > info['reduction'] for side, whole in sides
            ):
                break
            cams = found
            if min(cams.shape[2:]) >= 3:  # VGG-19's last map of a 32x32 image is a single position
                break
    if cams is None:
        raise UserError(f'{type(model).__name__} has no map of channels for Grad-CAM; convolutional networks have')
    cams = LayerAttribution.interpolate(cams, tuple(x.shape[2:]), 'bilinear')[:, 0]
    return (cams / cams.amax((1, 2), keepdim=True).clamp(min=1e-12)).cpu().numpy()


def explain(paths: Iterable[str | Path], name: str, out: str | Path, compare: Sequence[str] = ()) -> list[Path]:
    """Write a figure for each image: what trained models predict, by Grad-CAM where they see it, what their gates did.

    Args:
        paths: image files, resized as each model's config says.
        name: a model with gates, as `load_pretrained` takes it.
        out: the folder to write `<image's name>.explain.png` into.
        compare: more models, a row each below it; these may be without gates.

    Raises:
        MissingFileError: a missing image, before anything is drawn.
        UserError: as `load_pretrained`; a model without gates; a figure would replace an image, or a file that
            `explain` did not write. After the others are drawn: an image that cannot be read or drawn.
    """
    paths = list(dict.fromkeys(Path(path) for path in paths))
    for path in paths:
        if not path.exists():
            raise MissingFileError(f'{path}: no such file')
    targets = _targets(paths, Path(out))
    models = {n: load_pretrained(n) for n in (name, *compare)}
    if not find_gates(models[name]):
        raise UserError(f'{name} has no gates to explain; --compare takes it beside a model that has')
    written, unread = [], []
    for path, target in progress(targets.items(), desc='explaining', unit='image'):
        title = path.name if sum(p.name == path.name for p in paths) == 1 else f'{path.parent.name}/{path.name}'
        try:
            figure = explain_figure(models, read_image(path), title)
        except UserError as e:
            unread.append(str(e))
            continue
        written.append(save(figure, target, metadata=dict(Software=_SOFTWARE)))
    if unread:
        raise UserError(
            '; '.join([*dict.fromkeys(unread), f'{len(written)} of {len(paths)} images are drawn in {out}'])
        )
    return written


def _targets(paths: Sequence[Path], out: Path) -> dict[Path, Path]:
    """Return the figure's path for each image: no two the same, no image, and no file of another's making."""
    targets: dict[Path, Path] = {}
    for path in paths:
        stem, count = path.stem, 1
        while (target := out / f'{stem}.explain.png') in targets.values():
            stem, count = f'{path.stem}-{count + 1}', count + 1
        if target.exists():
            if any(target.samefile(p) for p in paths):
                raise UserError(f'{target}: the figure of {path} would replace this image; name another folder by -o')
            if not _is_ours(target):
                raise UserError(f'{target}: is there, and no figure of explain; move it, or name another folder by -o')
        targets[path] = target
    return targets


def _is_ours(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return image.info.get('Software') == _SOFTWARE
    except (UnidentifiedImageError, OSError):
        return False


def check_suffix(path: str | Path) -> Path:
    """Return the path of a figure.

    Raises:
        UserError: a suffix that no figure has.
    """
    path = Path(path)
    if path.suffix.lower() not in ('.png', '.svg', '.pdf'):
        raise UserError(f'{path}: a figure is .png, .svg or .pdf')
    return path


def save(figure: Figure, path: str | Path, **kwargs) -> Path:
    """Write a figure as PNG, SVG or PDF by its suffix, whole or not at all.

    Args:
        figure: matplotlib's.
        path: the file.
        **kwargs: of Figure.savefig.

    Raises:
        UserError: another suffix, or a `path` that cannot be written.
    """
    path = check_suffix(path)
    with replacing(path) as temp:
        figure.savefig(temp, dpi=130, facecolor='white', format=path.suffix[1:].lower(), **kwargs)
    return path


def plain_text(text: str, length: int = 60) -> str:
    """Return `text` for matplotlib to print as it is, on one line: no formula, cut in the middle beyond `length`."""
    text = ' '.join(text.split()).encode('utf-8', 'replace').decode()  # a file name may hold bytes that are no UTF-8
    if len(text) > length:
        text = f'{text[: (length - 1) // 2]}…{text[-(length // 2) :]}'
    return text.replace('$', r'\$')


@dataclass
class Account:
    """What a model makes of an image.

    Attributes:
        name: to print.
        pixels: (H, W, 3) in [0, 1], what goes into it; `grey` is (H, W).
        predictions: the most probable classes and their probabilities.
        labels: of the classes that `cams` are of; `whose` most probable ones they are.
        cams: as `grad_cam` returns them.
        trace: as `attention_trace` returns it; empty without gates.
    """

    name: str
    pixels: np.ndarray
    predictions: list[tuple[str, float]]
    labels: list[str]
    whose: str
    cams: np.ndarray
    trace: Trace

    @property
    def grey(self) -> np.ndarray:
        return self.pixels.mean(2)

    def with_key(self, key: str) -> Trace:
        return {n: t for n, t in self.trace.items() if key in t}


def accounts(models: dict[str, nn.Module], image: Image.Image, title: str) -> Iterator[Account]:
    """Yield what each model makes of `image`, one after the other.

    Args:
        models: by the name to print.
        image: of any size.
        title: of the image, for messages.

    Raises:
        UserError: as `explain_figure`.
    """
    first, shared = next(iter(models.items())), None
    for name, model in models.items():
        x = model_input(model, image, title).to(device_of(model))
        pixels = view_of(model)(image).astype(np.float32) / 255
        with torch.no_grad(), evaluating(model):
            probabilities = model(x).float().softmax(1)[0]
        if not probabilities.isfinite().all():
            raise UserError(f'{name}: its outputs are not finite; its weights are damaged, or its training diverged')
        top = probabilities.topk(min(_CLASSES, len(probabilities)))
        names, own = class_names(model), top.indices.tolist()
        shared = own if shared is None else shared
        same = names == class_names(first[1])  # Grad-CAMs to compare are of the same classes
        classes = shared if same else own
        yield Account(
            name=name,
            pixels=np.broadcast_to(pixels, (*pixels.shape[:2], 3)),
            predictions=[(names[i], p) for i, p in zip(own, top.values.tolist(), strict=True)],
            labels=[names[i] for i in classes],
            whose=first[0] if same else name,
            cams=grad_cam(model, x, classes),
            trace=attention_trace(model, x) if find_gates(model) else {},
        )


def explain_figure(models: dict[str, nn.Module], image: Image.Image, title: str = '') -> Figure:
    """Draw the figure of `explain` for one image: all that one model did, or of several a row each.

    Args:
        models: by the name to print.
        image: of any size.
        title: none by default.

    Raises:
        UserError: a model without a map for Grad-CAM, of other than 1 or 3 channels, or with outputs not finite; or an
            image that `View` refuses.
    """
    made = list(accounts(models, image, title or 'image'))
    return _single(made[0], image, title) if len(made) == 1 else _comparison(made, image, title)


def _single(account: Account, image: Image.Image, title: str) -> Figure:
    rows = _rows(account, image)
    height = sum(h for h, _ in rows)
    # rows have heights in inches and margins of their own: matplotlib's layout engines take seconds for so many axes
    figure = Figure(figsize=(_WIDTH, height + 0.3))
    head, *parts = figure.subfigures(1 + len(rows), 1, height_ratios=(0.3, *(h for h, _ in rows)))
    head.text(0.5, 0.3, plain_text(title), ha='center', fontsize=10, color=_INK)
    for part, (_, draw) in zip(parts, rows, strict=True):
        draw(part)
    return figure


def _comparison(accounts: list[Account], image: Image.Image, title: str) -> Figure:
    figure = Figure(figsize=(_WIDE, _HEAD + _ROW * len(accounts)))
    head, *rows = figure.subfigures(1 + len(accounts), 1, height_ratios=(_HEAD, *[_ROW] * len(accounts)))
    left, right = head.subfigures(1, 2, width_ratios=(1, 4))
    _show(_axes(left, left=0.2, top=0.15, bottom=0.15)[0, 0], _thumbnail(image))
    right.text(0, 0.8, plain_text(title, 100), fontsize=13, fontweight='bold')
    lines = [
        f'image, {image.width}x{image.height}',
        'Grad-CAM: where the last feature map speaks for a class (bright: most).',
        f'Its classes are those that {plain_text(accounts[0].name)} finds most probable; of a model trained on other'
        ' classes, its own.',
    ]
    right.text(0, 0.65, '\n'.join(lines), fontsize=10, va='top', color=_INK, linespacing=1.5)
    for row, account in zip(rows, accounts, strict=True):
        row.add_artist(Line2D([0.01, 0.99], [0.99, 0.99], color=_STAGE, lw=0.8, transform=row.transSubfigure))
        _comparison_row(row, account)
    return figure


def _comparison_row(row: SubFigure, account: Account) -> None:
    row.text(0.014, 0.94, plain_text(account.name), fontsize=12, fontweight='bold', va='top')
    seen, bars, cams, gates = row.subfigures(1, 4, width_ratios=(1.55, 1.85, 4.6, 6))
    margins = dict(top=0.6, bottom=0.3)
    ax = _axes(seen, left=0.2, **margins)[0, 0]
    _show(ax, account.pixels)
    ax.set_xlabel('as it sees it, {1}x{0}'.format(*account.pixels.shape), fontsize=8)
    _bars(_axes(bars, left=0.1, **margins)[0, 0], account.predictions, 20)
    _cams(cams, account, f'Grad-CAM, classes most probable to {plain_text(account.whose, 24)}', 20, y=0.93)
    _main_gate(gates, account)


def _main_gate(figure: SubFigure, account: Account) -> None:
    """Draw what tells most of a model's gates, in one row."""
    maps = next(filter(None, ((key, account.with_key(key)) for key in MAPS if account.with_key(key))), None)
    if fa := account.with_key('k'):
        _fa_bars(figure, fa)
    elif spem := account.with_key('pool_lambda'):
        lambda_axes(_axes(figure, left=1.05)[0, 0], *lambdas(spem))
    elif maps:
        key, trace = maps
        chosen = np.unique(np.linspace(0, len(trace) - 1, _MAPS_IN_ROW - 1).round().astype(int))
        items = [list(trace.items())[i] for i in chosen]
        caption, row_name = MAPS[key]
        parts = max(t[key].shape[1] for _, t in items)
        mean = f', mean of {parts} {row_name}s' if parts > 1 else ''
        some = f', {len(items)} of {len(trace)}' if len(items) < len(trace) else ''
        _caption(figure, f'{caption}{some}{mean} (number: its peak over its mean)', y=0.93)
        for ax, (name, t) in zip(_axes(figure, 1, len(items), left=0.2, top=0.4)[0], items, strict=True):
            _map(ax, account.grey, t[key][0].mean(0), block_label(name))
    elif account.trace:
        _weights(figure, account.trace)
    else:
        _caption(figure, 'no gates', y=0.93)


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
    """Make (rows, columns) axes inside margins in inches; the gaps are in parts of an axis, as in matplotlib."""
    width, height = row.bbox.width / row.figure.dpi, row.bbox.height / row.figure.dpi
    margins = dict(left=left / width, right=1 - 0.15 / width, top=1 - top / height, bottom=bottom / height)
    grid = dict(margins, wspace=wspace, hspace=hspace)
    return row.subplots(rows, columns, squeeze=False, gridspec_kw=grid, **kwargs)


def _thumbnail(image: Image.Image) -> np.ndarray:
    small = image.convert('RGB')
    small.thumbnail((600, 600))
    return np.asarray(small)


#: Of the maps that a gate makes: what a row of them says, and the name of its parts.
MAPS = dict(
    score_map=('SAAM: score map V of each block', 'path'), spatial=('Weight of each position, by block', 'group')
)


def _rows(account: Account, image: Image.Image) -> list[tuple[float, Callable[[SubFigure], None]]]:
    """Return the rows of a single model's figure: height in inches and what draws them."""
    whose = 'Grad-CAM: where the last feature map speaks for its most probable classes (bright: most)'
    rows: list[tuple[float, Callable[[SubFigure], None]]] = [
        (2.3, lambda f: _predictions(f, account, image)),
        (2.6, lambda f: _cams(f, account, whose, 30)),
    ]
    if fa := account.with_key('k'):
        rows.append((2.2, lambda f: _fa_bars(f, fa)))
    if spem := account.with_key('pool_lambda'):
        rows.append((1.9, lambda f: lambda_axes(_axes(f, left=1.05)[0, 0], *lambdas(spem))))
    for key, (caption, row_name) in MAPS.items():
        maps = [(n, t[key][0]) for n, t in account.with_key(key).items()]
        if maps:
            rows.append(_map_rows(maps, account.grey, caption, row_name))
    if weights := account.with_key('weight'):
        rows.append((1.9, lambda f: _weights(f, weights)))
        rows.append((2.6, lambda f: _channels(f, weights, account.grey)))
    return rows


def _caption(ax_or_figure: Axes | SubFigure, text: str, y: float | None = None) -> None:
    if isinstance(ax_or_figure, Axes):
        ax_or_figure.set_title(text, fontsize=9, loc='left', color=_INK)
    else:
        if y is None:  # as far from the top however tall it is
            y = 1 - 0.03 * ax_or_figure.figure.dpi / ax_or_figure.bbox.height
        ax_or_figure.text(0.02, y, text, fontsize=9, va='top', color=_INK)


def _show(ax: Axes, pixels: np.ndarray, **kwargs) -> None:
    ax.imshow(pixels, vmin=0, vmax=1, interpolation='nearest', **kwargs)
    ax.set_xticks([])
    ax.set_yticks([])


def overlay(ax: Axes, grey: np.ndarray, heat: np.ndarray, **kwargs) -> None:
    """Draw a heat map over the grey image; it may have fewer pixels."""
    h, w = grey.shape
    _show(ax, grey, cmap='gray', extent=(0, w, h, 0))
    ax.imshow(heat, cmap='inferno', alpha=0.65, extent=(0, w, h, 0), **kwargs)


def _predictions(figure: SubFigure, account: Account, image: Image.Image) -> None:
    figure.text(0.5, 0.99, plain_text(account.name), fontsize=13, fontweight='bold', ha='center', va='top')
    ratios = dict(width_ratios=(1, 1, 1.3))
    (original, seen, bars) = _axes(figure, 1, 3, left=0.15, top=0.55, bottom=0.05, wspace=0.1, **ratios)[0]
    _show(original, _thumbnail(image))
    _caption(original, f'image, {image.width}x{image.height}')
    _show(seen, account.pixels)
    _caption(seen, 'as the model sees it, {1}x{0}'.format(*account.pixels.shape))
    _bars(bars, account.predictions, 30)
    _caption(bars, 'prediction')


def _bars(ax: Axes, predictions: Sequence[tuple[str, float]], length: int) -> None:
    """Draw probabilities as bars; the names stand above them, where long ones have room."""
    for y, (label, value) in enumerate(predictions):
        ax.barh(y, value, height=0.28, color=_STAGE)
        ax.text(0, y - 0.2, plain_text(label, length), fontsize=9)
        ax.text(1, y - 0.2, f'{value:.1%}', fontsize=9, ha='right')
    ax.set_xlim(0, 1)
    ax.set_ylim(_CLASSES - 0.7, -0.6)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


def _cams(figure: SubFigure, account: Account, caption: str, length: int, y: float | None = None) -> None:
    _caption(figure, caption, y)
    axes = _axes(figure, 1, len(account.cams), left=0.15, bottom=0.42)[0]
    for ax, cam, label in zip(axes, account.cams, account.labels, strict=True):
        overlay(ax, account.grey, cam, vmin=0, vmax=1, interpolation='bilinear')
        ax.set_xlabel(plain_text(label, length) + ('' if cam.any() else '\nnothing speaks for it'), fontsize=9)


def lambdas(trace: Trace) -> tuple[list[str], list[float]]:
    """Return the labels of SPEM's blocks, and lambda of each."""
    return [block_label(n) for n in trace], [float(t['pool_lambda'][0]) for t in trace.values()]


def lambda_axes(ax: Axes, labels: Sequence[str], values: Sequence[float]) -> None:
    """Draw SPEM's lambda over depth.

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


def fa_blocks(trace: Trace) -> list[tuple[str, float, bool, bool]]:
    """Return of each FA gate: its label, k, if it was skipped, and if it is of a whole stage, which comes behind it."""
    labels = [block_label(n) for n in trace]
    of_stages = {label for label in labels if any(other.startswith(f'{label}.') for other in labels)}
    order = sorted(range(len(labels)), key=lambda i: (labels[i].split('.')[0], labels[i] in of_stages, i))
    records = list(trace.values())
    return [
        (
            f'stage {labels[i]}' if labels[i] in of_stages else labels[i],
            float(records[i]['k'][0]),
            bool(records[i]['skipped'][0]),
            labels[i] in of_stages,
        )
        for i in order
    ]


def _fa_bars(figure: SubFigure, trace: Trace) -> None:
    ax = _axes(figure)[0, 0]
    blocks = fa_blocks(trace)
    for at, (_, k, skipped, of_stage) in enumerate(blocks):
        colour = _LOWERED if of_stage else _RAISED
        ax.bar(at, 0 if np.isnan(k) else k, color='none' if skipped else colour, edgecolor=colour, width=0.7)
        if skipped:
            ax.text(at, (0 if np.isnan(k) else k) + 0.02, 'skipped', rotation=90, ha='center', fontsize=7, color=_INK)
        elif len(blocks) <= 20:
            ax.text(at, k + 0.02, f'{k:.2f}', ha='center', fontsize=7, color=_INK)
    ax.set_ylim(0, 1.18)
    ax.set_yticks([0, 0.5, 1])
    _block_axis(ax, [label for label, *_ in blocks])
    handles = [Patch(color=_RAISED, label='block')]
    if any(of_stage for *_, of_stage in blocks):
        handles.append(Patch(color=_LOWERED, label='whole stage'))
    if any(skipped for _, _, skipped, _ in blocks):
        handles.append(Patch(facecolor='none', edgecolor=_INK, label='skipped'))
    ax.legend(handles=handles, fontsize=8, ncols=3, loc='lower right', bbox_to_anchor=(1, 1), frameon=False)
    _caption(ax, 'FA: k, how much of each block is used')


def _map_rows(
    maps: list[tuple[str, np.ndarray]], grey: np.ndarray, caption: str, row_name: str
) -> tuple[float, Callable[[SubFigure], None]]:
    """Draw small maps: a row for each path or group, in as many lines as the blocks need."""
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
                    _map(ax, grey, value[path], block_label(name) if path == 0 else '')
                if paths > 1:
                    axes[i * paths + path, 0].set_ylabel(f'{row_name} {path}', fontsize=7)

    return 0.35 + 1.08 * paths * len(lines), draw


def _map(ax: Axes, grey: np.ndarray, value: np.ndarray, title: str) -> None:
    overlay(ax, grey, value, interpolation='nearest')
    ax.set_title(title, fontsize=8, pad=2)
    ax.set_xlabel(f'{peak_over_mean(value):.1f}', fontsize=7, labelpad=1)


def peak_over_mean(value: np.ndarray) -> float:
    """Return 1 for a map that is the same everywhere."""
    return float(np.nanmax(value) / np.nanmean(value))


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
    """Draw the channels that the stages' last blocks raised and lowered most; for SPEM with their extremes."""
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
