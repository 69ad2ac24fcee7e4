"""What exists: every model with its gate and size, and the accuracy of those with a release folder.

All of it is read from files: torch and timm take seconds to load.
"""

from fnmatch import fnmatchcase
from typing import Any

from ..utils import released
from .counts import packaged_counts
from .results import released_results


def list_models(filter: str = '*', *, trained: bool = False) -> list[dict[str, Any]]:
    """Return our models, by family and in order of name.

    Args:
        filter: a name, with the tag of its weights or without, or a pattern as in timm.list_models; one with a dot is
            of both.
        trained: list those with weights alone.

    Returns:
        For each `model`, `family`, `gate` (None for none), `parameters` and `multiply_adds` of its default form, and
        of those trained, by tag, `top1` in % and `weights`: 'packaged', or 'download' where the Hub has them.
    """
    results, folders = released_results(), released()
    rows = []
    for name, counts in packaged_counts().items():
        if not name.isidentifier():  # the papers' rows have more in their keys
            continue
        of_tag = {r['tag']: (release, r) for release, r in results.items() if r['model'] == name}
        top1 = {tag: r['test']['top1'] for tag, (_, r) in of_tag.items()}
        weights = {
            tag: 'packaged' if (folders[release] / 'model.safetensors').is_file() else 'download'
            for tag, (release, _) in of_tag.items()
        }
        full_names = [f'{name}.{tag}' for tag in top1] if '.' in (filter or '') else []  # *fa* is in ci-fa-r
        matches = any(fnmatchcase(n, filter or '*') for n in (name, *full_names))
        if matches and (top1 or not trained):
            rows.append(dict(model=name, **counts, top1=top1, weights=weights))
    return rows
