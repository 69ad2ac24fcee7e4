"""What a training step costs, and what it cannot cost less than."""

import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..training import PenaltyTask
from ..utils import look_up, progress
from .backbones import plain_args
from .memory import peak_bytes
from .timer import time_in_turns

#: Forms of a training step, in the order in which `bench_train` gives them.
MODES = ('eager', 'channels_last', 'autocast', 'compiled')


def bench_train(
    models: Sequence[str],
    *,
    modes: Sequence[str] = MODES,
    batch_size: int = 128,
    device: torch.device | str = 'cpu',
    dtype: torch.dtype = torch.bfloat16,
    compile_mode: str | None = None,
    steps: int = 20,
    repeats: int = 3,
) -> list[dict[str, Any]]:
    """Measure images/s and peak memory of training steps: as train.py takes them, `.item()` of the loss included.

    Args:
        models: names; each is measured and, right after it, the same backbone without the gate.
        modes: of `MODES`; each adds to the one before it, except that 'compiled' on a CPU leaves out autocast, which
            is slow there without bfloat16 instructions.
        batch_size: images at once.
        device: where the models run.
        dtype: of autocast.
        compile_mode: torch.compile's; 'reduce-overhead' for CUDA graphs.
        steps: in a turn.
        repeats: turns; every mode of a model has one before the next begins.

    Returns:
        For each `model`, `backbone_of` (the name that was asked for) and `mode`: the median `images_per_s`; `peak_mb`,
        the most memory that a step takes beyond parameters, gradients and optimizer; and the floor: `gflop` of
        convolutions and linear layers of a step, `gbytes` that it moves at least (what backward reads of forward,
        written and read once; parameters, gradients and momentum), and `floor_images_per_s`, at this device's own speed
        in a large matrix product and a large copy.
    """
    modes = [look_up('mode', mode, MODES) for mode in modes]
    names = [look_up('model', name, timm.list_models(include_tags='.' in name)) for name in models]
    device = torch.device(device)
    variants = [(name, args) for name in names for args in _with_and_without_gate(name)]
    rows = []
    for name, args in progress(variants, 'measuring', unit='model'):
        torch.compiler.reset()  # or the limit of recompilations ends the compiled ones
        steps_of = {
            mode: _step(timm.create_model(**args).to(device), mode, batch_size, device, dtype, compile_mode)
            for mode in modes
        }
        peaks = {mode: peak_bytes(step, device) for mode, step in steps_of.items()}
        floor = _floor(timm.create_model(**args).to(device), batch_size, device, dtype)
        turns = {mode: lambda step=step: [step() for _ in range(steps)] for mode, step in steps_of.items()}
        for mode, seconds in time_in_turns(turns, repeats).items():
            row = dict(model=args['model_name'], backbone_of=name, mode=mode, peak_mb=peaks[mode] / 1e6)
            rows.append(dict(row, images_per_s=batch_size * steps / statistics.median(seconds), **floor))
    return rows


def _with_and_without_gate(name: str) -> list[dict[str, Any]]:
    plain = plain_args(name)
    return [dict(model_name=name), *([plain] if plain['model_name'] != name else [])]


def _step(
    model: nn.Module, mode: str, batch_size: int, device: torch.device, dtype: torch.dtype, compile_mode: str | None
) -> Callable[[], None]:
    """Make a warm training step of `model`."""
    level = MODES.index(mode)
    layout = torch.channels_last if level >= 1 else torch.contiguous_format
    task = PenaltyTask(model.to(memory_format=layout), nn.CrossEntropyLoss(), device=device, verbose=False).train()
    cast = level >= 2 and not (mode == 'compiled' and device.type == 'cpu')
    autocast = partial(torch.autocast, device.type, dtype=dtype) if cast else nullcontext
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    if mode == 'compiled':
        task.compile(mode=compile_mode)
    input = torch.randn(batch_size, *model.pretrained_cfg['input_size'], device=device).to(memory_format=layout)
    target = torch.randint(model.num_classes, (batch_size,), device=device)

    def step() -> None:
        with autocast():
            loss = task(input, target)['loss']
        loss.backward()
        optimizer.step()
        loss.item()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    return step


def _floor(model: nn.Module, batch_size: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Return what a step cannot cost less than, at this device's own speed."""
    on_cuda = device.type == 'cuda'
    autocast = torch.autocast('cuda', dtype=dtype) if on_cuda else nullcontext()  # what the fastest mode there runs in
    input = torch.randn(batch_size, *model.pretrained_cfg['input_size'], device=device)
    saved: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        with autocast:
            output = model.train()(input)
        output.sum().backward()
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    flop, moved = counter.get_total_flops(), 2 * sum(saved.values()) + 6 * parameters
    side, count = (8192, 2**28) if on_cuda else (1024, 2**24)
    a = torch.randn(side, side, device=device, dtype=dtype if on_cuda else torch.float32)
    b = torch.empty(count, device=device)
    seconds = time_in_turns(dict(product=lambda: a @ a, copy=b.clone), repeats=5)
    flop_per_s = 2 * side**3 / statistics.median(seconds['product'])
    bytes_per_s = 2 * b.nbytes / statistics.median(seconds['copy'])
    floor = max(flop / flop_per_s, moved / bytes_per_s)
    return dict(gflop=flop / 1e9, gbytes=moved / 1e9, floor_images_per_s=batch_size / floor)
