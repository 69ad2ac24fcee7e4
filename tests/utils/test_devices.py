import pytest
import torch

from timm_poolattn.utils import UserError, look_up_device


def test_what_is_there():
    assert look_up_device('cpu') == torch.device('cpu')
    assert look_up_device().type == ('cuda' if torch.cuda.is_available() else 'cpu')


@pytest.mark.parametrize('name', ['foo', 'cuda:99', 'cpu:x', 'meta', 'gpu', 'cuda:-2', ' '])
def test_what_is_not(name):
    with pytest.raises(UserError, match=rf'no device {name!r} here; choose from cpu'):
        look_up_device(name)
