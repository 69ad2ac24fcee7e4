"""The one timer: contenders take turns, and only medians and ratios within one run are reported."""

import statistics
from collections.abc import Callable
from typing import Any, TypeVar

from torch.utils.benchmark import timer

Key = TypeVar('Key')


def time_in_turns(contenders: dict[Key, Callable[[], Any]], repeats: int) -> dict[Key, list[float]]:
    """Return seconds of each contender in each of `repeats` turns.

    Contenders take turns, so that what else the machine does meets all of them alike. Each runs once before, to warm
    up and to compile. The clock waits for a GPU.
    """
    for run in contenders.values():
        run()
    seconds: dict[Key, list[float]] = {key: [] for key in contenders}
    for _ in range(repeats):
        for key, run in contenders.items():
            start = timer()
            run()
            seconds[key].append(timer() - start)
    return seconds


def median_ratio(seconds: list[float], reference: list[float]) -> float:
    """Return the median over the turns of this time over the reference's in the same turn."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))
