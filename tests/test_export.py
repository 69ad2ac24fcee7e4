"""Compiled, exported and scripted models give the model's own results, for batches of any size."""

import subprocess
import sys

import onnx
import pytest
import timm
import torch
from click.testing import CliRunner
from torch import nn

from timm_poolattn.cli import main
from timm_poolattn.export import FORMATS, export
from timm_poolattn.layers import GATES, FocusAssociation, create_gate, fa_weight
from timm_poolattn.utils import UserError

#: What is tested by default: SE and FA in one; of SAAM, ONNX is what the command writes below.
QUICK = ['resnet20_fase']
#: Every gate and every family.
NAMES = [f'resnet20_{gate}' for gate in (*GATES, 'fa', 'fase')]
NAMES += ['resnet83_spem', 'resnext29_fase', 'vgg19_fase', 'inception_v4_fase', 'resnet50_saam', 'resnet50_fa']


def cases(quick):
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in NAMES]


def create(name):
    """Of a few blocks, with gates that do something: many start with weights of zero."""
    torch.manual_seed(0)
    depth = dict(resnet20=dict(depth=14), resnet83=dict(depth=20)).get(name.partition('_')[0], {})
    model = timm.create_model(name, **depth)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def images(model, batch):
    return torch.randn(batch, *model.pretrained_cfg['input_size'])


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', cases(['resnet20_saam', *QUICK]))
@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_compile(name, backend):
    torch.compiler.reset()
    model = create(name)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = images(model, 4)
    torch._dynamo.mark_dynamic(x, 0)  # an error where the graph holds for one batch size alone
    with torch.no_grad():
        close(compiled(x), model(x))
        with torch.compiler.set_stance('fail_on_recompile'):
            x = images(model, 3)
            close(compiled(x), model(x))


@pytest.mark.parametrize('name', cases(QUICK))
def test_pt2(name, tmp_path):
    model, path = create(name), tmp_path / 'model.pt2'
    assert export(model, path, 'pt2')['difference'] < 1e-4
    program, x = torch.export.load(path), images(model, 5)
    close(program.module()(x), model(x))


class Gated(nn.Module):
    """A gate between convolutions; FA's is of two blocks, so that the second has an association."""

    def __init__(self, name):
        super().__init__()
        self.stem, self.end = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3)
        self.gate = create_gate(name, 16) if name in GATES else None
        self.fa = None if self.gate else nn.ModuleList([FocusAssociation(16, 1), FocusAssociation(16, 2)])

    def forward(self, x):
        x, ks = self.stem(x), []
        if self.fa is None:
            return self.end(self.gate(x))
        for fa in self.fa:
            ks = [*ks, fa(x, ks)]
            x = fa_weight(x, x.relu(), ks[-1])
        return self.end(x)


READABLE = {'_convolution', 'add', 'amax', 'amin', 'batch_norm', 'cat', 'clamp', 'div', 'flatten', 'linear', 'matmul'}
READABLE |= {'mean', 'mul', 'ne', 'ones_like', 'relu', 'relu_', 'rsub', 'select', 'sigmoid', 'size', 'slice'}
READABLE |= {'softmax', 'sqrt', 'square', 'sub', 'sum', 'to', 'transpose', 'unbind', 'unsqueeze', 'where'}
BUT_IN_NCNN = {'sge': {'std', 'unflatten'}, 'srm': {'var'}}
BUT_IN_NCNN |= {name: {'unflatten'} for name in ('saam', 'saam2', 'saam4')}


@pytest.mark.parametrize('name', [*GATES, 'fa'])
def test_what_other_runtimes_can_read(name):
    """Operators that ExecuTorch, Core ML, pnnx and ncnn have, and weights in the one layout that ExecuTorch takes.

    The height and width of an exported graph may be ranges.
    """
    model = Gated(name).eval()
    x = torch.randn(2, 3, 12, 10)
    traced = torch.jit.trace(model, x)
    torch._C._jit_pass_inline(traced.graph)
    kinds = {kind for node in traced.inlined_graph.nodes() if (kind := node.kind()).startswith('aten::')}
    assert {kind.removeprefix('aten::') for kind in kinds} <= READABLE | BUT_IN_NCNN.get(name, set())
    sides = dict(zip((2, 3), (torch.export.Dim(d, min=4, max=512) for d in 'hw'), strict=True))
    program = torch.export.export(model, (x,), dynamic_shapes=(sides,))
    assert all(t.stride() == torch.empty(t.shape).stride() for t in program.state_dict.values())
    other = torch.randn(2, 3, 7, 9)
    close(program.module()(other), model(other))


@pytest.mark.parametrize('name', cases([name for name in NAMES if name.startswith('resnet20')]))
def test_torchscript(name, tmp_path):
    model, path = create(name), tmp_path / 'model.pt'
    assert export(model, path, 'torchscript')['difference'] < 1e-4
    x = images(model, 5)
    close(torch.jit.load(path)(x), model(x))


@pytest.mark.parametrize('name', ['resnet20_saam2', 'resnet20_spem', 'resnet20_fa'])
@pytest.mark.filterwarnings('ignore')
def test_torchs_older_exporter(name, tmp_path):
    """Which timm's onnx_export.py uses by default."""
    import onnxruntime

    model = create(name)
    x, path = images(model, 2), tmp_path / 'model.onnx'
    torch.onnx.export(model, (x,), str(path), input_names=['images'], dynamo=False)
    (logits,) = onnxruntime.InferenceSession(path).run(None, dict(images=x.numpy()))
    close(torch.from_numpy(logits), model(x).detach())


def test_size_is_that_of_predictions(tmp_path):
    model = timm.create_model('test_resnet', pretrained_cfg_overlay=dict(test_input_size=(3, 192, 192)))
    assert export(model, tmp_path / 'model.pt', 'torchscript')['input_size'] == (3, 192, 192)


@pytest.mark.parametrize('name', cases(QUICK))
def test_onnx(name, tmp_path):
    import onnxruntime

    model, path = create(name), tmp_path / 'model.onnx'
    written = export(model, path, 'onnx')
    assert written['difference'] < 1e-4 and written['bytes'] == path.stat().st_size
    batch, *size = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param and tuple(d.dim_value for d in size) == written['input_size']
    x = images(model, 5)
    (logits,) = onnxruntime.InferenceSession(path).run(['logits'], dict(images=x.numpy()))
    close(torch.from_numpy(logits), model(x).detach())


@pytest.mark.parametrize('format', FORMATS)
def test_a_model_that_skips_is_refused(format, tmp_path):
    model = create('resnet20_fa')
    model.set_skip_threshold(0.5)
    with pytest.raises(UserError, match='cannot skip blocks'):
        export(model, tmp_path / 'model', format)
    assert not list(tmp_path.iterdir())


def test_no_graph_of_a_model_that_skips_is_the_plain_one():
    """torch's own ways to a graph raise: it would hold one way through the network."""
    model, x = create('resnet20_fa'), torch.randn(3, 3, 32, 32)
    plain = model(x)
    model.set_skip_threshold(0.5)
    skipping = model(x)
    assert not torch.allclose(skipping, plain)
    ways = (
        lambda: torch.jit.script(model)(x),
        lambda: torch.jit.trace(model, x)(x),
        lambda: torch.export.export(model, (x,)).module()(x),
    )
    for output, why in zip(ways, ('annotated to be ignored', 'a trace cannot skip', 'data-dependent'), strict=True):
        with pytest.raises(Exception, match=why):
            output()


class TestCommand:
    def run(self, *args, code=0):
        result = CliRunner().invoke(main, ['export', *map(str, args)])
        assert result.exit_code == code, result.output
        return result.output

    def test_writes_what_it_says(self, tmp_path):
        """In a process of its own: torch's exporters print and warn."""
        out = tmp_path / 'new' / 'model.onnx'
        command = [sys.executable, '-m', 'timm_poolattn', 'export', '--format', 'onnx', 'resnet20_saam', str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.startswith(f'wrote {out}: resnet20_saam, ') and len(done.stdout.splitlines()) == 1
        assert [p.name for p in out.parent.iterdir()] == ['model.onnx']

    def test_weights(self, tmp_path):
        """The trained weights are in the file, or random ones where asked for."""
        x = torch.randn(2, 3, 32, 32)
        out = tmp_path / 'model.pt'
        self.run('resnet20_spem', out, '--format', 'torchscript')
        close(torch.jit.load(out)(x), timm.create_model('resnet20_spem', pretrained=True).eval()(x))
        line = self.run('resnet20_sge', out, '--format', 'torchscript', '--untrained')  # in place of the other
        assert 'resnet20_sge with random weights, ' in line and torch.jit.load(out)(x).shape == (2, 10)

    def test_mistakes(self, tmp_path, monkeypatch):
        out = tmp_path / 'model.onnx'
        arguments = (out, '--format', 'onnx')
        assert 'nearest: resnet20_saam' in self.run('resnet20_sam', *arguments, code=2)
        assert 'nearest: resnet20_saam' in self.run('resnet20_sam', *arguments, '--untrained', code=2)
        assert 'resnet326_srm has no weights yet' in self.run('resnet326_srm', *arguments, code=2)
        assert "'tflite' is not one of 'onnx'" in self.run('resnet20_saam', out, '--format', 'tflite', code=2)
        monkeypatch.setattr('timm_poolattn.utils.extras.find_spec', lambda name: None)
        assert "pip install 'timm_poolattn[onnx]'" in self.run('resnet20_saam', *arguments, code=2)
        with pytest.raises(UserError, match="unknown format 'tflite'; choose from onnx, torchscript, pt2"):
            export(timm.create_model('resnet20'), out, 'tflite')
        (tmp_path / 'folder').mkdir()
        assert 'is a directory' in self.run('resnet20_saam', tmp_path / 'folder', '--format', 'pt2', code=2)
        with pytest.raises(UserError, match='is a folder; name a file'):
            export(timm.create_model('resnet20', depth=8), tmp_path / 'folder', 'torchscript')
        assert [p.name for p in tmp_path.iterdir()] == ['folder']

    def test_a_wrong_file_gets_no_name(self, tmp_path, monkeypatch):
        write, run = FORMATS['torchscript']
        monkeypatch.setitem(FORMATS, 'torchscript', (write, lambda path, x: run(path, x) + 1e-3))
        with pytest.raises(RuntimeError, match='not written, its outputs differ from the model by'):
            export(timm.create_model('resnet20'), tmp_path / 'model.pt', 'torchscript')
        assert not list(tmp_path.iterdir())
