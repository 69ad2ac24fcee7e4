"""Starting a model from a trained one that is shallower, has another gate, or other classes."""

from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..inference import load_pretrained
from ..models import check_model_name
from ..utils import MissingFileError, UserError, replacing


def warm_start(model: str, source: str, out: str | Path) -> dict[str, int]:
    """Write a first checkpoint of `model` that takes what fits from `source`.

    Parameters and buffers of the same name and shape are copied. Blocks that a stage of `source` does not have come
    after those that it has. They start as the identity: their last BN's weight is 0, as timm's `zero_init_last`. So a
    deeper model of the same gate and classes computes at first what `source` computes (Chen et al., Net2Net,
    https://arxiv.org/abs/1511.05641). The rest (another gate, another classifier) keeps its own initialisation.

    Args:
        model: a name of ours.
        source: a name with weights, or a safetensors file.
        out: the safetensors file to write, for train.py's `--initial-checkpoint`.

    Returns:
        `copied` and `new`, numbers of tensors.

    Raises:
        UserError: an unknown `model`, a `source` that is none or of which no tensor fits, or `out` cannot be written.
    """
    net = timm.create_model(check_model_name(model))
    weights = _read(source)
    state = net.state_dict()
    copied = {name: weights[name] for name in state if name in weights and weights[name].shape == state[name].shape}
    if not any(value.ndim > 1 for value in copied.values()):
        raise UserError(f'{source}: nothing in it fits {model}; take a model of the same family')
    for prefix, module in net.named_modules():
        if hasattr(module, 'zero_init_last') and not any(name.startswith(f'{prefix}.') for name in copied):
            module.zero_init_last()
    net.load_state_dict(copied, strict=False)
    metadata = dict(warm_start=f'{without_place(source)} {model}')  # as the command has them; `train` records it
    with replacing(out) as temp:
        save_file({name: value.contiguous() for name, value in net.state_dict().items()}, temp, metadata)
    return dict(copied=len(copied), new=len(state) - len(copied))


def without_place(source: str) -> str:
    """Return the name of a model or a file, of a folder or a file without its place on this machine."""
    if source.startswith('hf-hub:'):
        return source
    folder = source.removeprefix('local-dir:')
    return 'local-dir:' * (folder != source) + Path(folder).name


def _read(source: str) -> dict[str, torch.Tensor]:
    if Path(source).suffix != '.safetensors':
        return load_pretrained(check_model_name(source)).state_dict()
    if not Path(source).is_file():
        raise MissingFileError(f'{source}: no such file')
    try:
        return load_file(source)
    except SafetensorError as e:
        raise UserError(f'{source}: no safetensors file ({e})') from e
