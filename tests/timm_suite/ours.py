"""A pytest plugin for timm's own tests/test_models.py: it runs on our names, $TIMM_POOLATTN_NAMES, and on no others.

Some of its tests select models by module; for them `list_models` here gives ours whatever module they ask for.
"""

import os

import timm

import timm_poolattn  # noqa: F401  registers the models
from timm_poolattn.models import FAMILIES

NAMES = os.environ['TIMM_POOLATTN_NAMES'].split()
_list_models = timm.list_models


def list_models(filter='', module='', *args, **kwargs):
    ours = _list_models(filter, FAMILIES, *args, **kwargs)
    return [name for name in ours if name.split('.')[0] in NAMES]


timm.list_models = list_models
timm.list_pretrained = lambda *args, **kwargs: []


def pytest_collection_modifyitems(config, items):
    ours = [
        i for i in items if hasattr(i, 'callspec') and str(i.callspec.params.get('model_name')).split('.')[0] in NAMES
    ]
    config.hook.pytest_deselected(items=[i for i in items if i not in ours])
    items[:] = ours
