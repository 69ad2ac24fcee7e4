"""What a step holds, and what it reads and writes."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(run: Callable[[], Any], device: torch.device | str = 'cpu') -> int:
    """Measure the most that `run` holds at once in tensors beyond what was there before, as the allocator counts it."""
    if torch.device(device).type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault('KINETO_LOG_LEVEL', '6')  # else the profiler writes lines of its own
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, 'trace.json')
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())['traceEvents']
    held = peak = 0
    for event in sorted((e for e in events if e.get('name') == '[memory]'), key=lambda e: float(e['ts'])):
        held += event['args']['Bytes']
        peak = max(peak, held)
    return peak


class _BytesMoved(TorchDispatchMode):
    """Counts what operations read and write: their tensor arguments and results, each once. Views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        read, written = (
            [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)] for tree in ((args, kwargs), out)
        )
        address = lambda t: t.untyped_storage().data_ptr()  # noqa: E731
        is_view = not func._schema.is_mutable and {*map(address, written)} & {*map(address, read)}
        if not is_view and 'empty' not in func.__name__:
            self.total += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in (*read, *written))
        return out


def bytes_moved(run: Callable[[], Any]) -> int:
    """Count what the operations of an eager `run` read and write, in bytes."""
    with _BytesMoved() as moved:
        run()
    return moved.total
