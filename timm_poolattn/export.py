"""Files that run without this package: ONNX, TorchScript and torch.export's pt2, each checked against the model."""

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .data import evaluation_config
from .utils import UserError, look_up, replacing

TOLERANCE = 1e-4


def export(model: nn.Module, path: str | Path, format: str) -> dict[str, Any]:
    """Write a model for batches of any size, of images in its size for tests, which `predict` gives them too.

    The file is run on batches of 1 and 3, and compared with the model, before it gets its name.

    Args:
        model: a timm model. Put into evaluation mode and moved to the CPU.
        path: of the file.
        format: 'onnx' (timm's export by torch.onnx; needs the `onnx` extra), 'torchscript' (torch.jit.script), or
            'pt2' (torch.export).

    Returns:
        `path`, `format`, `input_size` (C, H, W), `bytes`, and `difference`, the largest from the model's outputs.

    Raises:
        UserError: an unknown format, an FA model that skips blocks, or a place that cannot be written to.
        RuntimeError: the file's outputs differ from the model's by more than 1e-4.
    """
    write, run = FORMATS[look_up('format', format, FORMATS)]
    if any(getattr(module, 'skip_threshold', 0) > 0 for module in model.modules()):
        raise UserError('a file cannot skip blocks: call set_skip_threshold(model, 0) before export')
    model = model.cpu().eval()
    size = (model.in_chans, *evaluation_config(model)['input_size'][1:])
    images = torch.randn(3, *size, generator=torch.Generator().manual_seed(0), dtype=next(model.parameters()).dtype)
    with replacing(path) as out:
        temp = str(out.with_suffix(f'.{format}'))  # torch wants a pt2 file to be called so
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter('ignore', FutureWarning)  # that TorchScript will end
            write(model, images[:2], temp)  # torch.export takes a batch of 1 for a constant
            difference = max((run(temp, x) - model(x)).abs().max().item() for x in (images, images[:1]))
        if not difference <= TOLERANCE:
            raise RuntimeError(f'{path}: not written, its outputs differ from the model by up to {difference:.3g}')
        os.replace(temp, out)
    return dict(path=str(path), format=format, input_size=size, bytes=Path(path).stat().st_size, difference=difference)


def _write_onnx(model: nn.Module, images: torch.Tensor, path: str) -> None:
    from timm.utils.onnx import onnx_export

    onnx_export(model, path, images, use_dynamo=True, input_names=['images'], output_names=['logits'])


def _run_onnx(path: str, images: torch.Tensor) -> torch.Tensor:
    from timm.utils.onnx import onnx_forward

    return torch.from_numpy(onnx_forward(path, images))


def _write_torchscript(model: nn.Module, images: torch.Tensor, path: str) -> None:
    buffer = io.BytesIO()  # torch's own writer ends the process where a disk is full
    torch.jit.save(torch.jit.script(model), buffer)
    Path(path).write_bytes(buffer.getbuffer())


def _write_pt2(model: nn.Module, images: torch.Tensor, path: str) -> None:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim('batch')},)), buffer)
    Path(path).write_bytes(buffer.getbuffer())


_Write = Callable[[nn.Module, torch.Tensor, str], None]
_Run = Callable[[str, torch.Tensor], torch.Tensor]
#: How to write a format, and how to run its file on a batch.
FORMATS: dict[str, tuple[_Write, _Run]] = {
    'onnx': (_write_onnx, _run_onnx),
    'torchscript': (_write_torchscript, lambda path, images: torch.jit.load(path)(images)),
    'pt2': (_write_pt2, lambda path, images: torch.export.load(path).module()(images)),
}
