"""Default configs: the data sets' facts, overlaid by the release folders of `hub_configs`."""

import difflib
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import timm
from timm.models import generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import nn

from ..papers import DATASETS
from ..utils import HUB_ORG, UserError, look_up, released
from ._pretrained import fetch_weights, hub_org

#: Modules of models, as timm.list_models(module=...) names them.
FAMILIES = ('cifar_inception_v4', 'cifar_resnet', 'cifar_resnext', 'cifar_vgg', 'gated_resnet')
#: Arguments that say what a model is for, not how it is built. timm reads them from elsewhere in a config.json.
_HEAD_ARGS = ('in_chans', 'num_classes')


def data_config(tag: str) -> dict[str, Any]:
    """Return what timm's PretrainedCfg holds of the data set `tag`; empty for a user's own."""
    return {k: v for k, v in DATASETS.get(tag, {}).items() if k in ('num_classes', 'input_size', 'mean', 'std')}


def release_args(name: str) -> dict[str, Any]:
    """Read the arguments besides its name's that a release was built with, from its folder's config.json."""
    folder = released().get(name)
    if folder is None:
        return {}
    args = _read_config(folder).get('model_args', {})
    return {k: v for k, v in args.items() if k not in _HEAD_ARGS}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / 'config.json'
    try:
        config = json.loads(path.read_text('utf-8'))
        return dict(config, pretrained_cfg=dict(config['pretrained_cfg'], label_names=config['label_names']))
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f'{path}: not of a release ({e!r}); release it again, or remove the folder') from e


def read_default_cfgs(archs: Iterable[str], pool_size: Callable[[int], int], **cfg) -> dict[str, Any]:
    """Build timm's default_cfgs for `archs`: a tag for each of `DATASETS`, and for each release folder of another tag.

    Each is overlaid by its release folder if any.

    Weights are the folder's where it holds them, else the Hub's: a wheel carries the small ones alone. With `HUB_ORG`
    set, every name has a repository of that organisation, released by us or not.

    Args:
        archs: model names without a tag.
        pool_size: side of the map before global pooling, by the side of the image.
        **cfg: what all of them share, as in timm's PretrainedCfg.
    """
    folders = released()
    cfgs = {}
    for arch in archs:
        # timm's default is the first tag with weights; with HUB_ORG all tags have some, so those of a folder go first
        tags = sorted(DATASETS, key=lambda tag: f'{arch}.{tag}' not in folders)
        own = (name.partition('.')[2] for name in folders if name.startswith(f'{arch}.'))
        for tag in [*tags, *(tag for tag in own if tag not in DATASETS)]:
            name, dataset = f'{arch}.{tag}', data_config(tag)
            side = pool_size(dataset.get('input_size', (3, 32, 32))[-1])
            cfgs[name] = dict(interpolation='bicubic', crop_pct=1.0, pool_size=(side, side), **dataset, **cfg)
            if name in folders:
                facts = _read_config(folders[name])['pretrained_cfg']
                cfgs[name].update({k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()})  # as in timm
                weights = folders[name] / 'model.safetensors'
                if weights.is_file():
                    cfgs[name]['file'] = str(weights)
            if name in folders or os.environ.get(HUB_ORG):
                cfgs[name]['hf_hub_id'] = f'{hub_org()}/{name}'
    return generate_default_cfgs(cfgs)


def no_weights(name: str) -> UserError:
    """Return the error for a model, tagged or not, without weights. It names what has them: other tags, near models."""
    arch, _, tag = name.partition('.')
    backbone, _, gate = arch.rpartition('_')
    if arch in timm.list_models(module='gated_resnet'):
        overlay = f'pretrained_cfg_overlay=dict(hf_hub_id={timm.get_pretrained_cfg(backbone).hf_hub_id!r})'
        return UserError(f'{name} has no weights; with identity_init=True it takes those of {backbone}: {overlay}')

    def nearness(other: str) -> tuple[bool, bool, float]:
        other_arch, _, other_tag = other.partition('.')
        alike = difflib.SequenceMatcher(None, arch, other_arch).ratio()
        return other_arch != arch, bool(tag) and other_tag != tag, -alike - (other_arch.rpartition('_')[2] == gate)

    near = sorted(released(), key=nearness)
    tags = [other for other in near if other.partition('.')[0] == arch]
    found = f'it has them as {", ".join(tags)}' if tags else f'near models have: {", ".join(near[:3]) or "none"}'
    return UserError(f'{name} has no weights yet; {found}. `poolattn list --trained` shows all')


def check_model_name(name: str) -> str:
    """Return `name`, tagged or not, if timm or we have such a model; what a Hub or a folder holds is timm's to resolve.

    Raises:
        UserError: there is none; the message names the nearest, ours first.
    """
    if ':' in name or name in (known := timm.list_models(include_tags='.' in name)):
        return name
    ours = timm.list_models(module=FAMILIES, include_tags='.' in name)
    near = bool(difflib.get_close_matches(name, ours))
    hint = f'local-dir:{name} is the model in that folder' if os.path.isdir(name) else '`poolattn list` shows ours'
    return look_up('model', name, ours if near else known, hint)


def register_models(module: str, create: Callable[..., nn.Module], model_args: dict[str, dict[str, Any]]) -> None:
    """Define and register an entrypoint for each of `model_args` in `module`, which holds their default_cfgs.

    Args:
        module: its name.
        create: called with the entrypoint's name, `pretrained` and its arguments.
        model_args: by name; arguments of timm.create_model override them.
    """

    def entrypoint(name: str, args: dict[str, Any]) -> Callable[..., nn.Module]:
        def fn(pretrained: bool = False, **kwargs) -> nn.Module:
            overlay = kwargs.get('pretrained_cfg_overlay') or {}
            if overlay.get('hf_hub_id') or overlay.get('url'):  # above which timm ranks what a release has
                overlay = kwargs['pretrained_cfg_overlay'] = {'file': None, 'hf_hub_id': None, **overlay}
            cfg = resolve_pretrained_cfg(name, kwargs.get('pretrained_cfg'), overlay)
            built = {}
            if pretrained:
                if not (cfg.has_weights or cfg.state_dict):
                    raise no_weights(f'{name}.{cfg.tag}' if kwargs.get('pretrained_cfg') else name)
                fetch_weights(cfg, kwargs.get('cache_dir'))
                if not (cfg.source or overlay.get('file')):  # of another source, timm passes the arguments itself
                    built = release_args(f'{name}.{cfg.tag}')
            return create(name, pretrained, **{**args, **built, **kwargs})

        fn.model_args = args
        fn.__name__ = fn.__qualname__ = name
        fn.__module__ = module
        fn.__doc__ = f'{name}: {", ".join(f"{k}={v!r}" for k, v in args.items())}; see `{create.__name__}`.'
        return register_model(fn)

    vars(sys.modules[module]).update({name: entrypoint(name, args) for name, args in model_args.items()})
