"""FA as adaptive computation: blocks with a small k do not run."""

import pytest
import timm
import torch

from timm_poolattn import set_skip_threshold
from timm_poolattn.layers import FocusAssociation, fa_weight
from timm_poolattn.models import _stage as _base
from timm_poolattn.models import cifar_vgg
from timm_poolattn.utils import UserError

X = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
X *= torch.arange(1, 7).view(6, 1, 1, 1)


@pytest.fixture(params=['resnet20_fa', 'resnext29_fase', 'vgg19_fa'])
def model(request, monkeypatch):
    """With k that differ by sample and block: an untrained gate gives all samples nearly the same."""
    monkeypatch.setattr(FocusAssociation, 'forward', lambda self, x, ks: (x.abs().mean((1, 2, 3)) * 7).frac()[:, None])
    torch.manual_seed(0)
    return timm.create_model(request.param, dtype=torch.float64).eval()  # so that no k near a threshold tips over


def forward_with_small_k_as_zero(model, x, threshold):
    """The plain forward with Eq. 12's k = 0 below the threshold; also the share of k that are."""
    seen = []

    def cut(x, u, k):
        seen.append(k)
        return fa_weight(x, u, torch.where(k < threshold, 0.0, k))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_base, 'fa_weight', cut)
        patch.setattr(cifar_vgg, 'fa_weight', cut)
        out = model(x)
    return out, (torch.cat(seen) < threshold).float().mean()


def test_what_is_scripted_cannot_skip():
    model = torch.jit.script(timm.create_model('resnet20_fa', depth=8).eval())
    with pytest.raises(UserError, match='a scripted or traced model cannot skip'):
        set_skip_threshold(model, 0.5)


def test_zero_is_exactly_the_plain_forward(model):
    plain = model(X)
    model.set_skip_threshold(0.5)
    model.set_skip_threshold(0)
    assert model(X).equal(plain)


@pytest.mark.parametrize('threshold', [0.3, 0.5, 0.7])
def test_skipping_is_k_of_zero(model, threshold):
    expected, below = forward_with_small_k_as_zero(model, X, threshold)
    assert 0.05 < below < 0.95  # the case is a real one
    model.set_skip_threshold(threshold)
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)


def test_skipped_blocks_do_not_run(model):
    ran = []
    blocks = [block for stage in model.stages for block in (stage.blocks if hasattr(stage, 'blocks') else [stage.body])]
    for block in blocks:
        block.register_forward_hook(lambda m, args, out: ran.append(len(args[0])))
    model(X)
    assert ran == [len(X)] * len(blocks)
    ran.clear()
    model.set_skip_threshold(0.5)
    model(X)
    assert sum(ran) < len(X) * len(blocks) and any(0 < n < len(X) for n in ran)
    ran.clear()
    model.set_skip_threshold(0.5, per_sample=False)
    model(X)
    assert set(ran) == {len(X)}  # whole batches only
    ran.clear()
    model.set_skip_threshold(1.0)  # k < 1: what has a gate is skipped, the first stage's first block has none
    model(X)
    assert ran == ([len(X)] if hasattr(model.stages[0], 'blocks') else [])


def test_training_never_skips(model):
    model.set_skip_threshold(1.0)
    model.train()
    model(X).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if '.fa.' not in name)


def test_mistakes():
    with pytest.raises(ValueError, match='no FA gates'):
        timm.create_model('resnet20_saam').set_skip_threshold(0.5)
    with pytest.raises(ValueError, match='threshold=2 must lie in'):
        timm.create_model('resnet20_fa').set_skip_threshold(2)
