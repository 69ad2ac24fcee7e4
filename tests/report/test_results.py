import json

import pytest

from timm_poolattn.report import results
from timm_poolattn.utils import MissingFileError, UserError, released


def test_results_are_those_of_the_releases_and_of_the_other_runs(tmp_path, monkeypatch):
    assert {f'{r["model"]}.{r["tag"]}' for r in results.load_results()} >= set(released())
    monkeypatch.setattr(results, 'RESULTS_DIR', tmp_path)
    other = dict(model='resnet20_se', tag='cifar10', test=dict(top1=1.0), arguments={}, options={}, curve=[])
    other |= dict(epochs=1, seed=0)
    (tmp_path / 'resnet20_se.cifar10.json').write_text(json.dumps(other))
    assert results.load_results()[len(released()) :] == [other]


def test_a_damaged_file_is_named(tmp_path):
    with pytest.raises(MissingFileError, match=r'nowhere\.json: no such file'):
        results.read_results(tmp_path / 'nowhere.json')
    (tmp_path / 'results.json').write_text('{"model": "resn')
    with pytest.raises(UserError, match=r'results\.json: not a results\.json'):
        results.read_results(tmp_path)
    (tmp_path / 'results.json').write_text(json.dumps(dict(model='m', tag='t', test={}, arguments={}, curve=[])))
    with pytest.raises(UserError, match=r'results\.json: not a results\.json'):
        results.read_results(tmp_path)
