"""Where the release folders are, and the Hub organisation of their repositories."""

from pathlib import Path

#: Environment variable that names the organisation whose Hub repositories `pretrained=True` uses.
HUB_ORG = 'TIMM_POOLATTN_HUB_ORG'


def carried(name: str) -> Path:
    """Return a folder that a wheel carries inside the package under its last name, and a checkout has beside it."""
    package = Path(__file__).parent.parent
    packaged = package / Path(name).name
    return packaged if packaged.is_dir() else package.parent / name


def hub_configs_dir() -> Path:
    """Return the release folders."""
    return carried('hub_configs')


def released() -> dict[str, Path]:
    """Release folders by `<arch>.<tag>`, in order of name."""
    return {path.parent.name: path.parent for path in sorted(hub_configs_dir().glob('[!.]*/config.json'))}
