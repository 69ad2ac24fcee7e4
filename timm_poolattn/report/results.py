"""What our runs measured: results.json of the release folders, and of the runs that have none."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..papers import DATASETS
from ..utils import MissingFileError, UserError, look_up, released

#: results.json of the runs that no release folder holds, one file each.
RESULTS_DIR = Path(__file__).parent / 'results'
#: What train_scripts/insert_gates.py measured, one file for each run.
INSERTIONS_DIR = RESULTS_DIR / 'insertions'

#: What every run says.
_KEYS = {'model', 'tag', 'test', 'arguments', 'options', 'epochs', 'seed', 'curve'}
#: What run.json must say.
_OF_A_RUN = {'arguments', 'options', 'seed', 'hardware', 'wall_time_s', 'test_images'}


def read_results(path: str | Path) -> dict[str, Any]:
    """Read results.json, given as such or by its release folder, or the same of a run's folder: see `run_results`.

    Raises:
        MissingFileError: no such file.
        UserError: a file of another kind, or a run that has evaluated nothing.
    """
    path = Path(path)
    file = path / 'results.json' if path.is_dir() else path
    if not file.is_file() and (path / 'run.json').is_file():
        return run_results(path)
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


def run_results(folder: Path) -> dict[str, Any]:
    """Return what results.json would have of a run that has ended, its accuracy as the run itself measured it.

    Raises:
        UserError: a run that has not ended, did not evaluate its last epoch, of another model than ours, of other
            classes than its tag's, or of an older version, which did not record all of this.
    """
    import timm

    from ..models import FAMILIES, multiply_adds  # torch and timm take seconds, and results files need neither
    from ..training import read_run

    run = read_run(folder)
    last = run.curve[-1] if run.curve else {}
    epochs, wanted = int(last.get('epoch', -1)) + 1, run.args.get('epochs') or 0
    if epochs < wanted or 'eval_top1' not in last:
        raise UserError(
            f'{folder}: {epochs} of {wanted} epochs, the last {"" if "eval_top1" in last else "not "}evaluated; go on'
            f' with --resume auto, or train with a --val-split'
        )
    if missing := _OF_A_RUN - run.record.keys():
        raise UserError(f'{folder}: run.json has no {min(missing)}; `poolattn hub release` and name its folder')
    model = run.untrained_model()
    arch, tag = model.pretrained_cfg['architecture'], model.pretrained_cfg['tag']
    look_up('model', arch, timm.list_models(module=FAMILIES), f'{folder}: the report is of our models')
    classes = run.record.get('classes', [])
    if classes and classes != DATASETS.get(tag, {}).get('classes', classes):
        said = f'its {len(classes)} classes ({classes[0]}, ...) are not those of {tag}'
        raise UserError(f'{folder}: {said}: no table of the papers has it')
    facts = {k: v for k, v in run.record.items() if k not in ('classes', 'ended')}
    return dict(
        facts,
        model=arch,
        tag=tag,
        gate=model.gate,
        parameters=sum(p.numel() for p in model.parameters()),
        multiply_adds=multiply_adds(model),
        epochs=epochs,
        checkpoint=dict(which='last'),
        test=dict(top1=last['eval_top1'], images=run.record['test_images']),
        curve=run.curve,
    )


def with_results(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Return `load_results` and what `read_results` reads of `paths`, each once: of a run and its release, the release.

    Raises:
        As `read_results`.
    """
    found: dict[str, dict[str, Any]] = {}
    for result in [*load_results(), *map(read_results, paths)]:
        if 'weights' in result or _identity(result) not in found:  # a release measured again what its run did
            found[_identity(result)] = result
    return list(found.values())


def _identity(result: dict[str, Any]) -> str:
    """Return what is the same of a run and of its release."""
    facts = [result[k] for k in ('model', 'seed', 'arguments', 'options')]
    curve = [(row.get('epoch'), row.get('train_loss'), row.get('eval_top1')) for row in result['curve']]
    return json.dumps([*facts, curve], sort_keys=True)


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
