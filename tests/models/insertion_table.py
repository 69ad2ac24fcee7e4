"""Which of timm's families `insert` takes: a table in the README of timm_poolattn/models.

`python -m tests.models.insertion_table` writes it, in a checkout.
"""

import re
import sys
import warnings
from pathlib import Path

import timm
import torch
from torch import nn

import timm_poolattn
from timm_poolattn.layers import FocusAssociation, IdentityInit
from timm_poolattn.utils import UserError, write_text

README = Path(timm_poolattn.__file__).parent / 'models' / 'README.md'
GATES = ('saam', 'spem', 'se', 'fa')  # the channel gates, then FA
#: A small model of each family, as timm.list_modules() names them.
MODELS = {
    'beit': 'beit_base_patch16_224',
    'byoanet': 'eca_botnext26ts_256',
    'byobnet': 'test_byobnet',
    'cait': 'cait_xxs24_224',
    'coat': 'coat_tiny',
    'convit': 'convit_tiny',
    'convmixer': 'convmixer_768_32',
    'convnext': 'test_convnext',
    'cpubone': 'cpubone_nano',
    'crossvit': 'crossvit_tiny_240',
    'csatv2': 'csatv2',
    'cspnet': 'cs3darknet_focus_s',
    'cspnext': 'cspnext_tiny',
    'davit': 'davit_tiny',
    'deepseek_vit': 'deepseek_vit_412m',
    'deit': 'deit_tiny_patch16_224',
    'densenet': 'densenet264d',
    'dla': 'dla46x_c',
    'dpn': 'dpn48b',
    'edgenext': 'edgenext_xx_small',
    'efficientformer': 'efficientformer_l1',
    'efficientformer_v2': 'efficientformerv2_s0',
    'efficientnet': 'efficientnet_b0',
    'efficientvim': 'efficientvim_m1',
    'efficientvit_mit': 'efficientvit_b0',
    'efficientvit_msra': 'efficientvit_m0',
    'eva': 'eva02_tiny_patch14_224',
    'fasternet': 'fasternet_t0',
    'fastvit': 'fastvit_mci0',
    'focalnet': 'focalnet_tiny_srf',
    'gcvit': 'gcvit_xxtiny',
    'gemma4_vit': 'gemma4_vit_167m',
    'ghostnet': 'ghostnet_050',
    'hardcorenas': 'hardcorenas_b',
    'hgnet': 'hgnetv2_b0',
    'hiera': 'hiera_tiny_224',
    'hieradet_sam2': 'sam2_hiera_tiny',
    'hrnet': 'hrnet_w18_small',
    'iformer': 'iformer_t',
    'inception_next': 'inception_next_atto',
    'inception_resnet_v2': 'inception_resnet_v2',
    'inception_v3': 'inception_v3',
    'inception_v4': 'inception_v4',
    'lcnetv2': 'lcnetv2_small',
    'levit': 'levit_128s',
    'lowformer': 'lowformer_b0',
    'mambaout': 'test_mambaout',
    'maxxvit': 'test_coatnet',
    'metaformer': 'caformer_s18',
    'mlp_mixer': 'gmlp_ti16_224',
    'mobilenetv3': 'mobilenetv3_small_050',
    'mobilenetv5': 'mobilenetv5_base',
    'mobilevit': 'mobilevit_xxs',
    'mvitv2': 'mvitv2_tiny',
    'naflexvit': 'naflexvit_base_patch16_parfac_gap',
    'nasnet': 'nasnetalarge',
    'nest': 'nest_tiny',
    'nextvit': 'nextvit_small',
    'nfnet': 'test_nfnet',
    'pit': 'pit_xs_224',
    'pnasnet': 'pnasnet5large',
    'pvt_v2': 'pvt_v2_b0',
    'qwen3_vit': 'qwen3_vit_88m',
    'rdnet': 'rdnet_tiny',
    'regnet': 'regnetx_002',
    'repghost': 'repghostnet_050',
    'repvit': 'repvit_m0_9',
    'res2net': 'res2net50_26w_4s',
    'resnest': 'resnest26d',
    'resnet': 'test_resnet',
    'resnetv2': 'resnetv2_18',
    'rexnet': 'rexnet_100',
    'selecsls': 'selecsls42',
    'senet': 'legacy_seresnet18',
    'sequencer': 'sequencer2d_s',
    'shvit': 'shvit_s1',
    'sknet': 'skresnet18',
    'starnet': 'starnet_s050',
    'swiftformer': 'swiftformer_xs',
    'swin_transformer': 'swin_tiny_patch4_window7_224',
    'swin_transformer_v2': 'swinv2_tiny_window8_256',
    'swin_transformer_v2_cr': 'swinv2_cr_tiny_224',
    'tiny_vit': 'tiny_vit_5m_224',
    'tnt': 'tnt_s_legacy_patch16_224',
    'tresnet': 'tresnet_m',
    'twins': 'twins_svt_small',
    'vgg': 'vgg11',
    'visformer': 'visformer_tiny',
    'vision_transformer': 'test_vit',
    'vision_transformer_hybrid': 'vit_tiny_r_s16_p8_224',
    'vision_transformer_relpos': 'test_vit_relpos',
    'vision_transformer_sam': 'samvit_base_patch16_224',
    'vitamin': 'vitamin_small_224',
    'volo': 'volo_d1_224',
    'vovnet': 'ese_vovnet19b_slim_dw',
    'xception': 'legacy_xception',
    'xception_aligned': 'xception41p',
    'xcit': 'xcit_nano_12_p8_224',
}


def alpha_of(gate: nn.Module) -> nn.Parameter:
    return (gate.fade_in if isinstance(gate, FocusAssociation) else gate).alpha


def gates_of(model: nn.Module) -> list[nn.Module]:
    """The inserted gates, each with its alpha."""
    return [m for m in model.modules() if isinstance(m, IdentityInit | FocusAssociation)]


def state_of(model: nn.Module) -> tuple:
    """All that a refusal leaves as it was, and `remove` brings back: structure, modes, attributes; weights, buffers."""
    facts = [(name, type(m), m.training, sorted(vars(m))) for name, m in model.named_modules()]
    return str(model), facts, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: tuple) -> None:
    after = state_of(model)
    assert after[:2] == before[:2]
    torch.testing.assert_close(after[2], before[2], rtol=0, atol=0, equal_nan=True)


def wake(model: nn.Module) -> nn.Module:
    """Give weights that start at zero, or near it, a value, as training does; else gates at their scale see nothing."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d) and m.affine:
            nn.init.uniform_(m.weight, 0.2, 0.6)  # larger ones saturate the gates of a deep network
            nn.init.normal_(m.bias, std=0.1)
        for name, parameter in m.named_parameters(recurse=False):
            if name in ('gamma', 'layer_scale', 'gain', 'skipinit_gain'):
                nn.init.constant_(parameter, 0.5)
    return model


def refusal(model: nn.Module, gate: str) -> str | None:
    """Insert `gate`, or say why it is refused; a refused model must be as it was."""
    before = state_of(model)
    try:
        timm_poolattn.insert(model, gate)
    except UserError as error:
        assert state_of(model)[:2] == before[:2]
        if not next(model.parameters()).is_meta:
            assert_same_state(model, before)
        return re.sub(r'.*cannot carry the gate: |; [^;]+ can$', '', str(error))


def check_inserted(model: nn.Module, gate: str, outputs: list[tuple[torch.Tensor, torch.Tensor]]) -> str:
    """Insert `gate`, check all that is promised, remove it again, and return what the table says.

    Args:
        model: in evaluation, as it is left.
        gate: to insert.
        outputs: images of two sizes, if the model takes two, with the model's outputs.

    Raises:
        AssertionError: a promise that does not hold.
    """
    before = state_of(model)
    reason = refusal(model, gate)
    if reason:
        return reason
    gates = gates_of(model)
    for x, expected in outputs:
        reached = set()
        hooks = [m.register_forward_hook(lambda m, args, out, seen=reached: seen.add(m)) for m in gates]
        with torch.no_grad():  # as `expected`: attention takes another path with gradients
            torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
        for hook in hooks:
            hook.remove()
        assert reached == set(gates)
    output = model(x)
    (output * torch.randn_like(output)).sum().backward()
    alphas = [alpha_of(gate) for gate in gates]
    still = [a for a in alphas if a.grad is None or not a.grad.isfinite() or not a.grad]
    assert not still, f'{len(still)} of {len(gates)} gates get no gradient'
    timm_poolattn.remove(model)
    assert_same_state(model, before)
    with torch.no_grad():
        assert all(model(x).equal(expected) for x, expected in outputs)
    return f'{len(gates)} gate{"s" * (len(gates) != 1)}'


def row(family: str) -> str:
    """The table's line of one family."""
    name = MODELS[family]
    cells = [refusal(timm.create_model(name, device='meta'), gate) for gate in GATES]
    if not all(cells) or any('takes no images' in cell for cell in cells):  # without weights, refusing is fast
        torch.manual_seed(0)
        model = wake(timm.create_model(name, num_classes=10)).eval()
        sizes = [(96, 96), (64, 128)]
        outputs = []
        with torch.no_grad():
            try:
                model(torch.zeros(2, 3, *sizes[0]))
            except (AssertionError, RuntimeError):
                sizes = [model.pretrained_cfg['input_size'][1:]]
            else:
                model.pretrained_cfg = {**model.pretrained_cfg, 'input_size': (3, *sizes[0])}
            for size in sizes:
                x = torch.randn(2, 3, *size)
                outputs.append((x, model(x)))
        cells = [
            check_inserted(model, gate, outputs) if cell is None or 'takes no images' in cell else cell
            for gate, cell in zip(GATES, cells, strict=True)
        ]
    *channel_gates, fa = cells
    if len(set(channel_gates)) > 1:
        channel_gates = [f'{gate}: {cell}' for gate, cell in zip(GATES, channel_gates, strict=False)]
    return f'| {family} | `{name}` | {"; ".join(dict.fromkeys(channel_gates))} | {fa} |'


def table() -> str:
    """All lines."""
    lines = [f'| family | model | {", ".join(GATES[:-1])} | fa |', '|---|---|---|---|']
    for family in sorted(MODELS):
        lines.append(row(family))
        print(lines[-1], file=sys.stderr, flush=True)
    return '\n'.join(lines)


if __name__ == '__main__':
    warnings.filterwarnings('ignore')
    start, end = '<!-- insertion: generated by `python -m tests.models.insertion_table` -->', '<!-- /insertion -->'
    text = README.read_text(encoding='utf-8')
    lines = f'{start}\n{table()}\n{end}'
    write_text(README, re.sub(f'{re.escape(start)}.*{re.escape(end)}', lambda _: lines, text, flags=re.DOTALL))
