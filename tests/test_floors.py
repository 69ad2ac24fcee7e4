"""Imports only go down: each room lies on a floor, and takes from lower floors alone."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / 'timm_poolattn'
FLOORS = (
    ('version', 'utils', 'papers'),
    ('layers',),
    ('models',),
    ('data',),
    ('inference', 'export'),
    ('training',),
    ('hub', 'explain', 'bench'),
    ('report',),
    ('cli',),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix('.py')


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a module takes from, by its relative imports and those of the package's name."""
    package = path.relative_to(PACKAGE).parts[:-1]
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else None
            names = (node.module or '').split('.') if node.module else []
            if node.level == 0:
                if names[:1] != ['timm_poolattn']:
                    continue
                base, names = (), names[1:]
            parts = (*base, *names)
            rooms |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            rooms |= {(a.name.split('.') + [''])[1] for a in node.names if a.name.split('.')[0] == 'timm_poolattn'}
    return rooms


@pytest.mark.parametrize('path', sorted(PACKAGE.rglob('*.py')), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_go_down(path):
    room = room_of(path.relative_to(PACKAGE).parts)
    if room in ('__init__', '__main__'):
        return
    upwards = {other for other in imported_rooms(path) - {room} if FLOOR[other] >= FLOOR[room]}
    assert not upwards, f'{path.relative_to(PACKAGE)} takes from {", ".join(sorted(upwards))}'
