"""What walks, wraps, patches or captures modules works on a gated network as it does on plain resnet20."""

import copy
import pickle
import warnings
from functools import partial

import pytest
import timm
import torch
from timm.layers import convert_splitbn_model, freeze_batch_norm_2d
from torch import distributed, nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from torch.nn.utils import parametrizations, parametrize, prune

import timm_poolattn
from timm_poolattn.data import load_images
from timm_poolattn.layers import CBAM, ECA, GATES, SAAM, SGE, SPEM, SRM, FocusAssociation
from timm_poolattn.models._stage import Stage
from timm_poolattn.models.cifar_vgg import VggBlock
from timm_poolattn.utils import UserError

from ..test_readmes import ROOT, blocks

NAMES = ['resnet20', *(f'resnet20_{gate}' for gate in (*GATES, 'fa', 'fase'))]
GATED = [name for name in NAMES if name != 'resnet20']
X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
OURS = (SPEM, SAAM, CBAM, ECA, SGE, SRM, FocusAssociation)


def convs(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def gates(model):
    found = [getattr(block, 'gate', None) for stage in model.stages for block in stage.blocks]
    found = [m for m in found if m is not None and not isinstance(m, nn.Identity)]
    return found + [m for m in model.modules() if isinstance(m, FocusAssociation)]


def step(model, x=X):
    """The gradients of one training step; they are finite, and none is missing."""
    model.zero_grad()
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


class Wrapper(nn.Module):
    """What knows nothing of the block in it but how it is called."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, shortcut: torch.Tensor | None = None):
        return self.block(x, shortcut)


@pytest.mark.parametrize('name', ['resnet20', 'resnet20_saam', 'resnet83_spem', 'resnet20_fa'])
def test_wrapped_blocks(name):
    """A block's FA is its stage's to call: where it is out of sight there is an error, not a block without FA."""
    model = timm.create_model(name).eval()
    expected = model(X)
    for stage in model.stages:
        stage.blocks = nn.ModuleList(map(Wrapper, stage.blocks))
    if name == 'resnet20_fa':
        with pytest.raises(AttributeError, match="'Wrapper' object has no attribute 'fa'"):
            model(X)
    else:
        assert torch.equal(model(X), expected) and torch.equal(torch.jit.script(model)(X), expected)
        step(model.train())


@pytest.mark.parametrize('name', [name for name in NAMES if 'fa' not in name] + ['resnet83_spem', 'vgg19_se'])
def test_what_takes_one_argument(name):
    """Stages, and blocks but the first of each, give way to modules that are called with a map alone."""
    model = timm.create_model(name).eval()
    expected = model(X)
    for stage in model.stages:
        blocks = getattr(stage, 'blocks', ())  # VGG-19's stages are its blocks
        for i in range(1, len(blocks)):
            blocks[i] = nn.Sequential(blocks[i], nn.Identity())
    assert torch.equal(model(X), expected)
    if hasattr(model, 'init_weights'):
        model.init_weights()
        expected = model(X)
    x = model.forward_stem(X)
    for i, stage in enumerate(model.stages):
        x = stage(x)
        model.stages[i] = nn.Sequential(stage, nn.Identity())
    assert torch.equal(model.forward_head(x), expected) and torch.equal(model(X), expected)
    assert torch.equal(model.forward_intermediates(X)[0], x)
    step(model.train())


@pytest.mark.parametrize('name', ['resnet20_fa', 'vgg19_fa'])
def test_gated_stages_need_their_ks(name):
    model = timm.create_model(name)
    with pytest.raises(AssertionError, match=r'FA: a gated .* needs the k of'):
        x = model.forward_stem(X)
        for stage in model.stages:
            x = stage(x)


@pytest.mark.parametrize('name', NAMES)
def test_pruning(name):
    model = timm.create_model(name)
    prune.global_unstructured([(c, 'weight') for c in convs(model)], prune.L1Unstructured, amount=0.5)
    for _ in range(2):  # a second step uses the masked weights again
        step(model)
    before = model.eval()(X)
    with torch.no_grad():
        for conv in convs(model):
            conv.weight_orig.mul_(2)
    assert not torch.allclose(model(X), before)
    share = sum((c.weight == 0).sum() for c in convs(model)) / sum(c.weight.numel() for c in convs(model))
    assert share == pytest.approx(0.5, abs=0.01)
    for conv in convs(model):
        prune.remove(conv, 'weight')
    step(model)


@pytest.mark.parametrize('norm', [parametrizations.spectral_norm, parametrizations.weight_norm])
@pytest.mark.parametrize('name', NAMES)
def test_parametrizations(name, norm):
    """Every convolution and linear layer, the gates' too."""
    model = timm.create_model(name)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers:
        norm(layer)
    for _ in range(2):
        step(model)
    model.eval()
    parametrized = model(X)
    for layer in layers:
        parametrize.remove_parametrizations(layer, 'weight')
    torch.testing.assert_close(model(X), parametrized, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', NAMES)
def test_every_module_is_called(name):
    """Forward, pre-forward and backward hooks see every module that holds parameters, and what they return counts."""
    model = timm.create_model(name)
    owners = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    owners += gates(model)
    calls = {kind: set() for kind in ('pre', 'forward', 'backward')}
    handles = []
    for m in owners:
        handles.append(m.register_forward_pre_hook(lambda m, args: calls['pre'].add(m)))
        handles.append(m.register_forward_hook(lambda m, args, out: calls['forward'].add(m)))
        handles.append(m.register_full_backward_hook(lambda m, g_in, g_out: calls['backward'].add(m)))
    for m in model.modules():  # backward hooks refuse what is changed in place, as on plain resnet20
        if hasattr(m, 'inplace'):
            m.inplace = False
    step(model)
    assert all(seen == set(owners) for seen in calls.values())
    for handle in handles:
        handle.remove()
    plain = model.eval()(X)
    for gate in gates(model)[:1]:
        gate.register_forward_hook(lambda m, args, out: out * 0)
        assert not torch.allclose(model(X), plain)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('name', GATED)
def test_subclassed_and_patched_gates(name, training):
    """A subclass in a gate's place, and a forward patched on an instance, are what runs."""
    x = X if training else X[:2]
    for patch in (True, False):
        model, calls = timm.create_model(name).train(training), []
        before = model(x)
        for gate in gates(model):
            cls = type(gate)

            def forward(*args, _cls=cls, _gate=gate, _calls=calls, **kwargs):
                _calls.append(_gate)
                return _cls.forward(_gate, *args, **kwargs) * 0

            if patch:
                gate.forward = forward
            else:
                gate.__class__ = type(f'Zero{cls.__name__}', (cls,), {'forward': lambda self, *a, f=forward: f(*a)})
        after = model(x)
        assert len(calls) == len(gates(model)) and not torch.allclose(after, before)


@pytest.mark.parametrize('name', NAMES)
def test_patched_norms(name):
    model, calls = timm.create_model(name), []
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.forward = lambda x, f=norm.forward: (calls.append(1), f(x))[1]
    model(X)
    assert len(calls) == len(norms)


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('name', ['resnet20', 'resnet20_saam', 'resnet20_spem', 'resnet20_fa', 'resnet20_srm'])
def test_statistics_that_are_not_tracked_stay(name, compiled):
    model = timm.create_model(name, depth=8)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.track_running_stats = False
    before = {n: b.clone() for n, b in model.named_buffers()}
    torch._dynamo.reset()
    (torch.compile(model, backend='aot_eager') if compiled else model)(X).sum().backward()
    assert all(b.equal(before[n]) for n, b in model.named_buffers())


@pytest.mark.parametrize('name', NAMES)
def test_exchanged_norms(name):
    """timm's converters reach every norm: a frozen network trains with the statistics that it had, on one image too."""
    model = timm.create_model(name)
    model(X)
    expected = model.eval()(X)
    torch.testing.assert_close(convert_splitbn_model(copy.deepcopy(model)).eval()(X), expected)
    frozen = freeze_batch_norm_2d(model).train()
    before = {n: b.clone() for n, b in frozen.named_buffers()}
    torch.testing.assert_close(frozen(X), expected, rtol=1e-4, atol=1e-4)
    step(frozen, X[:1])
    assert all(b.equal(before[n]) for n, b in frozen.named_buffers())


@pytest.fixture(scope='module')
def process_group(tmp_path_factory):
    """Of this process alone."""
    store = tmp_path_factory.mktemp('group') / 'store'
    distributed.init_process_group('gloo', init_method=f'file://{store}', rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize('name', ['resnet20', 'resnet20_saam', 'resnet20_spem', 'resnet20_fa', 'spem', 'fa'])
def test_distributed(name, process_group):
    """DDP and FSDP train the gates, inserted ones too; what they wrap takes no gates any more, and gives none back."""
    model = timm.create_model(name if '20' in name else 'resnet18')
    if '20' not in name:
        timm_poolattn.insert(model, name)
    model, x = model.eval(), torch.randn(2, 3, 64, 64)
    expected = step(model, x)
    ddp = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    fsdp = fully_shard(copy.deepcopy(model), mesh=init_device_mesh('cpu', (1,)))
    torch.testing.assert_close({n.removeprefix('module.'): g for n, g in step(ddp, x).items()}, expected)
    fsdp(x).square().sum().backward()
    torch.testing.assert_close({n: p.grad.full_tensor() for n, p in fsdp.named_parameters()}, expected)
    for wrapped in (ddp, fsdp):
        with pytest.raises(UserError, match='shares the parameters' if '20' in name else 'shares|already'):
            timm_poolattn.insert(wrapped, 'saam')
        with pytest.raises(UserError, match='shares the parameters'):
            timm_poolattn.remove(wrapped)


@pytest.mark.parametrize('name', ['resnet20', 'resnet20_spem', 'resnet20_saam', 'resnet20_fa'])
def test_distributed_tensors(name, process_group):
    """Images that are sharded over the batch."""
    mesh, model = init_device_mesh('cpu', (1,)), timm.create_model(name).eval()
    expected = step(model)
    sharded = distribute_module(copy.deepcopy(model), mesh)
    found = step(sharded, distribute_tensor(X, mesh, [Shard(0)]))
    torch.testing.assert_close({n: g.full_tensor() for n, g in found.items()}, expected)


@pytest.mark.parametrize('name', ['resnet20_spem', 'resnet20_saam', 'resnet20_fa', 'resnet20_fase'])
def test_sharding_by_block(name, process_group):
    """FSDP2 as the README of the models has it."""
    (code,) = (
        code for code in blocks(ROOT / 'timm_poolattn' / 'models' / 'README.md', 'python') if 'fully_shard' in code
    )
    model, x, scope = timm.create_model(name).eval(), torch.randn(2, 3, 32, 32), {}
    expected = step(model, x)
    exec(code, scope)
    sharded = scope['shard'](copy.deepcopy(model), mesh=init_device_mesh('cpu', (1,)))
    sharded(x).square().sum().backward()
    torch.testing.assert_close({n: p.grad.full_tensor() for n, p in sharded.named_parameters()}, expected)


@pytest.mark.parametrize('name', ['resnet20', 'resnet20_fa'])
def test_sharding_by_stage_in_bfloat16(name, process_group):
    """FSDP2 casts what a stage is called with, and rebuilds the lists in it."""
    model = timm.create_model(name, depth=8 if name == 'resnet20' else 14).eval()
    expected = model(X)
    options = dict(mesh=init_device_mesh('cpu', (1,)), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    for name, buffer in [*model.named_buffers()]:
        if buffer.is_floating_point():
            model.get_submodule(name.rpartition('.')[0]).register_buffer(name.rpartition('.')[2], buffer.bfloat16())
    for module in (*model.stages, model):
        fully_shard(module, **options)
    output = model(X)
    output.float().square().sum().backward()
    torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.1)
    assert all(p.grad.full_tensor().isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('name', ['resnet20_saam', 'resnet50_fa'])
def test_a_hook_that_drops_the_shortcut_is_refused(name):
    """A block that took its input in place of the projection would give wrong values."""
    model = timm.create_model(name)
    (block,) = [b for b in (model.stages[0] if '20' in name else model.layer1).blocks if b.needs_shortcut]
    block.register_forward_pre_hook(lambda module, args: args[:1])
    with pytest.raises(AssertionError, match='takes the shortcut too'):
        model(X)


@pytest.mark.parametrize('name', NAMES)
def test_checkpointing_frozen_parts_and_a_second_backward(name):
    model = timm.create_model(name).double()
    x = X.double()
    expected = step(model, x)
    model.set_grad_checkpointing()
    torch.testing.assert_close(step(model, x), expected)
    model.set_grad_checkpointing(False)
    loss = model(x).square().sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(loss, list(model.parameters())))
    for stage in model.stages[:2]:
        stage.requires_grad_(False)
    kept = step(model, x)
    torch.testing.assert_close(kept, {n: expected[n] for n in kept})


@pytest.mark.parametrize('kinds', [OURS, (Stage, VggBlock)], ids=['gates', 'stages'])
@pytest.mark.parametrize('name', [*GATED, 'vgg19_fa', 'resnet50_fa'])
def test_checkpointed_modules(name, kinds):
    """What is called again in the backward pass sees what it saw in the forward pass."""
    model = timm.create_model(name).eval().double()
    x = X[:2].double()
    expected = step(model, x)
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, kinds))
    got = {name.replace('._checkpoint_wrapped_module', ''): grad for name, grad in step(model, x).items()}
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize('name', ['resnet20_fa', 'vgg19_fa'])
def test_reentrant_checkpoints_of_stages(name):
    """They would drop gradients of k without a word."""
    model = timm.create_model(name)
    wrapper = partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.REENTRANT)
    apply_activation_checkpointing(model, wrapper, check_fn=lambda m: isinstance(m, Stage | VggBlock))
    with pytest.raises(AssertionError, match='use_reentrant=False'):
        step(model, X.clone().requires_grad_())


@pytest.mark.parametrize('name', NAMES)
def test_autodiff_of_any_kind(name):
    """Forward mode, gradients of gradients, a vectorised Hessian, and gradients by sample."""
    model = timm.create_model(name, depth=8, num_classes=2, in_chans=1).eval().double()
    x = torch.randn(2, 1, 8, 8, dtype=torch.double)
    direction = torch.randn_like(x)
    f = lambda x: model(x).square().sum()  # noqa: E731
    gradient = torch.func.grad(f)
    _, tangent = torch.func.jvp(f, (x,), (direction,))
    torch.testing.assert_close(tangent, (gradient(x) * direction).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = f(torch.autograd.forward_ad.make_dual(x, direction))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)
    _, curvature = torch.func.jvp(gradient, (x,), (direction,))
    hessian = torch.autograd.functional.hessian(f, x[:1], vectorize=True)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(f, x[:1]))
    torch.testing.assert_close(torch.autograd.functional.hvp(f, x, direction)[1], curvature, rtol=1e-6, atol=1e-9)
    alone = torch.stack([torch.func.grad(lambda s: f(s[None]))(s) for s in x])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(lambda s: f(s[None])))(x), alone)


@pytest.mark.parametrize('name', NAMES)
def test_copies_and_devices(name):
    """deepcopy, pickling, meta construction, to_empty, half precision and functional_call."""
    model = timm.create_model(name).eval()
    expected = model(X)
    assert copy.deepcopy(model)(X).equal(expected) and pickle.loads(pickle.dumps(model))(X).equal(expected)
    meta = timm.create_model(name, device='meta').to_empty(device='cpu')
    meta.load_state_dict(model.state_dict())
    assert meta.eval()(X).equal(expected)
    assert torch.func.functional_call(model, dict(model.named_parameters()), (X,)).equal(expected)
    half = copy.deepcopy(model).bfloat16()(X.bfloat16())
    assert half.dtype == torch.bfloat16 and (half.argmax(1) == expected.argmax(1)).float().mean() >= 0.75


def trained(name):
    """The weights that the package has of it, or its own after a few steps: quantising needs something to keep."""
    if timm.models.is_model_pretrained(f'{name}.cifar10'):
        return timm.create_model(f'{name}.cifar10', pretrained=True).eval()
    model = timm.create_model(name)
    for _ in range(2):
        model(X)  # statistics of the norms
    return model.eval()


@pytest.mark.parametrize('name', NAMES)
def test_fx_quantisation(name):
    """Post-training, static, every convolution and linear layer int8; the answers stay near the float model's."""
    model = trained(name)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        prepared = quantize_fx.prepare_fx(copy.deepcopy(model), quantization.get_default_qconfig_mapping('x86'), (X,))
        prepared(X)
        quantised = quantize_fx.convert_fx(prepared)
    assert not [m for m in quantised.modules() if type(m) in (nn.Conv2d, nn.Linear)]
    with torch.no_grad():
        error = (quantised(X) - model(X)).norm() / model(X).norm()
    assert error < 0.3


@pytest.mark.parametrize(
    'name',
    ['resnet20_saam', *(pytest.param(name, marks=pytest.mark.slow) for name in ('resnet20_spem', 'resnet20_fa'))],
)
def test_int8_accuracy(name, cifar10_mini):
    """Post-training quantisation costs at most two points on 1,000 test images."""
    model = timm.create_model(f'{name}.cifar10', pretrained=True).eval()
    cfg = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).view(1, 3, 1, 1) for key in ('mean', 'std'))
    images = {}
    for split in ('train', 'test'):
        data = load_images(cifar10_mini, split)
        images[split] = (data.images.permute(0, 3, 1, 2) / 255 - mean) / std
    target = torch.tensor([cfg['label_names'].index(c) for c in data.classes])[data.targets]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')
        mapping = quantization.get_default_qconfig_mapping('x86')
        prepared = quantize_fx.prepare_fx(copy.deepcopy(model), mapping, (images['train'][:1],))
        prepared(images['train'][::10])
        quantised = quantize_fx.convert_fx(prepared)
        top1 = [100 * (m(images['test']).argmax(1) == target).float().mean().item() for m in (model, quantised)]
    assert len(target) == 1000 and top1[0] > 88 and top1[1] > top1[0] - 2


@pytest.mark.parametrize('name', NAMES)
def test_eager_quantisation_aware_training(name):
    """Every convolution and linear layer, the score convolution too, is observed and trained."""
    model = timm.create_model(name).train()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model.qconfig = quantization.get_default_qat_qconfig('x86')
        quantization.prepare_qat(model, inplace=True)
    for _ in range(2):
        step(model)
    layers = [m for m in model.modules() if hasattr(m, 'weight_fake_quant')]
    assert len(layers) == len([m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)])
    for layer in layers:
        observer = layer.weight_fake_quant.activation_post_process
        assert observer.min_val.numel() and observer.min_val.isfinite().all()
