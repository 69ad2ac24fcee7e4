"""Where the release folders are, and what names the Hub organisation of their repositories."""

from pathlib import Path

#: Environment variable that names the organisation whose Hub repositories `pretrained=True` uses.
HUB_ORG = 'TIMM_POOLATTN_HUB_ORG'


def hub_configs_dir() -> Path:
    """Return the release folders: inside an installed package, or beside the package in a source checkout."""
    package = Path(__file__).parent.parent
    packaged = package / 'hub_configs'
    return packaged if packaged.is_dir() else package.parent / 'hub_configs'


def released() -> dict[str, Path]:
    """Release folders by `<arch>.<tag>`, in order of name."""
    return {path.parent.name: path.parent for path in sorted(hub_configs_dir().glob('[!.]*/config.json'))}
