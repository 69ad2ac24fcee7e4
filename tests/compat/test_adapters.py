"""LoRA by peft, and offloading and hooks by accelerate, as on plain resnet20."""

import pytest
import timm
import torch
from torch import nn

import timm_poolattn
from timm_poolattn.layers import GATES
from timm_poolattn.utils import UserError

pytestmark = pytest.mark.compat
peft = pytest.importorskip('peft')
accelerate = pytest.importorskip('accelerate')

NAMES = ['resnet20', *(f'resnet20_{gate}' for gate in (*GATES, 'fa', 'fase'))]
X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('name', NAMES)
def test_lora(name):
    """Every convolution and linear layer, the gates' too, gets an adapter that trains and merges."""
    model = timm.create_model(name)
    model(X)  # statistics of the norms
    targets = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    adapted.train()
    adapted(X).square().sum().backward()
    adapters = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * len(targets)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapters.values())
    adapted.eval()
    expected = adapted(X)
    torch.testing.assert_close(adapted.merge_and_unload()(X), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', NAMES)
def test_cpu_offload(name, tmp_path):
    model = timm.create_model(name).eval()
    expected = model(X)
    assert accelerate.cpu_offload(model, execution_device='cpu')(X).equal(expected)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert accelerate.disk_offload(model, tmp_path / 'offload', execution_device='cpu')(X).equal(expected)


@pytest.mark.parametrize('name', ['resnet20', 'resnet20_fa', 'vgg19_fa', 'resnet50_fa'])
def test_a_device_map(name, tmp_path):
    """As device_map='auto' makes it: part in memory, part on the disk."""
    model = timm.create_model(name).eval()
    expected = model(X)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    device_map = accelerate.infer_auto_device_map(model, max_memory={'cpu': int(0.7 * size), 'disk': 10**12})
    assert {*device_map.values()} == {'cpu', 'disk'}
    options = dict(offload_dir=tmp_path, main_device='cpu', force_hooks=True)
    assert accelerate.dispatch_model(model, device_map, **options)(X).equal(expected)


@pytest.mark.parametrize('gate', ['saam', 'fa'])
def test_what_is_offloaded_takes_no_gates(gate):
    model = accelerate.cpu_offload(timm.create_model('resnet18').eval(), execution_device='cpu')
    with pytest.raises(UserError, match='is offloaded, its weights are elsewhere'):
        timm_poolattn.insert(model, gate)
    assert all(p.is_meta for p in model.parameters()) and model(torch.randn(2, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize('name', NAMES)
def test_accelerator_trains(name):
    model = timm.create_model(name)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision='bf16')
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.01))
    before = [p.detach().clone() for p in model.parameters()]
    accelerator.backward(model(X).float().square().mean())
    optimizer.step()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert any(not p.equal(b) for p, b in zip(model.parameters(), before, strict=True))
