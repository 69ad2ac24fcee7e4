"""The network that a gated one is measured beside."""

from typing import Any

import timm

from ..layers import FA_GATES, GATES


def plain_name(name: str) -> str | None:
    """Return the registered backbone of a gated model without its gate, or None for a model without one."""
    arch, _, tag = name.partition('.')
    plain, _, gate = arch.rpartition('_')
    if gate not in (*GATES, *FA_GATES):
        return None
    if timm.is_model(f'cifar_{plain}'):  # where timm owns the plain name
        plain = f'cifar_{plain}'
    return f'{plain}.{tag}' if tag else plain


def plain_args(name: str) -> dict[str, Any]:
    """Return arguments of timm.create_model for the backbone of `name` without its gate, if it has one.

    The form of a backbone depends on the paper that a gate comes from: `flavour`.
    """
    plain = plain_name(name)
    flavour = getattr(timm.create_model(name, device='meta'), 'flavour', None) if plain else None
    return dict(model_name=plain or name, **(dict(flavour=flavour) if flavour else {}))
