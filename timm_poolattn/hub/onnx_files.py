"""ONNX files of a release, in the layout that transformers.js and Optimum read: written, described, and run."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import ImageData, evaluation_config
from ..export import TOLERANCE, export
from ..inference import class_names, evaluate
from ..utils import UserError, require

#: float32, and weights and activations in 8 bits.
FLOAT, INT8 = 'onnx/model.onnx', 'onnx/model_quantized.onnx'
#: What writes and runs them: the `onnx` extra.
NEEDED = ('onnx', 'onnxscript', 'onnxruntime')
#: How many points of top-1 the 8 bits may cost.
LARGEST_LOSS = 0.5


class OnnxModel(nn.Module):
    """A file as a model that `evaluate` takes, run by ONNX Runtime on the CPU."""

    def __init__(self, path: str | Path, like: nn.Module) -> None:
        super().__init__()
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
        self.pretrained_cfg, self.num_classes = like.pretrained_cfg, like.num_classes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.session.run(['logits'], dict(images=x.numpy()))[0])


def description(model: nn.Module) -> dict[str, str]:
    """Return the metadata of both files: what a program needs to feed an image and to name the answer, as JSON."""
    config = evaluation_config(model)
    facts = dict(labels=class_names(model), mean=config['mean'], std=config['std'], size=config['input_size'])
    return {key: json.dumps(value) for key, value in facts.items()}


def write_onnx(model: nn.Module, folder: Path, data: ImageData, top1: float) -> dict[str, dict[str, Any]]:
    """Write `onnx/` into a release folder.

    Args:
        model: the release's.
        folder: where it is written.
        data: to evaluate the files on.
        top1: of `model` on `data`, in %.

    Returns:
        By file, what `evaluate` measured of it, and its `sha256`. The 8-bit file is left out where it costs over
        `LARGEST_LOSS` points.

    Raises:
        UserError: the model cannot be written as ONNX.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    paths = {name: folder / name for name in (FLOAT, INT8)}
    try:
        export(model, paths[FLOAT], 'onnx')
    except RuntimeError as e:  # torch's, or outputs that differ
        raise UserError(f'no ONNX file of this model: {" ".join(str(e).split())[:300]}; release it without') from e
    proto = onnx.load(paths[FLOAT])
    graph = proto.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField('doc_string')  # these name files of this machine
        part.ClearField('metadata_props')
    onnx.helper.set_model_props(proto, description(model))
    onnx.save(proto, paths[FLOAT])
    quantize_dynamic(paths[FLOAT], paths[INT8], weight_type=QuantType.QUInt8)  # the type that convolutions have there

    rows = {}
    for name, path in paths.items():
        test = evaluate(OnnxModel(path, model), data)
        if name == INT8 and test['top1'] < top1 - LARGEST_LOSS:
            path.unlink()
            continue
        rows[name] = dict(**test, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    return rows


def _parts(proto: Any) -> tuple[list[Any], list[Any]]:
    """Return all operators and tensors of a `ModelProto`, those in graphs within operators and in functions too."""
    tensors, nodes = [*proto.graph.initializer], [*proto.graph.node]
    sparse = [*proto.graph.sparse_initializer]
    nodes += [node for function in proto.functions for node in function.node]
    for node in nodes:  # which grows
        for attribute in node.attribute:
            tensors += [attribute.t, *attribute.tensors]
            sparse += [attribute.sparse_tensor, *attribute.sparse_tensors]
            for graph in (attribute.g, *attribute.graphs):
                tensors += graph.initializer
                sparse += graph.sparse_initializer
                nodes += graph.node
    return nodes, tensors + [part for tensor in sparse for part in (tensor.values, tensor.indices)]


@torch.inference_mode()
def check_onnx(folder: Path, model: nn.Module, claimed: dict[str, Any], top1: float) -> str:
    """Run the files of a release beside `model`.

    Args:
        folder: the release.
        model: as config.json and model.safetensors say.
        claimed: `onnx` of results.json.
        top1: of `model`, in %, as results.json says.

    Raises:
        UserError: files that are not those claimed, that name other files or operators than ONNX's, or that give other
            numbers.
    """
    there = {path.relative_to(folder).as_posix() for path in folder.glob('onnx/*')}
    if there != set(claimed) or FLOAT not in claimed:
        raise UserError(f'results.json names {", ".join(claimed) or "no ONNX file"}, onnx/ holds {sorted(there)}')
    require('onnx', *NEEDED)
    import onnx

    size = model.pretrained_cfg['input_size']
    images = torch.randn(3, *size, generator=torch.Generator().manual_seed(0))
    expected = model(images)
    for name in sorted(claimed):
        path, facts = folder / name, claimed[name]
        if hashlib.sha256(path.read_bytes()).hexdigest() != facts['sha256']:
            raise UserError(f'{name}: not the file that results.json has the SHA-256 of')
        try:
            proto = onnx.load(path, load_external_data=False)
        except Exception as e:  # protobuf's own kinds
            raise UserError(f'{name}: not an ONNX file ({type(e).__name__})') from e
        nodes, tensors = _parts(proto)
        if any(tensor.external_data for tensor in tensors):
            raise UserError(f'{name}: keeps weights in another file')
        if foreign := {node.domain for node in nodes} - {'', 'ai.onnx'}:
            raise UserError(f'{name}: has operators of {sorted(foreign)[0]}, which are not those of ONNX')
        said = {prop.key: prop.value for prop in proto.metadata_props}
        for key, value in description(model).items():
            if said.get(key) != value:
                raise UserError(f'{name}: {key} in its metadata is not that of config.json')
        try:
            output = OnnxModel(path, model)(images)
        except Exception as e:  # ONNX Runtime's own kinds
            raise UserError(f'{name}: cannot be run ({" ".join(str(e).split())[:200]})') from e
        if output.shape != expected.shape or not output.isfinite().all():
            raise UserError(f'{name}: an image gives no finite number for each class')
        if name == FLOAT and (difference := (output - expected).abs().max().item()) > TOLERANCE:
            raise UserError(f'{name}: its outputs differ from those of model.safetensors by up to {difference:.3g}')
        if not top1 - LARGEST_LOSS <= facts['top1'] <= 100:
            raise UserError(f'results.json: {name} has {facts["top1"]}%, over {LARGEST_LOSS} points under {top1}%')
    return ', '.join(f'{name} {claimed[name]["top1"]:.2f}%' for name in sorted(claimed))
