"""What exists: every model with its gate and size, and the accuracy of those with a release folder."""

from typing import Any

import timm

from ..models import FAMILIES, released
from .counts import look_up_count
from .results import released_results


def list_models(filter: str = '', *, trained: bool = False) -> list[dict[str, Any]]:
    """Our models, by family and in order of name.

    Args:
        filter: a name or a pattern as in timm.list_models; all by default.
        trained: list those with weights alone.

    Returns:
        For each `model`, `family`, `gate` (None for none), `parameters` and `multiply_adds` of its default form, and
        of those trained, by tag, `top1` in % and `weights`: 'packaged', or 'download' where the Hub has them.
    """
    results, folders = released_results(), released()
    rows = []
    for family in FAMILIES:
        for name in timm.list_models(filter, module=family):
            of_tag = {r['tag']: (release, r) for release, r in results.items() if r['model'] == name}
            top1 = {tag: r['test']['top1'] for tag, (_, r) in of_tag.items()}
            weights = {
                tag: 'packaged' if (folders[release] / 'model.safetensors').is_file() else 'download'
                for tag, (release, _) in of_tag.items()
            }
            if top1 or not trained:
                counts = look_up_count(model_name=name)
                rows.append(dict(model=name, family=family, **counts, top1=top1, weights=weights))
    return rows
