"""The one look-up of devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:
    import torch


def look_up_device(name: str | None = None) -> torch.device:
    """Return the device of that name once a tensor was on it and came back; by default cuda where there is one.

    Raises:
        UserError: no such device here.
    """
    import torch  # which takes seconds, and most who import this room do not need it

    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
        torch.ones(1, device=device).cpu()
    except (
        RuntimeError,
        NotImplementedError,
        AssertionError,
    ) as e:  # no such name, no data, no drivers
        there = ['cpu', *(f'cuda:{i}' for i in range(torch.cuda.device_count()))]
        there += ['mps'] if torch.backends.mps.is_available() else []
        raise UserError(f'no device {name!r} here; choose from {", ".join(there)}') from e
    return device
