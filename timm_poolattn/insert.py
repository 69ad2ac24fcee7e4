"""Gates for networks that were built, or trained, without them."""

import torch
from torch import nn

from .layers import create_gate


class InsertedGate(nn.Module):
    """A gate at the end of a residual branch, before what the block had there (its drop_path).

    Args:
        gate: (B, C, H, W) -> the same shape.
        replaced: the block's own drop_path, or None.
        identity_init: mix x + alpha (gate(x) - x) with a learned alpha that starts at 0 (as in ReZero): the block's
            output is unchanged at first, and training moves alpha, then the gate.
    """

    def __init__(self, gate: nn.Module, replaced: nn.Module | None, identity_init: bool = True) -> None:
        super().__init__()
        self.gate = gate
        self.replaced = replaced
        reference = next(gate.parameters())
        self.register_parameter('alpha', nn.Parameter(reference.new_zeros(())) if identity_init else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gated = self.gate(x)
        if self.alpha is not None:
            gated = x + self.alpha.to(x.dtype) * (gated - x)
        return gated if self.replaced is None else self.replaced(gated)


class _Probe(nn.Module):
    """Stands where a gate could, and sees how many channels pass."""

    def __init__(self, replaced: nn.Module | None) -> None:
        super().__init__()
        self.replaced = replaced
        self.shape: torch.Size | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shape = x.shape
        return x if self.replaced is None else self.replaced(x)


def insert(model: nn.Module, gate: str, *, identity_init: bool = True, **gate_kwargs) -> nn.Module:
    """Put a gate into every residual block of a timm CNN, in place.

    A gate goes where the block has its drop_path: at the end of the residual branch, before the shortcut is added, as
    the papers have it. One forward pass of a black image finds the blocks and their channels.

    Args:
        model: a timm CNN with (B, C, H, W) feature maps, such as resnet, resnetv2, resnext, regnet, convnext or
            efficientnet, trained or not.
        gate: one of `timm_poolattn.layers.GATES`.
        identity_init: leave the model's outputs unchanged at the moment of insertion, see `InsertedGate`.
            Default: True.
        **gate_kwargs: of the gate.

    Returns:
        The model itself.

    Raises:
        ValueError: an unknown gate, a model that already has inserted gates, or one without such blocks.
    """
    if any(isinstance(m, InsertedGate) for m in model.modules()):
        raise ValueError('the model has inserted gates already; timm_poolattn.remove(model) takes them out')
    blocks = [m for m in model.modules() if hasattr(m, 'drop_path')]
    parameter = next(model.parameters())
    probes = {block: _Probe(block.drop_path) for block in blocks}
    training = model.training
    try:
        for block, probe in probes.items():
            block.drop_path = probe
        with torch.no_grad():
            size = model.pretrained_cfg['input_size']
            model.eval()(torch.zeros(1, *size, device=parameter.device, dtype=parameter.dtype))
    finally:
        for block, probe in probes.items():
            block.drop_path = probe.replaced
        model.train(training)
    channels = {block: p.shape[1] for block, p in probes.items() if p.shape is not None and len(p.shape) == 4}
    if not channels:
        raise ValueError(
            f'{type(model).__name__}: no residual blocks with a drop_path over (B, C, H, W) maps;'
            f' resnet, resnetv2, resnext, regnet, convnext and efficientnet have'
        )
    gate_kwargs = {'device': parameter.device, 'dtype': parameter.dtype, **gate_kwargs}
    gates = {block: create_gate(gate, c, **gate_kwargs) for block, c in channels.items()}  # all, or none is put in
    for block, module in gates.items():
        block.drop_path = InsertedGate(module, block.drop_path, identity_init).train(training)
    return model


def remove(model: nn.Module) -> nn.Module:
    """Take the gates of `insert` out again, in place; returns the model."""
    for module in list(model.modules()):
        inserted = getattr(module, 'drop_path', None)
        if isinstance(inserted, InsertedGate):
            module.drop_path = inserted.replaced
    return model
