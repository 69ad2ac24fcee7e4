"""Default configs: the data sets' facts, overlaid by the release folders of `hub_configs`."""

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from ..papers import DATASETS
from ._pretrained import HUB_ORG, fetch_weights, hub_org


def hub_configs_dir() -> Path:
    """The release folders: inside an installed package, or beside the package in a source checkout."""
    package = Path(__file__).parent.parent
    packaged = package / 'hub_configs'
    return packaged if packaged.is_dir() else package.parent / 'hub_configs'


def released() -> dict[str, Path]:
    """Release folders by `<arch>.<tag>`, in order of name."""
    return {path.parent.name: path.parent for path in sorted(hub_configs_dir().glob('[!.]*/config.json'))}


def read_default_cfgs(archs: Iterable[str], pool_size: Callable[[int], int], **cfg) -> dict[str, Any]:
    """timm's default_cfgs for `archs`, one tag for each of `DATASETS`, each overlaid by its release folder if any.

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
        for tag in sorted(DATASETS, key=lambda tag: f'{arch}.{tag}' not in folders):
            name, dataset = f'{arch}.{tag}', DATASETS[tag]
            side = pool_size(dataset['input_size'][-1])
            cfgs[name] = dict(interpolation='bicubic', crop_pct=1.0, pool_size=(side, side), **dataset, **cfg)
            if name in folders:
                config = json.loads((folders[name] / 'config.json').read_text())
                facts = dict(config['pretrained_cfg'], label_names=config['label_names'])
                cfgs[name].update({k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()})  # as in timm
                weights = folders[name] / 'model.safetensors'
                if weights.is_file():
                    cfgs[name]['file'] = str(weights)
            if name in folders or os.environ.get(HUB_ORG):
                cfgs[name]['hf_hub_id'] = f'{hub_org()}/{name}'
    return generate_default_cfgs(cfgs)


def register_models(module: str, create: Callable[..., nn.Module], model_args: dict[str, dict[str, Any]]) -> None:
    """Define and register an entrypoint for each of `model_args` in `module`, which holds their default_cfgs.

    Args:
        module: its name.
        create: called with the entrypoint's name, `pretrained` and its arguments.
        model_args: by name; arguments of timm.create_model override them.
    """

    def entrypoint(name: str, args: dict[str, Any]) -> Callable[..., nn.Module]:
        def fn(pretrained: bool = False, **kwargs) -> nn.Module:
            if pretrained:
                fetch_weights(name, **kwargs)
            return create(name, pretrained, **{**args, **kwargs})

        fn.__name__ = fn.__qualname__ = name
        fn.__module__ = module
        fn.__doc__ = f'{name}: {", ".join(f"{k}={v!r}" for k, v in args.items())}; see `{create.__name__}`.'
        return register_model(fn)

    vars(sys.modules[module]).update({name: entrypoint(name, args) for name, args in model_args.items()})
