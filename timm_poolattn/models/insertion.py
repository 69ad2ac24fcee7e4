"""Gates for networks that were built, or trained, without them."""

from typing import Any

import torch
from torch import nn

from ..layers import GATES, FocusAssociation, create_gate
from ._stage import Stage


class InsertedGate(nn.Module):
    """A gate at the end of a residual branch, before what the block had there (its drop_path)."""

    def __init__(self, gate: nn.Module, replaced: nn.Module | None) -> None:
        super().__init__()
        self.gate = gate
        self.replaced = replaced

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.gate(x)
        return x if self.replaced is None else self.replaced(x)


class InsertedBlock(nn.Module):
    """A block with its FA gate; `Stage` passes a shortcut to any block, and this one has its own."""

    def __init__(self, block: nn.Module, fa: FocusAssociation | None) -> None:
        super().__init__()
        self.block = block
        self.fa = fa

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        return self.block(x)


class InsertedStage(Stage):
    """A run of blocks with FA, in the place of its first block; the other places hold an Identity.

    Args:
        blocks: of the run.
        places: the blocks' names in the module that held them.
    """

    def __init__(self, blocks: list[InsertedBlock], places: list[str]) -> None:
        super().__init__(blocks)
        self.places = places

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run_blocks(x, x)


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
    """Put gates into the residual blocks of a timm CNN, in place.

    A channel gate goes where a block has its drop_path: at the end of the residual branch, before the shortcut is
    added, as the papers have it. FA goes over every run of blocks that keep their input's shape: each gets a k_i, and
    the block before them is the benchmark B_0 (Eq. 2-9). Whole stages (Fig. 4) get none, as their input matched
    in shape is inside their first block. FA in a network with SE, such as seresnet50, is the paper's FA-SE.

    One forward pass of a black image finds the blocks. Channel gates leave the names of the model's own parameters as
    they are; FA puts those of a run's blocks into one module. So load a checkpoint of the plain model first.

    Args:
        model: a timm CNN with (B, C, H, W) feature maps, such as resnet, resnetv2, resnext, regnet, convnext or
            efficientnet, trained or not.
        gate: one of `timm_poolattn.layers.GATES`, or 'fa'.
        identity_init: leave the model's outputs unchanged at the moment of insertion; see `IdentityInit` and
            `FocusAssociation` in timm_poolattn.layers. Default: True.
        **gate_kwargs: of the gate.

    Returns:
        The model itself.

    Raises:
        ValueError: an unknown gate, a model that already has inserted gates, or one without such blocks.
    """
    if gate not in (*GATES, 'fa'):
        raise ValueError(f'unknown gate {gate!r}; choose from {", ".join(GATES)}, fa')
    if any(isinstance(m, InsertedGate | InsertedStage) for m in model.modules()):
        raise ValueError('the model has inserted gates already; timm_poolattn.remove(model) takes them out')
    parameter = next(model.parameters())
    gate_kwargs = dict(identity_init=identity_init, device=parameter.device, dtype=parameter.dtype, **gate_kwargs)
    found = _insert_fa(model, gate_kwargs) if gate == 'fa' else _insert_gates(model, gate, gate_kwargs)
    if not found:
        raise ValueError(
            f'{type(model).__name__}: no residual blocks with a drop_path over (B, C, H, W) maps;'
            f' resnet, resnetv2, resnext, regnet, convnext and efficientnet have'
        )
    return model


def remove(model: nn.Module) -> nn.Module:
    """Take the gates of `insert` out again, in place; returns the model."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, InsertedGate):
                setattr(module, name, child.replaced)
            elif isinstance(child, InsertedStage):
                for place, block in zip(child.places, child.blocks, strict=True):
                    setattr(module, place, block.block)
    return model


def _run(model: nn.Module) -> None:
    """One forward pass of a black image of the model's size."""
    parameter, training = next(model.parameters()), model.training
    _, *size = getattr(model, 'pretrained_cfg', {}).get('input_size', (3, 224, 224))
    image = torch.zeros(1, getattr(model, 'in_chans', 3), *size, device=parameter.device, dtype=parameter.dtype)
    try:
        with torch.no_grad():
            model.eval()(image)
    finally:
        model.train(training)


def _insert_gates(model: nn.Module, gate: str, gate_kwargs: dict[str, Any]) -> bool:
    """Gates in front of every drop_path; False if there is none."""
    probes = {block: _Probe(block.drop_path) for block in model.modules() if hasattr(block, 'drop_path')}
    try:
        for block, probe in probes.items():
            block.drop_path = probe
        if probes:
            _run(model)
    finally:
        for block, probe in probes.items():
            block.drop_path = probe.replaced
    channels = {block: p.shape[1] for block, p in probes.items() if p.shape is not None and len(p.shape) == 4}
    gates = {block: create_gate(gate, c, **gate_kwargs) for block, c in channels.items()}  # all, or none is put in
    for block, module in gates.items():
        block.drop_path = InsertedGate(module, block.drop_path).train(block.training)
    return bool(gates)


def _insert_fa(model: nn.Module, gate_kwargs: dict[str, Any]) -> bool:
    """FA over every run of blocks that lie side by side in one module; False if there is none."""
    parents = {child: (module, name) for module in model.modules() for name, child in module.named_children()}
    calls: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []

    def record(block: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if len(args) == 1:  # a stage passes X_i and nothing else
            calls.append((block, args[0], output))

    hooks = [block.register_forward_hook(record) for block in parents if hasattr(block, 'drop_path')]
    try:
        if hooks:
            _run(model)
    finally:
        for hook in hooks:
            hook.remove()
    runs: list[list[nn.Module]] = []
    last, last_output = None, None
    for block, x, u in calls:
        side_by_side = last is not None and parents[last][0] is parents[block][0] and x is last_output
        if side_by_side and x.shape == u.shape and x.ndim == 4:
            runs[-1].append(block)  # X_i and U_i match
        else:
            runs.append([block])  # B_0
        last, last_output = block, u
    channels = {block: u.shape[1] for block, _, u in calls}
    stages = []
    for run in runs:
        if len(run) > 1:
            gates = [FocusAssociation(channels[block], i, **gate_kwargs) if i else None for i, block in enumerate(run)]
            blocks = [InsertedBlock(block, fa) for block, fa in zip(run, gates, strict=True)]
            stages.append(InsertedStage(blocks, [parents[block][1] for block in run]).train(model.training))
    for stage in stages:
        first, *others = stage.blocks
        parent, name = parents[first.block]
        setattr(parent, name, stage)
        for other in others:
            setattr(*parents[other.block], nn.Identity())
    return bool(stages)
