import tempfile
from pathlib import Path

import pytest

from timm_poolattn.utils import cache_dir


@pytest.mark.parametrize(
    'own, xdg, expected',
    [
        ('/a', '/b', '/a'),
        (None, '/b', '/b/timm_poolattn'),
        ('', '', '/home/me/.cache/timm_poolattn'),
        (None, None, '/home/me/.cache/timm_poolattn'),
        ('~/a', None, '/home/me/a'),
        ('~nosuchuser/a', None, f'{tempfile.gettempdir()}/timm_poolattn'),
    ],
)
def test_where(monkeypatch, own, xdg, expected):
    monkeypatch.setenv('HOME', '/home/me')
    for name, value in (('TIMM_POOLATTN_CACHE', own), ('XDG_CACHE_HOME', xdg)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert cache_dir() == Path(expected)
