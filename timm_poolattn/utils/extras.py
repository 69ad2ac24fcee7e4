"""What a feature needs beyond the package's own dependencies."""

from importlib.util import find_spec

from .errors import UserError


def require(extra: str, *modules: str) -> None:
    """Refuse to go on where an extra is not installed.

    Raises:
        UserError: one of `modules` is missing; the message says what to install.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise UserError(f"this needs {', '.join(missing)}: pip install 'timm_poolattn[{extra}]'")
