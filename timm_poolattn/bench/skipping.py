"""FA as adaptive computation: what skipping blocks with a small k saves and costs."""

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..data import ImageData
from ..inference import evaluate
from ..models import set_skip_threshold
from .timer import median_ratio, time_in_turns


def bench_skip(
    model: nn.Module,
    data: ImageData,
    thresholds: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    *,
    per_sample: bool = True,
    batch_size: int = 500,
    device: torch.device | str = 'cpu',
    repeats: int = 3,
) -> list[dict[str, float]]:
    """Measure a model on a data set with each of some thresholds.

    Args:
        model: with FA gates.
        data: as `load_images` reads it.
        thresholds: of `set_skip_threshold`; the first is what `speedup` refers to.
        per_sample: see `set_skip_threshold`.
        batch_size: images that are evaluated at once.
        device: where the model runs.
        repeats: passes over the data for a threshold, in turns.

    Returns:
        For each `threshold`: `top1` in %, `blocks_run` (share of all blocks of all images), and the medians
        `images_per_s` and `speedup`, the time of the first threshold over this one's within one turn.

    Raises:
        UserError: a model without FA, or a threshold outside [0, 1].
    """
    set_skip_threshold(model, 0)  # refuses a model without FA
    ran = [0]
    stages = [m for m in model.modules() if hasattr(m, 'skip_threshold')]
    blocks = [b for stage in stages for b in (stage.blocks if hasattr(stage, 'blocks') else [stage.body])]
    rows: dict[float, dict[str, Any]] = {threshold: dict(threshold=threshold) for threshold in thresholds}

    def run(threshold: float) -> None:
        set_skip_threshold(model, threshold, per_sample)
        ran[0] = 0
        top1 = evaluate(model, data, batch_size=batch_size, device=device)['top1']
        rows[threshold].update(top1=top1, blocks_run=ran[0] / (len(blocks) * len(data)))

    hooks = [b.register_forward_hook(lambda m, args, out: ran.__setitem__(0, ran[0] + len(args[0]))) for b in blocks]
    try:
        seconds = time_in_turns({t: lambda t=t: run(t) for t in rows}, repeats)
    finally:
        set_skip_threshold(model, 0)
        for hook in hooks:
            hook.remove()
    first = seconds[thresholds[0]]
    for threshold, row in rows.items():
        row['images_per_s'] = len(data) / statistics.median(seconds[threshold])
        row['speedup'] = median_ratio(first, seconds[threshold])
    return list(rows.values())
