import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from timm_poolattn.training import warm_start
from timm_poolattn.training.warm_starts import without_place


def outputs(name: str, weights) -> torch.Tensor:
    model = timm.create_model(name)
    timm.models.load_checkpoint(model, str(weights))
    return model.eval()(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize('gate', ['saam', 'fa', 'spem'])
def test_a_deeper_model_starts_with_the_same_outputs(gate, tmp_path):
    shallow, deep = f'resnet20_{gate}.cifar10', f'resnet56_{gate}.cifar10'
    warm_start(deep, shallow, tmp_path / 'deep.safetensors')
    save_file(timm.create_model(shallow, pretrained=True).state_dict(), tmp_path / 'shallow.safetensors')
    expected = outputs(shallow, tmp_path / 'shallow.safetensors')
    torch.testing.assert_close(outputs(deep, tmp_path / 'deep.safetensors'), expected, rtol=0, atol=1e-5)


def test_its_new_blocks_train(tmp_path):
    warm_start('resnet32_saam', 'resnet20_saam.cifar10', tmp_path / 'deep.safetensors')
    model = timm.create_model('resnet32_saam')
    timm.models.load_checkpoint(model, str(tmp_path / 'deep.safetensors'))
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(stage.blocks[4].bn2.weight.grad.abs().max() > 0 for stage in model.stages)


def test_other_classes_and_another_gate_keep_the_convolutions(tmp_path):
    counts = warm_start('resnet20_spem.cifar100', 'resnet20_saam.cifar10', tmp_path / 'out.safetensors')
    written = load_file(tmp_path / 'out.safetensors')
    source = timm.create_model('resnet20_saam.cifar10', pretrained=True).state_dict()
    assert counts['copied'] + counts['new'] == len(written)
    convs = [name for name in written if 'conv' in name and '.gate.' not in name]
    assert len(convs) == 19 and all(torch.equal(written[name], source[name]) for name in convs)
    assert written['head.fc.weight'].shape == (100, 64)
    assert [path.name for path in tmp_path.iterdir()] == ['out.safetensors']


def test_a_source_of_another_family_is_refused(tmp_path):
    save_file({'features.0.weight': torch.zeros(3, 3)}, tmp_path / 'other.safetensors')
    with pytest.raises(ValueError, match=r'nothing in it fits resnet20_saam; take a model of the same family'):
        warm_start('resnet20_saam', str(tmp_path / 'other.safetensors'), tmp_path / 'out.safetensors')
    assert not (tmp_path / 'out.safetensors').exists()


@pytest.mark.parametrize(
    'source, said',
    [
        ('resnet20.cifar10', 'resnet20.cifar10'),
        ('hf-hub:org/x', 'hf-hub:org/x'),
        ('local-dir:runs/a/x', 'local-dir:x'),
        ('runs/a/x.safetensors', 'x.safetensors'),
    ],
)
def test_a_source_without_its_place(source, said):
    assert without_place(source) == said


def test_the_file_says_where_it_comes_from(tmp_path):
    warm_start('resnet32_saam', 'resnet20_saam.cifar10', tmp_path / 'deep.safetensors')
    with safe_open(tmp_path / 'deep.safetensors', 'pt') as f:
        assert f.metadata() == {'warm_start': 'resnet20_saam.cifar10 resnet32_saam'}
