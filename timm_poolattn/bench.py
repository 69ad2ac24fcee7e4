"""Measurements, printed and never asserted: medians, and ratios within one run."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import torch
from torch import nn
from tqdm import tqdm

from .data import ImageData
from .inference import evaluate

_IMPORT = """
import json, time
start = time.perf_counter()
import timm
middle = time.perf_counter()
import timm_poolattn
print(json.dumps([middle - start, time.perf_counter() - middle]))
"""


def bench_import(runs: int = 5) -> dict[str, float]:
    """What `import timm_poolattn` adds to `import timm`, in fresh processes.

    Args:
        runs: processes. Default: 5.

    Returns:
        Medians `timm_ms` and `timm_poolattn_ms`, and the median `ratio` of the second to the first.
    """
    times = []
    for _ in tqdm(range(runs), desc='importing', delay=1, leave=False):
        done = subprocess.run([sys.executable, '-c', _IMPORT], capture_output=True, text=True, check=True)
        times.append(json.loads(done.stdout))
    return dict(
        timm_ms=1000 * statistics.median(t for t, _ in times),
        timm_poolattn_ms=1000 * statistics.median(t for _, t in times),
        ratio=statistics.median(ours / timm for timm, ours in times),
    )


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
    """What skipping blocks with a small k saves and costs, on a data set.

    Args:
        model: with FA gates.
        data: as `load_images` reads it.
        thresholds: of `set_skip_threshold`; the first is what `speedup` refers to. Default: 0 to 0.9.
        per_sample: see `set_skip_threshold`. Default: True.
        batch_size: Default: 500.
        device: Default: 'cpu'.
        repeats: passes over the data for a threshold, in turns. Default: 3.

    Returns:
        For each `threshold`: `top1` in %, `blocks_run` (share of all blocks of all images), and the medians
        `images_per_s` and `speedup`, the time of the first threshold over this one's within one turn.
    """
    ran = [0]
    blocks = [b for stage in model.stages for b in (stage.blocks if hasattr(stage, 'blocks') else [stage.body])]
    hooks = [b.register_forward_hook(lambda m, args, out: ran.__setitem__(0, ran[0] + len(args[0]))) for b in blocks]
    rows = [dict(threshold=t) for t in thresholds]
    seconds: list[list[float]] = [[] for _ in thresholds]
    try:
        for _ in tqdm(range(repeats), desc='measuring', unit='turn', delay=1, leave=False):
            for row, times in zip(rows, seconds, strict=True):
                model.set_skip_threshold(row['threshold'], per_sample=per_sample)
                ran[0] = 0
                start = time.perf_counter()
                row['top1'] = evaluate(model, data, batch_size=batch_size, device=device)['top1']
                times.append(time.perf_counter() - start)
                row['blocks_run'] = ran[0] / (len(blocks) * len(data))
    finally:
        model.set_skip_threshold(0)
        for hook in hooks:
            hook.remove()
    for row, times in zip(rows, seconds, strict=True):
        row['images_per_s'] = len(data) / statistics.median(times)
        row['speedup'] = statistics.median(first / t for first, t in zip(seconds[0], times, strict=True))
    return rows
