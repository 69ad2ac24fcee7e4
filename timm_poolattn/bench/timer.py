"""The one timer: contenders take turns, and only medians and ratios within one run are reported."""

import statistics
from collections.abc import Callable
from typing import Any, TypeVar

from torch.utils.benchmark import timer

Key = TypeVar('Key')


def time_in_turns(contenders: dict[Key, Callable[[], Any]], repeats: int, warm_up: int = 1) -> dict[Key, list[float]]:
    """Return seconds of each contender in each of `repeats` turns.

    Contenders take turns, so that what else the machine does meets all of them alike. The clock waits for a GPU.

    Args:
        contenders: what to run, by its name.
        repeats: turns.
        warm_up: turns before, which do not count: they compile, and a process's first steps are slower than later ones.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in contenders}
    for _ in range(warm_up + repeats):
        for key, run in contenders.items():
            start = timer()
            run()
            seconds[key].append(timer() - start)
    return {key: times[warm_up:] for key, times in seconds.items()}


def median_ratio(seconds: list[float], reference: list[float]) -> float:
    """Return the median over the turns of this time over the reference's in the same turn."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))
