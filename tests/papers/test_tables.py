import pytest
import timm
import torch

from timm_poolattn.papers import model_args, table_rows


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
