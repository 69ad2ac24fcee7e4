"""What importing costs."""

import json
import statistics
import subprocess
import sys

from ..utils import progress

_IMPORT = """
import json, time
start = time.perf_counter()
import timm
middle = time.perf_counter()
import timm_poolattn
print(json.dumps([middle - start, time.perf_counter() - middle]))
"""


def bench_import(runs: int = 5) -> dict[str, float]:
    """Measure what `import timm_poolattn` adds to `import timm`, in `runs` fresh processes.

    Returns:
        Medians `timm_ms` and `timm_poolattn_ms`, and the median `ratio` of the second to the first.
    """
    times = []
    for _ in progress(range(runs), desc='importing'):
        done = subprocess.run([sys.executable, '-c', _IMPORT], capture_output=True, text=True, check=True)
        times.append(json.loads(done.stdout))
    return dict(
        timm_ms=1000 * statistics.median(t for t, _ in times),
        timm_poolattn_ms=1000 * statistics.median(t for _, t in times),
        ratio=statistics.median(ours / timm for timm, ours in times),
    )
