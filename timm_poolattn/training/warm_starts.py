"""Starting a model from a trained one that is shallower, has another gate, or other classes."""

from pathlib import Path

import timm
from safetensors.torch import save_file
from timm.models import load_state_dict

from ..inference import load_pretrained


def warm_start(model: str, source: str, out: str | Path) -> dict[str, int]:
    """Write a first checkpoint of `model` that takes what fits from `source`.

    Parameters and buffers of the same name and shape are copied. Blocks that a stage of `source` does not have come
    after those that it has and start as the identity (their last BN's weight is 0, as timm's `zero_init_last`), so a
    deeper model of the same gate and classes computes at first what `source` computes: Chen et al., Net2Net,
    https://arxiv.org/abs/1511.05641. The rest (another gate, another classifier) keeps its own initialisation.

    Args:
        model: a name of ours.
        source: a name with weights, or a safetensors file.
        out: the safetensors file to write, for train.py's `--initial-checkpoint`.

    Returns:
        `copied` and `new`, numbers of tensors.

    Raises:
        ValueError: no tensor fits.
    """
    net = timm.create_model(model)
    is_file = Path(source).suffix == '.safetensors'
    weights = load_state_dict(str(source), device='cpu') if is_file else load_pretrained(source).state_dict()
    state = net.state_dict()
    copied = {name: weights[name] for name in state if name in weights and weights[name].shape == state[name].shape}
    if not any(value.ndim > 1 for value in copied.values()):
        raise ValueError(f'{source}: nothing in it fits {model}; take a model of the same family')
    for prefix, module in net.named_modules():
        if hasattr(module, 'zero_init_last') and not any(name.startswith(f'{prefix}.') for name in copied):
            module.zero_init_last()
    net.load_state_dict(copied, strict=False)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temp = out.with_name(f'.{out.name}.tmp')
    metadata = dict(warm_start=f'{Path(source).name} {model}')  # as the command has them; `train` records it
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, temp, metadata)
    temp.replace(out)
    return dict(copied=len(copied), new=len(state) - len(copied))
