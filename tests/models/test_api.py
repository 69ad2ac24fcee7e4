"""timm's model API on every family. timm's own tests cover more of it; these compare values."""

import subprocess
import sys

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import nn

from timm_poolattn.models import FAMILIES, no_weights, save_model
from timm_poolattn.utils import UserError

NAMES = timm.list_models(module=FAMILIES)
RESNETS = [name for name in NAMES if name.split('_')[0] in ('resnet20', 'resnet83')]
OTHERS = [name for name in NAMES if not name.startswith('resnet')]
ONE_OF_EACH = ['resnet20_saam', 'resnet20_fase', 'resnet83_spem', 'resnext29_fase', 'vgg19_fase']
LARGE = ['inception_v4_fase']


def small(name, **kwargs):
    """Of the ResNets, one of a few blocks with the gate and flavour of `name`."""
    return timm.create_model(name, **(dict(depth=20) if name in RESNETS else {}), **kwargs)


def test_no_name_twice_or_of_timm():
    """timm's registry before ours, in a process of its own; it warns where a name is registered again."""
    code = 'import timm; a = timm.list_models(); import timm_poolattn; print(*a)'
    done = subprocess.run([sys.executable, '-W', 'error', '-c', code], capture_output=True, text=True, check=True)
    timm_names = done.stdout.split()
    assert 'resnet50' in timm_names and not set(timm_names) & set(NAMES)
    assert sorted(n for family in FAMILIES for n in timm.list_models(module=family)) == sorted(set(NAMES))
    assert len(timm.list_models()) == len(timm_names) + len(NAMES)


@pytest.mark.parametrize('name', ['resnet20_saam', 'resnext29_fase', 'vgg19_fase', 'inception_v4_se'])
def test_saved_model_is_loaded(name, tmp_path):
    """As fine-tuned to images of another size and other classes than the name's own."""
    model = timm.create_model(name, num_classes=3).eval()
    save_model(model, tmp_path, ['cat', 'dog', 'eel'], dict(input_size=(3, 48, 48)))
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    assert loaded.pretrained_cfg['input_size'] == (3, 48, 48)
    if name.startswith('inception'):
        assert [info['reduction'] for info in loaded.feature_info] == [4, 8, 16]  # of 96 pixels, to which 48 are padded


def test_what_config_json_cannot_say_is_refused(tmp_path):
    model = timm.create_model('resnet20_saam', num_classes=3, act_layer=nn.SiLU).eval()
    with pytest.raises(UserError, match="Model argument 'act_layer' is not serializable: create the model with it as"):
        save_model(model, tmp_path, ['cat', 'dog', 'eel'])
    assert not list(tmp_path.iterdir())
    (tmp_path / 'notes.txt').write_text('stays')
    again = timm.create_model('resnet20_saam', num_classes=3, act_layer='silu').eval()
    again.load_state_dict(model.state_dict())
    save_model(again.to(memory_format=torch.channels_last), tmp_path, ['cat', 'dog', 'eel'])
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert loaded(x).equal(model(x)) and (tmp_path / 'notes.txt').exists()


def test_no_weights_of_any_model_of_timm():
    for name in timm.list_models():
        if not timm.models.is_model_pretrained(name):
            says = str(no_weights(name))
            assert ('it takes those of' in says) == (name in timm.list_models(module='gated_resnet')), says


@pytest.mark.parametrize('name', RESNETS + ONE_OF_EACH[3:] + LARGE)
def test_model_api(name):
    drop_path = dict(drop_path_rate=0.2) if name.startswith('res') else {}
    model = small(name, num_classes=7, in_chans=1, drop_rate=0.1, **drop_path)
    x = torch.randn(2, 1, 32, 32)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    features = model.forward_features(x)
    size = round(32 / model.feature_info[-1]['reduction'])
    assert features.shape == (2, model.num_features, size, size)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.forward_head(features), model(x))
    torch.testing.assert_close(model.stages(model.forward_stem(x)), features)
    assert model.get_classifier() is model.get_submodule(model.get_classifier(name_only=True))

    final, intermediates = model.forward_intermediates(x)
    torch.testing.assert_close(final, features)
    assert [f.shape[1] for f in intermediates] == [info['num_chs'] for info in model.feature_info]
    assert [f.shape[2] for f in intermediates] == [round(32 / info['reduction']) for info in model.feature_info]
    only = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(only[0], intermediates[1])

    model.reset_classifier(5, 'max')
    assert model(x).shape == (2, 5) and model.num_classes == 5
    model.reset_classifier(0, '')
    assert model(x).shape == features.shape

    assert model.prune_intermediate_layers(1) == [len(intermediates) - 1]
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    torch.testing.assert_close(model.forward_features(x), intermediates[1])
    assert model.num_features == intermediates[1].shape[1]


@pytest.mark.parametrize('name', ['resnet20', 'resnet20_saam', 'resnet20_fa', 'resnext29_fa'])
def test_children_in_a_row_are_the_network(name):
    """The usual way to take the head off."""
    model, x = timm.create_model(name).eval(), torch.randn(2, 3, 32, 32)
    *body, head = model.children()
    torch.testing.assert_close(torch.nn.Sequential(*body)(x), model.forward_features(x))
    torch.testing.assert_close(torch.nn.Sequential(*body, head)(x), model(x))


@pytest.mark.parametrize('name', RESNETS + ONE_OF_EACH[3:] + LARGE)
def test_features_only(name):
    model = small(name, features_only=True, out_indices=(0, 2))
    side = 32 if name in LARGE else 96  # its reductions are of the size that it was built for: it pads to 96
    outputs = model(torch.randn(2, 3, side, side))
    assert [tuple(o.shape[1:]) for o in outputs] == [
        (c, round(side / r), round(side / r))
        for c, r in zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    ]


@pytest.mark.parametrize('name', ONE_OF_EACH + LARGE)
def test_grad_checkpointing_changes_nothing(name):
    model = small(name).eval()
    x = torch.randn(2, 3, 32, 32)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize('name', ONE_OF_EACH + LARGE)
def test_device_and_dtype(name):
    model = small(name, device='meta', dtype=torch.float64)
    assert all(p.is_meta and p.dtype == torch.float64 for p in model.parameters())
    model = small(name, dtype=torch.float64).eval()
    assert model(torch.randn(1, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64


def test_autocast_and_channels_last():
    for name in ONE_OF_EACH:
        model = small(name).eval()
        x = torch.randn(2, 3, 32, 32)
        expected = model(x)
        model.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert model(x).dtype == torch.bfloat16


@pytest.mark.parametrize('coarse', [True, False])
def test_group_matcher_covers_every_parameter(coarse):
    for name in (*ONE_OF_EACH, *LARGE):
        with torch.device('meta'):
            model = small(name)
        groups = group_parameters(model, model.group_matcher(coarse))
        assert sorted(n for g in groups.values() for n in g) == sorted(n for n, _ in model.named_parameters())
        if coarse:
            assert len(groups) == 2 + len(model.stages)  # stem, stages, head
        else:
            assert len(groups) == 2 + sum(len(getattr(stage, 'blocks', [1])) for stage in model.stages)


@pytest.mark.parametrize('name', [*ONE_OF_EACH, *LARGE, 'resnet50_fa'])
def test_images_of_any_size(name):
    """No image is too small for a family, and none of odd sides unfit for FA's shortcuts."""
    model = timm.create_model(name).eval()
    for size in ((1, 1), (7, 50)):
        assert model(torch.randn(1, 3, *size)).isfinite().all()


@pytest.mark.parametrize('name', ['cifar_vgg19', 'cifar_inception_v4'])
def test_gates_that_a_family_does_not_carry(name):
    with pytest.raises(ValueError, match=r"unknown gate 'saam'; choose from se, fa, fase; or None, for Cifar"):
        timm.create_model(name, gate='saam')
    with pytest.raises(ValueError, match='leaves no hidden channel of'):
        timm.create_model(name, gate='se', gate_kwargs=dict(rd_ratio=1e-4))
