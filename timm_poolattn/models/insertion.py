"""Gates for networks that were built, or trained, without them."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from ..layers import GATES, FocusAssociation, create_gate
from ..layers.create_gate import OWN_GATE
from ..utils import UserError, look_up
from ._stage import Stage, StagedNet, Stages

#: Images of a pass. With one, a map could not be told from a map without a batch.
_BATCH_SIZE = 2
#: Tried after the model's own size, from which both sides must differ: this tells height and width from channels.
_SIZES = ((64, 96), (96, 160), (224, 224), (32, 32))
#: Wrappers, by name as their imports take seconds, that would not reduce the gradients of a gate put in later.
_DISTRIBUTED = ('DistributedDataParallel', 'FullyShardedDataParallel', 'FSDPModule')


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
    """A block with its FA gate; `Stage` passes a shortcut to the first, and this one has its own."""

    def __init__(self, block: nn.Module, fa: FocusAssociation | None) -> None:
        super().__init__()
        self.block = block
        self.fa = fa

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor | None = None) -> torch.Tensor:
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


class InsertedFA(FocusAssociation):
    """FA in a network of ours that was built without; `remove` tells it from FA that was built in."""


_INSERTED = InsertedGate | InsertedStage | InsertedFA


class _Probe(nn.Module):
    """Stands where a gate could, and reports each map that passes."""

    def __init__(self, replaced: nn.Module | None, report: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self.replaced = replaced
        self.report = report

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.report(x)
        return x if self.replaced is None else self.replaced(x)


@dataclass
class _Pass:
    """A forward pass, and the calls that were seen in it, in order."""

    images: torch.Tensor
    output: Any
    calls: list[tuple]


def insert(model: nn.Module, gate: str, *, identity_init: bool = True, **gate_kwargs) -> nn.Module:
    """Put gates into the residual blocks of a timm CNN, in place.

    A channel gate goes where a block has its drop_path: at the end of the residual branch, before the shortcut is
    added, as the papers have it. FA goes over every run of blocks that keep their input's shape: each gets a k_i, and
    the block before them is the benchmark B_0 (Eq. 2-9). Whole stages (Fig. 4) get theirs in our own CIFAR networks;
    in timm's their input matched in shape is inside their first block. FA in a network with SE, such as seresnet50, is
    the paper's FA-SE.

    In timm's networks forward passes of noise find the blocks first, at two image sizes where the model takes more than
    one. A model that does not fit is refused and stays as it was; README.md beside this file says which of timm's do.
    Every module keeps its mode, and a gate gets the mode, device and dtype of its block.

    Channel gates leave the names of the model's own parameters as they are; FA puts those of a run's blocks, in timm's
    networks, into one module. So load a checkpoint of the plain model first. timm's layer-wise learning rates take a
    run as one layer.

    Args:
        model: a timm CNN with (B, C, H, W) feature maps, such as resnet, resnetv2, resnext, regnet, convnext or
            efficientnet, trained or not.
        gate: one of `timm_poolattn.layers.GATES`, or 'fa'.
        identity_init: leave the model's outputs unchanged at the moment of insertion; see `IdentityInit` and
            `FocusAssociation` in timm_poolattn.layers.
        **gate_kwargs: of the gate.

    Returns:
        The model itself.

    Raises:
        UserError: an unknown gate, what the gate's constructor refuses, a model that has inserted gates already or is
            scripted, traced, distributed or offloaded, or one whose blocks cannot carry the gate.
    """
    look_up('gate', gate, (*GATES, 'fa'), OWN_GATE)
    if has_inserted_gates(model):
        raise UserError('the model has inserted gates already; timm_poolattn.remove(model) takes them out')
    _check_open(model)
    gate_kwargs = dict(identity_init=identity_init, **gate_kwargs)
    modes = {m: m.training for m in model.modules()}
    if gate == 'fa' and any(isinstance(m, Stage | StagedNet) for m in model.modules()):
        _fill_stages(model, gate_kwargs)
        _set_modes(model, modes)
        return model
    blocks = [m for m in model.modules() if isinstance(getattr(m, 'drop_path', 0), nn.Module | None)]
    wrappers = [m for m in blocks if not _has_own(m, 'drop_path')]
    if wrappers and gate == 'fa':
        raise _refusal(model, f'its blocks are wrapped ({type(wrappers[0]).__name__}), insert FA before that')
    blocks = [m for m in blocks if m not in wrappers]  # they hand out the drop_path of the block in them
    if not blocks or not (_insert_fa if gate == 'fa' else _insert_gates)(model, gate, blocks, gate_kwargs):
        raise _refusal(
            model,
            'no two residual blocks follow each other, the second keeping its shape, as FA needs'
            if blocks and gate == 'fa'
            else 'it has no residual blocks that use a drop_path',
        )
    _set_modes(model, modes)
    return model


def has_inserted_gates(model: nn.Module) -> bool:
    """Return True if `insert` put gates into `model`."""
    return any(isinstance(m, _INSERTED) for m in model.modules())


def remove(model: nn.Module) -> nn.Module:
    """Take the gates of `insert` out again, in place; returns the model.

    Raises:
        UserError: a model that is scripted, traced, distributed or offloaded, or whose gates are wrapped.
    """
    _check_open(model)
    held = [(m, name, child) for m in model.modules() for name, child in m.named_children()]
    held = [(m, name, child) for m, name, child in held if isinstance(child, _INSERTED)]
    for module, name, child in held:
        if name not in ('drop_path', 'fa', *getattr(child, 'places', ())):
            raise UserError(f'{type(module).__name__} wraps an inserted gate; unwrap it first')
    stages = [m for m in model.modules() if isinstance(m, Stage | Stages)]
    stages = [stage for stage in stages if any(isinstance(m, InsertedFA) for m in stage.modules())]
    for module, name, child in held:
        if isinstance(child, InsertedStage):
            for place, block in zip(child.places, child.blocks, strict=True):
                setattr(module, place, block.block)
        else:
            _put(module, name, child.replaced if isinstance(child, InsertedGate) else None)
    for stage in stages:
        stage.note_fa()
    return model


def _check_open(model: nn.Module) -> None:
    """Refuse a model in which modules cannot be exchanged any more, or parameters not added."""
    for module in model.modules():
        kind = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule | fx.GraphModule):
            raise UserError(f'{kind} is scripted or traced, its code is fixed; change the model first, then script it')
        if any(cls.__name__ in _DISTRIBUTED for cls in type(module).__mro__):
            raise UserError(f'{kind} shares the parameters that it was given; change the model first, then wrap it')
        if getattr(getattr(module, '_hf_hook', None), 'offload', False):  # accelerate's
            raise UserError(f'{kind} is offloaded, its weights are elsewhere; change the model first, then offload it')


def _has_own(module: nn.Module, name: str) -> bool:
    """Return True if `module` has the attribute itself: a wrapper hands out that of what it wraps."""
    return name in nn.Module.__dir__(module)  # past a wrapper's own __dir__


def _refusal(model: nn.Module, reason: str) -> UserError:
    return UserError(
        f'{type(model).__name__} cannot carry the gate: {reason};'
        " most of timm's resnet, resnetv2, resnext, regnet, convnext and efficientnet can"
    )


def _put(block: nn.Module, name: str, child: nn.Module | None) -> None:
    if child is None:
        delattr(block, name)  # a None among the children would stay there; timm's blocks have it as an attribute
        if hasattr(block, name):  # of the class
            return
    setattr(block, name, child)


def _set_modes(model: nn.Module, modes: dict[nn.Module, bool]) -> None:
    """Give every module the mode that it had, and a new one that of the module which holds it."""
    model.training = modes[model]
    for module in model.modules():  # holders come first
        for child in module.children():
            child.training = modes.get(child, module.training)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluate without gradients inside; give every module's mode and every buffer's value back afterwards.

    Observers of quantisation, and norms that refuse to evaluate, take statistics of any image.
    """
    modes = {m: m.training for m in model.modules()}
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m.named_buffers(recurse=False)]
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        model.train(modes[model])  # some models drop what they cached for evaluation here
        for module, training in modes.items():
            module.training = training
        for module, name, buffer, value in buffers:
            if not buffer.is_meta and not (buffer.shape == value.shape and buffer.equal(value)):
                buffer.resize_(value.shape).copy_(value)
            setattr(module, name, buffer)


def _passes(model: nn.Module, calls: list[tuple]) -> list[_Pass]:
    """Run noise through the model at two sizes that it takes, or at the only one. What it sees appends to `calls`.

    Raises:
        UserError: the model takes none.
    """
    parameter = next(model.parameters(), torch.empty(0))
    configs = [getattr(m, 'pretrained_cfg', None) for m in model.modules()]
    config = next((c for c in configs if isinstance(c, dict) and c.get('input_size')), {'input_size': (3, 224, 224)})
    stems = [m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)][:1]
    generator = torch.Generator().manual_seed(0)
    passes: list[_Pass] = []
    first_error = None
    for channels in dict.fromkeys([getattr(model, 'in_chans', 3), *stems, 3]):
        for size in dict.fromkeys([tuple(config['input_size'][1:]), *_SIZES]):
            if any(side == other for p in passes for side, other in zip(size, p.images.shape[2:], strict=True)):
                continue
            images = torch.randn(_BATCH_SIZE, channels, *size, generator=generator, device='cpu').to(parameter)
            calls.clear()
            try:
                with _evaluating(model):
                    output = model(images)
            except Exception as error:  # any: the model does not take this size
                first_error = first_error or error
            else:
                passes.append(_Pass(images, output, list(calls)))
            if len(passes) == 2:
                return passes
        if passes:
            return passes
    raise _refusal(model, f'its forward pass takes no images ({first_error})') from first_error


def _map_channels(model: nn.Module, block: nn.Module, shapes: list[torch.Size]) -> int:
    """Return C of maps that are (B, C, H, W) in all of `shapes`.

    Raises:
        UserError: they are laid out otherwise, or C changes.
    """
    name = next(name for name, m in model.named_modules() if m is block)
    seen = ' and '.join(str(tuple(shape)) for shape in dict.fromkeys(shapes))
    if any(len(shape) != 4 or shape[0] != _BATCH_SIZE for shape in shapes):
        raise _refusal(model, f'{name} has {seen} where a gate takes (B, C, H, W)')
    _, channels, heights, widths = (set(axis) for axis in zip(*shapes, strict=True))
    if len(heights) == len(widths) == 1:  # one square size
        fits = len(channels) == 1 and channels != heights == widths
    else:  # what changes with the image is height and width, or the width alone: detectors keep the shorter side
        fits = len(channels) == 1 and (len(widths) > 1 or (widths == {1} and (len(heights) > 1 or heights == {1})))
    if not fits:
        raise _refusal(model, f'{name} has maps of {seen}, not of (B, C, H, W) with one C')
    return channels.pop()


def _create(create: Callable[..., nn.Module], block: nn.Module, *args, **kwargs) -> nn.Module:
    """Build a gate on the device and in the dtype of its block."""
    parameter = next((p for p in block.parameters() if p.is_floating_point()), None)
    dd = {} if parameter is None else dict(device=parameter.device, dtype=parameter.dtype)
    return create(*args, **{**dd, **kwargs})


def _insert_gates(model: nn.Module, gate: str, blocks: list[nn.Module], gate_kwargs: dict[str, Any]) -> bool:
    """Put gates in front of every drop_path that is used; False if none is."""
    calls: list[tuple] = []
    inputs: dict[nn.Module, tuple] = {}
    shortcuts: set[nn.Module] = set()  # blocks that pass their input to drop_path

    def enter(block: nn.Module, args: tuple) -> None:
        inputs[block] = args
        calls.append((block, None))

    def report(block: nn.Module, x: torch.Tensor) -> None:
        calls.append((block, x.shape))
        if any(x is arg for arg in inputs.get(block, ())):
            shortcuts.add(block)

    probes = {block: _Probe(block.drop_path, partial(report, block)) for block in blocks}
    hooks = [block.register_forward_pre_hook(enter) for block in blocks]
    try:
        for block, probe in probes.items():
            block.drop_path = probe
        passes = _passes(model, calls)
    finally:
        for hook in hooks:
            hook.remove()
        for block, probe in probes.items():
            _put(block, 'drop_path', probe.replaced)
    channels = {}
    for block in blocks:
        shapes = [[s for b, s in p.calls if b is block] for p in passes]
        maps = [[s for s in seen if s is not None] for seen in shapes]
        if not any(maps):
            continue
        channels[block] = _map_channels(model, block, [s for seen in maps for s in seen])
        name = next(name for name, m in model.named_modules() if m is block)
        if block in shortcuts:
            raise _refusal(model, f'{name} passes its input through drop_path, not the end of a residual branch')
        if any(2 * len(m) > len(s) for m, s in zip(maps, shapes, strict=True)):
            raise _refusal(model, f'{name} uses its drop_path for more than one branch')
        if hasattr(block, 'reparameterize'):
            fused = copy.deepcopy(block)
            fused.reparameterize()
            if not hasattr(fused, 'drop_path'):
                raise _refusal(model, f'{name} loses its drop_path, and a gate with it, when it is reparameterized')
    gates = {block: _create(create_gate, block, gate, c, **gate_kwargs) for block, c in channels.items()}
    for block, module in gates.items():  # all are made before one is put in
        block.drop_path = InsertedGate(module, block.drop_path)
    return bool(gates)


def _insert_fa(model: nn.Module, gate: str, blocks: list[nn.Module], gate_kwargs: dict[str, Any]) -> bool:
    """Put FA over every run of blocks that lie side by side in one module; False if there is none."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, child in module.named_children():
            places.setdefault(child, []).append((module, name))
    calls: list[tuple] = []

    def record(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        calls.append((block, args[0] if len(args) == 1 and not kwargs else None, output))

    hooks = [block.register_forward_hook(record, with_kwargs=True) for block in blocks]
    try:
        passes = _passes(model, calls)
    finally:
        for hook in hooks:
            hook.remove()
    found = [_runs(p.calls, places) for p in passes]
    if any(runs != found[0] for runs in found):
        raise _refusal(model, 'its blocks run in another order at another image size')
    stages = []
    for run in found[0]:
        names = [next(name for name, m in model.named_modules() if m is block) for block in run]
        times = Counter(block for block, _, _ in passes[0].calls)
        if any(times[block] > 1 or len(places[block]) > 1 for block in run):
            raise _refusal(model, f'{" or ".join(names)} is used more than once')
        shapes = {b: [m.shape for p in passes for c, x, u in p.calls if c is b for m in (x, u)] for b in run[1:]}
        channels = {block: _map_channels(model, block, seen) for block, seen in shapes.items()}
        fas = [_create(FocusAssociation, b, channels[b], i, **gate_kwargs) for i, b in enumerate(run[1:], 1)]
        stage = InsertedStage([InsertedBlock(block, None) for block in run], [places[block][0][1] for block in run])
        stages.append((places[run[0]][0][0], stage, fas))
    for parent, stage, _ in stages:
        for place in stage.places:
            setattr(parent, place, nn.Identity())
        setattr(parent, stage.places[0], stage)
    ran: Counter[nn.Module] = Counter()
    hooks = [stage.register_forward_hook(lambda m, args, out: ran.update([m])) for _, stage, _ in stages]
    try:
        for p in passes:  # still without gates: nothing changes where no other part of the network reads between blocks
            ran.clear()
            with _evaluating(model):
                output = model(p.images)
            if any(ran[stage] != 1 for _, stage, _ in stages):
                raise AssertionError('a run is passed by')
            if not p.images.is_meta:
                torch.testing.assert_close(_tensors(output), _tensors(p.output), equal_nan=True)
    except BaseException as error:
        remove(model)
        if not isinstance(error, Exception):  # Ctrl-C
            raise
        raise _refusal(model, 'other parts of it reach into its runs of blocks') from error
    finally:
        for hook in hooks:
            hook.remove()
    for _, stage, fas in stages:
        for block, fa in zip(stage.blocks[1:], fas, strict=True):
            block.fa = fa
        stage.note_fa()
    return bool(stages)


def _fill_stages(model: nn.Module, gate_kwargs: dict[str, Any]) -> None:
    """Put FA over the blocks and the stages (Fig. 4) of a network of ours."""
    if any(isinstance(m, FocusAssociation) for m in model.modules()):
        raise UserError(f'{type(model).__name__} has FA already')
    nets = [m for m in model.modules() if isinstance(m, StagedNet)]
    if not any(isinstance(m, Stage) for net in nets for m in net.modules()):  # VGG-19, whose gates need shortcuts
        raise UserError(f"{type(model).__name__} gets FA when it is built: timm.create_model(name, gate='fa')")
    stages = [stage for net in nets for stage in net.stages]
    wrappers = [net.stages for net in nets if not isinstance(net.stages, Stages)]
    wrappers += [m for m in stages if not isinstance(m, Stage)]
    wrappers += [b for m in stages if isinstance(m, Stage) for b in m.blocks if not _has_own(b, 'fa')]
    if wrappers:
        raise UserError(
            f'{type(model).__name__}: its blocks are wrapped ({type(wrappers[0]).__name__}), insert FA before that'
        )
    fas: list[tuple[nn.Module, InsertedFA]] = []  # all are made before one is put in
    for net in nets:
        infos = net.feature_info[int(net.stem_feature) :]  # more than the stages of a pruned network
        for s, (stage, info) in enumerate(zip(net.stages, infos, strict=False)):
            for i, gated in [*enumerate(stage.blocks), (s, stage)]:
                if i:  # the others are the benchmarks
                    fas.append((gated, _create(InsertedFA, gated, info['num_chs'], i, **gate_kwargs)))
    for gated, fa in fas:
        gated.fa = fa
    for noted in [*stages, *(net.stages for net in nets)]:
        noted.note_fa()


def _tensors(output: Any) -> list[torch.Tensor]:
    """Return the tensors in an output of any structure."""
    if isinstance(output, torch.Tensor):
        return [output]
    if not isinstance(output, list | tuple | Mapping):
        output = getattr(output, '__dict__', {})  # a dataclass
    parts = output.values() if isinstance(output, Mapping) else output
    return [tensor for part in parts for tensor in _tensors(part)]


def _runs(calls: list[tuple], places: dict[nn.Module, list[tuple[nn.Module, str]]]) -> list[list[nn.Module]]:
    """Find blocks that take each other's outputs, lie in one module, and keep the shape after the first."""
    runs: list[list[nn.Module]] = []
    last, last_output = None, None
    for block, x, u in calls:
        side_by_side = x is not None and x is last_output and places[last][0][0] is places[block][0][0]
        if side_by_side and isinstance(u, torch.Tensor) and x.shape == u.shape:
            runs[-1].append(block)  # X_i and U_i match
        else:
            runs.append([block])  # B_0
        last, last_output = block, u
    return [run for run in runs if len(run) > 1]
