"""The one look-up of names."""

import difflib
from collections.abc import Iterable

from .errors import UserError


def look_up(kind: str, name: str, known: Iterable[str], hint: str = '') -> str:
    """Return `name` if it is one of `known`.

    Args:
        kind: what is named, for the message: 'model', 'recipe', 'gate', ...
        name: as the user gave it.
        known: what there is.
        hint: what to do else, for the end of the message.

    Raises:
        UserError: no such name; the message lists the nearest, or all where there are few.
    """
    known = list(known)
    if name in known:
        return name
    near = difflib.get_close_matches(str(name), known, n=3)
    if len(known) <= 12:
        rest = f'choose from {", ".join(known)}' if known else 'there is none'
    else:
        rest = f'nearest: {", ".join(near)}' if near else 'no name is near'
    raise UserError('; '.join(filter(None, [f'unknown {kind} {name!r}', rest, hint])))
