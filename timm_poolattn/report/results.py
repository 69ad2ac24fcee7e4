"""What our runs measured: results.json of the release folders, and of the runs that have none."""

import json
from pathlib import Path
from typing import Any

from ..utils import MissingFileError, UserError, released

#: results.json of the runs that no release folder holds, one file each.
RESULTS_DIR = Path(__file__).parent / 'results'
#: What train_scripts/insert_gates.py measured, one file for each run.
INSERTIONS_DIR = RESULTS_DIR / 'insertions'

#: What every run says.
_KEYS = {'model', 'tag', 'test', 'arguments', 'options', 'epochs', 'seed', 'curve'}


def read_results(path: str | Path) -> dict[str, Any]:
    """Read results.json, given as such or by its release folder.

    Raises:
        MissingFileError: no such file.
        UserError: a file of another kind.
    """
    path = Path(path)
    file = path / 'results.json' if path.is_dir() else path
    try:
        results = json.loads(file.read_text(encoding='utf-8'))
        if not results.keys() >= _KEYS or 'top1' not in results['test']:
            raise ValueError
    except FileNotFoundError:
        raise MissingFileError(f'{file}: no such file; `poolattn hub release` writes one') from None
    except OSError as e:
        raise UserError(f'{file}: cannot be read: {e.strerror}') from None
    except (ValueError, AttributeError, TypeError):
        raise UserError(f'{file}: not a results.json of `poolattn hub release`') from None
    return results


def released_results() -> dict[str, dict[str, Any]]:
    """Read results.json of the release folders that have one, by `<arch>.<tag>`."""
    files = {name: folder / 'results.json' for name, folder in released().items()}
    return {name: read_results(file) for name, file in files.items() if file.is_file()}


def load_results() -> list[dict[str, Any]]:
    """Read results.json of every run that we know: of the release folders, then of `RESULTS_DIR`."""
    return [*released_results().values(), *map(read_results, sorted(RESULTS_DIR.glob('*.json')))]


def load_insertions() -> list[dict[str, Any]]:
    """Read what train_scripts/insert_gates.py wrote into `INSERTIONS_DIR`.

    Raises:
        UserError: a file of another kind.
    """
    runs = []
    for path in sorted(INSERTIONS_DIR.glob('*.json')):
        try:
            runs.append(json.loads(path.read_text(encoding='utf-8')))
            if not {'model', 'gate', 'seed', 'epochs', 'before', 'top1', 'parameters'} <= runs[-1].keys():
                raise ValueError
        except (ValueError, AttributeError):
            raise UserError(f'{path}: not a results file of insert_gates.py; delete it, and run that again') from None
    return runs
