"""What our runs measured: results.json of the release folders, and of the runs that have none."""

import json
from pathlib import Path
from typing import Any

from ..models import released

#: results.json of the runs that no release folder holds, one file each.
RESULTS_DIR = Path(__file__).parent / 'results'


def load_results() -> list[dict[str, Any]]:
    """results.json of every run that we know: of the release folders, then of `RESULTS_DIR`."""
    paths = [folder / 'results.json' for folder in released().values()] + sorted(RESULTS_DIR.glob('*.json'))
    return [json.loads(path.read_text()) for path in paths]
