"""train_scripts/insert_gates.py: what it trains, records and skips, and the table that is made of it."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import timm
from click.testing import CliRunner

from timm_poolattn.report import readme_tables
from timm_poolattn.report import results as report_results
from timm_poolattn.utils import UserError

SCRIPT = Path(__file__).parents[1] / 'train_scripts' / 'insert_gates.py'


@pytest.fixture(scope='module')
def script(tmp_path_factory):
    """The script as a module whose results lie in a folder of their own."""
    spec = importlib.util.spec_from_file_location('insert_gates', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    results = tmp_path_factory.mktemp('results')
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, 'insert_gates', module)
        spec.loader.exec_module(module)
        for user in (module, report_results):
            patch.setattr(user, 'INSERTIONS_DIR', results)
        yield module


def test_trains_records_and_goes_on(script, cifar10_few, train_script, tmp_path, monkeypatch):
    monkeypatch.setenv('TIMM_TRAIN_SCRIPT', str(train_script))
    results = script.INSERTIONS_DIR
    argv = ['--data-dir', str(cifar10_few), '--model', 'resnet20.cifar10', '--seed', '1', '--runs', str(tmp_path)]
    argv += ['--epochs', '2', '--val-interval', '2', '--batch-size', '8']
    done = CliRunner().invoke(script.main, [*argv, '--gate', 'fa'], catch_exceptions=False)
    assert done.output.endswith(f'2 runs, 0 done before -> {results}\n')
    weights = report_results.released_results()['resnet20.cifar10']['weights']['data_sha256']
    paths = {gate: results / f'resnet20.cifar10-{weights[:8]}-{gate or "plain"}-2-1.json' for gate in ('', 'fa')}
    plain, fa = (json.loads(path.read_text()) for path in paths.values())
    n = sum(p.numel() for p in timm.create_model('resnet20_fa', flavour='saam').parameters())
    assert (plain['parameters'], fa['parameters']) == (272762, n + 3 * 2 + 2)  # an alpha for each gated block and stage
    assert fa['arguments']['lr'] == script.LEARNING_RATE and plain['epochs'] == fa['epochs'] == 2
    assert all(
        run['curve'][-1]['eval_top1'] == run['top1'] >= 50 for run in (plain, fa)
    )  # it starts from trained weights
    again = CliRunner().invoke(script.main, [*argv, '--gate', 'fa'], catch_exceptions=False)
    assert again.output == f'0 runs, 2 done before -> {results}\n'
    other = CliRunner().invoke(script.main, [*argv, '--gate', 'fa', '--lr', '1'], catch_exceptions=False)
    assert other.exit_code == 1 and 'plain-2-1.json: trained with [' in other.output and 'move it away' in other.output
    fa['top1'], plain['top1'] = 93.0, 92.5
    before = f'{report_results.released_results()["resnet20.cifar10"]["test"]["top1"]:.2f}'
    for run in (plain, fa):
        paths[run['gate']].write_text(json.dumps(run))
    assert readme_tables.insertions_table().splitlines()[2:] == [
        f'| `resnet20.cifar10` | plain | 272,762 | {before} | 2 | 92.50 |  |',
        f'| `resnet20.cifar10` | fa | {n + 8:,} | {before} | 2 | 93.00 | +0.50 |',
    ]
    older = dict(fa, before=dict(top1=91.0, data_sha256='other'), top1=91.5)
    (results / 'resnet20.cifar10-other-fa-2-1.json').write_text(json.dumps(older))
    rows = readme_tables.insertions_table().splitlines()[2:]
    assert len(rows) == 3  # what it began from, not what is there, and beside no plain network
    assert rows[0].endswith(' | 91.00 (weights released before) | 2 | 91.50 |  |')
    (results / 'cut.json').write_text('{"model": ')
    with pytest.raises(UserError, match=r'cut\.json: not a results file'):
        readme_tables.insertions_table()


@pytest.mark.parametrize(
    ('given', 'said'),
    [
        (dict(gate='saan'), "unknown gate 'saan'; choose from se,"),
        (dict(model='resnet21.cifar10'), "unknown trained model 'resnet21.cifar10'; nearest: resnet20.cifar10"),
        (dict(model='resnet18.a1_in1k'), "unknown trained model 'resnet18.a1_in1k'; "),
        (dict(model='resnet20_fa.cifar10'), 'resnet20_fa.cifar10 has a gate already; give a plain network'),
        (dict(output='there'), '--output=there: set here for each run'),
        (dict(lr=-1), '--lr is -1, and must be at least 1e-12'),
        (dict(), "no split 'train'"),
        (dict(seed='one'), "'one'"),
    ],
)
def test_mistakes_are_named(script, train_script, tmp_path, monkeypatch, given, said):
    monkeypatch.setenv('TIMM_TRAIN_SCRIPT', str(train_script))
    argv = {'data-dir': str(tmp_path), 'epochs': 1, 'model': 'resnet20.cifar10', 'gate': 'saam', **given}
    done = CliRunner().invoke(script.main, [f'--{k}={v}' for k, v in argv.items()], catch_exceptions=False)
    assert done.exit_code and said in done.output and done.output.startswith(('Error', 'Usage'))


def test_ctrl_c_says_that_the_same_command_goes_on(script, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt('saved; resume with --resume')

    monkeypatch.setattr(script, 'train', interrupted)
    argv = ['--data-dir', str(tmp_path), '--model', 'resnet20.cifar10', '--epochs', '7']
    done = CliRunner().invoke(script.main, argv, catch_exceptions=False)
    assert (done.exit_code, done.output) == (
        1,
        'Error: interrupted; the same command goes on from the last checkpoint\n',
    )
