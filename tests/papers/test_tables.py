import pytest
import timm
import torch

from timm_poolattn import papers
from timm_poolattn.models import released
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


def test_results_are_those_of_the_releases_and_of_the_other_runs(tmp_path, monkeypatch):
    names = [f'{r["model"]}.{r["tag"]}' for r in papers.load_results()]
    assert set(names) >= set(released())
    monkeypatch.setattr(papers, 'RESULTS_DIR', tmp_path)
    (tmp_path / 'resnet20_se.cifar10.json').write_text('{"model": "resnet20_se", "tag": "cifar10"}')
    assert papers.load_results()[len(released()) :] == [dict(model='resnet20_se', tag='cifar10')]
