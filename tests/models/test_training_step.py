"""Every gate trains: one step against the written-out equations, and finite in every mode that people train in."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from timm.layers.cbam import CbamModule
from torch import nn
from torch.nn import functional as F

from timm_poolattn import CifarResNet
from timm_poolattn.layers import GATES, FocusAssociation, create_gate, fa_weight
from timm_poolattn.models import FAMILIES
from timm_poolattn.models._stage import Stage
from timm_poolattn.models.cifar_resnet import FLAVOURS, BasicBlock, Bottleneck

from ..layers import equations

ALL_GATES = [None, *GATES, 'fa', 'fase']
OURS = {name for family in FAMILIES for name in timm.list_models(module=family)}


def norm_by_equations(z: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    return equations.batch_norm(z, norm.weight, norm.bias, norm.eps)


def conv_norm(x: torch.Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> torch.Tensor:
    return norm_by_equations(F.conv2d(x, conv.weight, stride=conv.stride, padding=conv.padding), norm)


def gate_by_equations(name: str | None, gate: nn.Module, x: torch.Tensor) -> torch.Tensor:
    flat = lambda layer: layer.weight.flatten(1)  # noqa: E731
    if name in (None, 'fa'):
        return x
    if name in ('se', 'fase'):
        biases = [0 if layer.bias is None else layer.bias for layer in (gate.fc1, gate.fc2)]
        return equations.se(x, flat(gate.fc1), flat(gate.fc2), *biases)
    if name == 'se2':
        return equations.se2(x, flat(gate.fc1), flat(gate.fc2))
    if isinstance(gate, CbamModule):
        conv, norm = gate.spatial.conv.conv, partial(norm_by_equations, norm=gate.spatial.conv.bn)
        return equations.cbam(x, flat(gate.channel.fc1), flat(gate.channel.fc2), conv.weight, norm)
    if name == 'cbam':
        return equations.cbam(x, flat(gate.channel.fc1), flat(gate.channel.fc2), gate.conv.weight)
    if name == 'eca':
        return equations.eca(x, gate.conv.weight.flatten())
    if name == 'srm':
        return equations.srm(x, gate.cfc, gate.eps, partial(norm_by_equations, norm=gate.bn))
    if name == 'sge':
        return equations.sge(x, gate.groups, gate.weight, gate.bias, gate.eps)
    if name == 'spem':
        return equations.spem(x, gate.p, gate.gamma_exc, gate.beta_exc, gate.gamma_rew, gate.beta_rew)
    return equations.saam(x, gate.conv.weight, gate.fc1.weight, gate.fc2.weight)


def block_by_equations(
    name: str | None, block: nn.Module, x: torch.Tensor, shortcut: torch.Tensor | None = None
) -> torch.Tensor:
    """U of the block."""
    y = torch.clamp(conv_norm(x, block.conv1, block.bn1), min=0)
    if isinstance(block, Bottleneck):
        y = torch.clamp(conv_norm(y, block.conv2, block.bn2), min=0)
        y = conv_norm(y, block.conv3, block.bn3)
    else:
        y = conv_norm(y, block.conv2, block.bn2)
    return torch.clamp(gate_by_equations(name, block.gate, y) + (x if shortcut is None else shortcut), min=0)


def k_by_equations(fa: FocusAssociation, x: torch.Tensor, ks: list[torch.Tensor]) -> torch.Tensor:
    k = equations.focus(x, *fa.focus.fc1.parameters(), *fa.focus.fc2.parameters())
    if fa.index == 1:  # Eq. 4
        return k
    s = torch.cat([*ks, k], 1)
    return equations.association(s, *fa.association.fc1.parameters(), *fa.association.fc2.parameters())  # Eq. 2


def stage_by_equations(name: str | None, stage: Stage, x: torch.Tensor, stage_ks: list[torch.Tensor]) -> torch.Tensor:
    matched = conv_norm(x, *stage.shortcut) if isinstance(stage.shortcut, nn.Sequential) else x
    k_stage = None
    if stage.fa is not None:  # Fig. 4
        k_stage = k_by_equations(stage.fa, matched, stage_ks)
        stage_ks.append(k_stage)
    x, ks = block_by_equations(name, stage.blocks[0], x, matched), []
    for block in stage.blocks[1:]:
        u = block_by_equations(name, block, x)
        if block.fa is not None:
            ks.append(k_by_equations(block.fa, x, ks))
            u = equations.fa_weight(x, u, ks[-1])
        x = u
    return x if k_stage is None else equations.fa_weight(matched, x, k_stage)


def network_by_equations(name: str | None, model: CifarResNet, images: torch.Tensor) -> torch.Tensor:
    x, stage_ks = torch.clamp(conv_norm(images, model.conv1, model.bn1), min=0), []
    for stage in model.stages:
        x = stage_by_equations(name, stage, x, stage_ks)
    return x.sum((2, 3)) / (x.shape[2] * x.shape[3]) @ model.head.fc.weight.T + model.head.fc.bias


def assert_same_step(module: nn.Module, reference: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> bool:
    """Loss, output and every gradient, in float64 to 1e-6; is any gradient other than 0 for every parameter?"""
    for parameter in module.parameters():
        if parameter.ndim == 1 or not parameter.any():
            nn.init.normal_(parameter, std=0.5)  # away from the start, where half of the terms vanish
    x.requires_grad_()
    steps = []
    for forward in (module, reference):
        output = forward(x)
        weights = torch.randn(output.shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))
        loss = (output * weights).square().mean()
        steps.append([loss, output, *torch.autograd.grad(loss, [x, *module.parameters()])])
    torch.testing.assert_close(*steps, rtol=1e-6, atol=1e-6)
    return all(gradient.any() for gradient in steps[0][2:])


# the gates by name, and the forms of them that networks have in their place
FORMS = [(name, None) for name in ALL_GATES] + [(name, f) for f, flavour in FLAVOURS.items() for name in flavour.gates]


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['contiguous', 'channels_last'])
@pytest.mark.parametrize('block_cls', [BasicBlock, Bottleneck])
@pytest.mark.parametrize('name, flavour', FORMS)
def test_one_step_of_a_stage_is_the_equations(name, flavour, block_cls, layout):
    """Three blocks of 64 channels, where FA has a gate of each kind."""
    dd = dict(dtype=torch.double)
    channel_gate = {'fa': None, 'fase': 'se'}.get(name, name)
    make_gate = FLAVOURS[flavour].gates[name] if flavour else partial(create_gate, channel_gate)

    def has_every_gradient() -> bool:
        blocks = [
            block_cls(
                64,
                64 // block_cls.expansion,
                gate=make_gate(64, **dd) if channel_gate else None,
                fa=FocusAssociation(64, i, **dd) if name in ('fa', 'fase') and i else None,
                **dd,
            )
            for i in range(3)
        ]
        stage = Stage(blocks).train()
        x = torch.randn(3, 64, 5, 4, **dd).to(memory_format=layout)
        return assert_same_step(stage, lambda x: stage_by_equations(name, stage, x, []), x)

    # a gate of few hidden units may be dead where it starts: then the gradients of both are 0
    assert any(has_every_gradient() for _ in range(20))


@pytest.mark.parametrize('block', ['basic', 'bottleneck'])
@pytest.mark.parametrize('name', [None, 'spem', 'saam', 'fa', 'fase'])
def test_one_step_of_a_network_is_the_equations(name, block):
    """Shortcuts of both kinds, gates of stages, and gradients through the k of earlier stages."""
    model = network(name, torch.double, block).train()
    images = torch.randn(3, 3, 8, 8, dtype=torch.double)
    assert assert_same_step(model, lambda x: network_by_equations(name, model, x), images)


def network(name: str | None, dtype: torch.dtype = torch.float32, block: str = 'basic') -> CifarResNet:
    """The least depth that has every part: FA's gates begin with a stage's second block."""
    blocks = 6 if name in ('fa', 'fase') else 3
    return CifarResNet(blocks * (2 if block == 'basic' else 3) + 2, block, gate=name, dtype=dtype)


def train_three_steps(
    model: nn.Module, images: torch.Tensor, dtype: torch.dtype, forward: Callable | None = None
) -> None:
    """Three steps of SGD, by `forward` or the model itself: all is finite, and every parameter gets a gradient."""
    forward = model if forward is None else forward
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    target = torch.arange(len(images)) % 10
    for _ in range(3):
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = forward(images)
        loss = F.cross_entropy(output.double(), target)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert all(t.isfinite().all() for t in model.state_dict().values())


IMAGES = {
    'random': torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
    'constant': torch.full((4, 3, 16, 16), 0.5),
}
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float64': torch.float64}


@pytest.mark.parametrize('images', IMAGES)
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('block', ['basic', 'bottleneck'])
@pytest.mark.parametrize('name', ALL_GATES)
def test_three_steps_are_finite(name, block, layout, dtype, images):
    own = torch.float64 if dtype == 'float64' else torch.float32
    model = network(name, own, block).to(memory_format=LAYOUTS[layout])
    train_three_steps(model, IMAGES[images].to(own).to(memory_format=LAYOUTS[layout]), DTYPES[dtype])


# the default run captures what people train in; the slow one compiles all of it, of which CI takes one cell a gate
_COMPILED = [
    pytest.param(backend, layout, dtype, id=f'{backend}-{layout}-{dtype}', marks=() if fast else pytest.mark.slow)
    for backend, layout, dtype, fast in (
        ('aot_eager', 'channels_last', 'bfloat16', True),
        *(('inductor', layout, dtype, False) for layout in LAYOUTS for dtype in DTYPES),
    )
]


#: Compiling takes seconds. These have no code that another gate has not.
_ALIKE = (None, 'saam2', 'saam4', 'fase')
_COMPILED_GATES = [
    *(pytest.param(name, 'basic', marks=pytest.mark.slow if name in _ALIKE else ()) for name in ALL_GATES),
    ('spem', 'bottleneck'),  # its own backbone's
    pytest.param('fa', 'bottleneck', marks=pytest.mark.slow),
]


@pytest.mark.parametrize('backend, layout, dtype', _COMPILED)
@pytest.mark.parametrize('name, block', _COMPILED_GATES)
def test_three_compiled_steps_are_finite(name, block, backend, layout, dtype):
    own = torch.float64 if dtype == 'float64' else torch.float32
    model = network(name, own, block).to(memory_format=LAYOUTS[layout])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for images in IMAGES.values():
        train_three_steps(model, images.to(own).to(memory_format=LAYOUTS[layout]), DTYPES[dtype], compiled)


@pytest.mark.slow
@pytest.mark.parametrize('layout', LAYOUTS)
# not se, se2 (timm's) and eca: torch 2.14's inductor gets strides wrong at their second size, where contiguous
@pytest.mark.parametrize('name', ['spem', 'saam', 'saam2', 'saam4', 'cbam', 'sge', 'srm', 'fa'])
def test_inductor_with_dynamic_sides(name, layout):
    """Images of any size by one compiled step, which aot_eager never lowers."""
    gate = FocusAssociation(16, 1) if name == 'fa' else create_gate(name, 16).to(memory_format=LAYOUTS[layout])
    run = (lambda x: fa_weight(x, 2 * x, gate(x, []))) if name == 'fa' else gate
    torch._dynamo.reset()
    compiled = torch.compile(run, dynamic=True, fullgraph=True)
    for side in (12, 9):
        x = torch.randn(4, 16, side, side + 1).to(memory_format=LAYOUTS[layout]).requires_grad_()
        (gradient,) = torch.autograd.grad(compiled(x).square().sum(), x)
        torch.testing.assert_close(gradient, torch.autograd.grad(run(x).square().sum(), x)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name, block', _COMPILED_GATES)
def test_compiled_gradients_are_the_eager_ones(name, block):
    model = network(name, torch.float64, block)
    images, weights = IMAGES['random'].double(), torch.randn(4, 10, dtype=torch.double)
    gradients = []
    torch._dynamo.reset()
    for forward in (model, torch.compile(copy.deepcopy(model), backend='aot_eager', fullgraph=True)):
        forward.zero_grad()
        (forward(images) * weights).sum().backward()
        gradients.append([p.grad for p in forward.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('name', ALL_GATES)
def test_small_batches_and_maps(name):
    """A batch of one trains, single positions are classified, and an empty batch gives an empty answer."""
    model = network(name)
    if name == 'srm':  # its batch norm has one value for a channel then
        with pytest.raises(ValueError, match='more than 1 value per channel'):
            model(IMAGES['random'][:1])
    else:
        train_three_steps(model, IMAGES['random'][:1], torch.float32)
    model.eval()
    assert model(torch.randn(2, 3, 1, 1)).isfinite().all()
    assert model(torch.randn(1, 3, 5, 1)).shape == (1, 10)
    assert model(torch.randn(0, 3, 32, 32)).shape == (0, 10)


def one_step(name: str) -> None:
    """One training step at the name's own size."""
    model = timm.create_model(name, num_classes=10).train()
    x = torch.randn(2, *model.pretrained_cfg['input_size'])
    F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


_LARGE = ('resnet110', 'resnet164', 'resnet245', 'resnet326', 'cifar_inception', 'inception', 'resnet50', 'resnext50')


@pytest.mark.parametrize(
    'name', [pytest.param(n, marks=pytest.mark.slow if n.startswith(_LARGE) else ()) for n in sorted(OURS)]
)
def test_every_name_trains(name):
    one_step(name)
