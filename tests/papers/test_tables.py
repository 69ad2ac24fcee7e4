import pytest
import timm
import torch

from timm_poolattn.models import architecture, paper_top1
from timm_poolattn.papers import model_args, row_top1, table_rows
from timm_poolattn.report.counts import look_up_count


def test_all_rows_are_there():
    assert len(table_rows()) == 158


@pytest.mark.parametrize('row', table_rows(), ids=lambda row: f'{row["paper"]}-{row["table"]}-{row["model"]}')
def test_parameters(row):
    """Every row of the papers' tables, built by timm.create_model's arguments alone."""
    with torch.device('meta'):
        model = timm.create_model(**model_args(row))
    parameters = sum(p.numel() for p in model.parameters())
    if 'params_exact' in row:
        assert parameters == row['params_exact']
    elif 'params_m' in row:
        assert abs(parameters / 1e6 - row['params_m']) < 0.02
    if 'params_exact_with_bn_stats' in row:
        stats = sum(b.numel() for name, b in model.named_buffers() if 'running' in name)
        assert parameters + stats == row['params_exact_with_bn_stats']


def test_imagenet5_is_the_tiny_imagenet_network_with_five_classes():
    rows = [row for row in table_rows() if row['dataset'] == 'imagenet5']
    assert len(rows) == 4
    for row in rows:
        tiny = model_args({**row, 'dataset': 'tiny_imagenet'})
        assert architecture(model_args(row)) == architecture({**tiny, 'num_classes': 5})
        assert look_up_count(**model_args(row))['multiply_adds'] == pytest.approx(
            (224 / 64) ** 2 * look_up_count(**tiny)['multiply_adds'], rel=0.01
        )


def test_a_papers_figure_is_of_the_same_network():
    assert paper_top1('resnet32', 'cifar10') is None  # the FA paper's has shortcuts with weights
    assert paper_top1('resnet56_fa', 'tiny_imagenet') != paper_top1('resnet56_fa', 'cifar100')
    fa = next(row for row in table_rows() if row['model'] == 'resnet56_fa' and row['dataset'] == 'tiny_imagenet')
    assert paper_top1('resnet56_fa', 'tiny_imagenet') == row_top1(fa)  # not ImageNet-5's


def test_ablations():
    """Tables 3 and 4 of the SPEM paper and the SAAM paper's K, by timm.create_model's arguments alone."""
    built = {}
    for row in table_rows():
        args = model_args(row)
        if 'variant' in row or row['model'].endswith(('_saam2', '_saam4')):
            with torch.device('meta'):
                gate = timm.create_model(**args).stages[0].blocks[0].gate
            built[row.get('variant', row['model'])] = gate
    lambdas = {v.split(':')[0]: gate.fixed_lambda for v, gate in built.items() if v.startswith('fixed')}
    assert lambdas == {f'fixed lambda {x}': x for x in (0.1, 0.3, 0.5, 0.7, 0.9)}
    forms = {v.split(':')[0]: gate.reweight for v, gate in built.items() if v.startswith('reweight')}
    names = 'unshared', 'no_sigmoid', 'product', 'sigmoid_sum', 'sigmoid_product', 'max', 'min'
    assert {f'reweight {letter}': form for letter, form in zip('abcdefg', names, strict=True)}.items() <= forms.items()
    assert forms['reweight none'] == 'none'
    paths = {v.partition('_')[2]: gate.conv.out_channels for v, gate in built.items() if 'saam' in v}
    assert paths == dict(saam2=2, saam4=4)
