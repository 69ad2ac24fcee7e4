import pytest
import timm
import torch

import timm_poolattn
from timm_poolattn.insert import InsertedGate

#: One small model of each family, and how many residual blocks it has.
MODELS = {
    'resnet18': 8,
    'resnet26': 8,
    'resnext26ts': 8,
    'resnetv2_18': 8,
    'regnetx_002': 13,
    'regnety_002': 13,
    'convnext_atto': 12,
    'efficientnet_b0': 9,
    'seresnet18': 8,
}


def create(name):
    """With batch norms that do something, as in a trained model."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.weight, 0.5, 1.5)
            torch.nn.init.normal_(m.bias, std=0.1)
        if isinstance(getattr(m, 'gamma', None), torch.nn.Parameter):  # ConvNeXt's layer scale starts at 1e-6
            torch.nn.init.constant_(m.gamma, 0.5)
    return model.eval()


@pytest.mark.parametrize('name', MODELS)
def test_insertion_changes_nothing_and_removal_undoes_it(name):
    model = create(name)
    x = torch.randn(2, 3, 64, 64)
    keys, before = list(model.state_dict()), model(x)
    assert timm_poolattn.insert(model, 'saam') is model and not model.training
    gates = [m for m in model.modules() if isinstance(m, InsertedGate)]
    assert len(gates) == MODELS[name]
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for gate in gates:
            gate.alpha.fill_(1.0)
    assert not torch.allclose(model(x), before, rtol=1e-2, atol=1e-2)
    assert timm_poolattn.remove(model) is model
    assert list(model.state_dict()) == keys and model(x).equal(before)


@pytest.mark.parametrize('gate', ['spem', 'saam', 'se', 'cbam'])
def test_training_moves_the_gate(gate):
    model = timm_poolattn.insert(create('resnet18'), gate).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    inserted = [m for m in model.modules() if isinstance(m, InsertedGate)]
    start = [p.clone() for p in inserted[-1].gate.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.arange(4)).backward()
        optimizer.step()
    assert all(m.alpha != 0 for m in inserted)
    assert any(not p.equal(s) for p, s in zip(inserted[-1].gate.parameters(), start, strict=True))


def test_without_identity_init_and_with_arguments():
    model = create('resnet18')
    x = torch.randn(2, 3, 64, 64)
    before = model(x)
    timm_poolattn.insert(model, 'spem', identity_init=False, fixed_lambda=0.3)
    assert not torch.allclose(model(x), before, rtol=1e-2, atol=1e-2)
    gates = [m.gate for m in model.modules() if isinstance(m, InsertedGate)]
    assert [g.channels for g in gates] == [64, 64, 128, 128, 256, 256, 512, 512]
    assert all(g.fixed_lambda == 0.3 for g in gates)


def test_drop_path_stays():
    model = timm.create_model('resnet18', drop_path_rate=0.5)
    rates = [m.drop_path.drop_prob for m in model.modules() if getattr(m, 'drop_path', None) is not None]
    timm_poolattn.insert(model, 'saam')
    replaced = [m.replaced.drop_prob for m in model.modules() if isinstance(m, InsertedGate) and m.replaced is not None]
    assert replaced == rates and len(rates) == 7


def test_the_penalty_is_found():
    from timm_poolattn.training import PenaltyTask

    model = timm_poolattn.insert(create('resnet18'), 'spem')
    assert PenaltyTask(model, torch.nn.CrossEntropyLoss()).penalty().item() == 8 * 0.5


def test_mistakes():
    model = create('resnet18')
    with pytest.raises(ValueError, match="unknown gate 'foo'"):
        timm_poolattn.insert(model, 'foo')
    with pytest.raises(ValueError, match='must divide channels=64'):
        timm_poolattn.insert(model, 'sge', groups=7)
    assert not any(isinstance(m, InsertedGate) for m in model.modules())
    timm_poolattn.insert(model, 'saam')
    with pytest.raises(ValueError, match='inserted gates already'):
        timm_poolattn.insert(model, 'saam')
    with pytest.raises(ValueError, match='no residual blocks'):
        timm_poolattn.insert(timm.create_model('vgg11', num_classes=2), 'saam')
    with pytest.raises(ValueError, match='no residual blocks'):
        timm_poolattn.insert(timm.create_model('test_vit'), 'saam')
