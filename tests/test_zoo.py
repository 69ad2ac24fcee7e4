"""train_scripts/zoo.py: what it plans, what it keeps, and that a killed zoo goes on."""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from timm_poolattn.training.arguments import parse_arguments
from timm_poolattn.training.timm_script import load_train_script
from timm_poolattn.utils import UserError, released

SCRIPT = Path(__file__).parents[1] / 'train_scripts' / 'zoo.py'


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """The script as a module whose releases and results lie in `tmp_path`."""
    spec = importlib.util.spec_from_file_location('zoo', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, 'zoo', module)
    spec.loader.exec_module(module)
    (tmp_path / 'hub_configs').mkdir()
    monkeypatch.setattr(module, 'hub_configs_dir', lambda: tmp_path / 'hub_configs')
    monkeypatch.setattr(module, 'RESULTS_DIR', tmp_path / 'results')
    monkeypatch.setattr(module, 'load_results', lambda: [])
    return module


def manifest(tmp_path: Path, text: str) -> Path:
    path = tmp_path / 'manifest.yaml'
    path.write_text(text)
    return path


def release(folder: Path, top1: float, recipe: str) -> Path:
    folder.mkdir(parents=True)
    result = dict(model='resnet20_fa', tag='cifar10', recipe=recipe, epochs=9, seed=42, last_epoch_top1=top1)
    (folder / 'results.json').write_text(json.dumps(result))
    (folder / 'model.safetensors').write_text(recipe)
    return folder


def test_an_entry_is_every_combination_without_what_is_done(zoo, tmp_path, monkeypatch):
    done = dict(
        model='resnet20_fa', tag='cifar100', recipe='fa-cifar100', epochs=240, seed=1, arguments=dict(epochs=240)
    )
    monkeypatch.setattr(zoo, 'load_results', lambda: [done])
    entry = "- {models: [resnet20_fa, resnet56_fa], data: [cifar10, cifar100], recipe: 'fa-{data}', seeds: [1]}"
    todo = zoo.read_manifest(manifest(tmp_path, entry), tmp_path)
    assert [run.folder.name for run in todo] == [
        'resnet20_fa.cifar10-fa-cifar10-240-1',
        'resnet56_fa.cifar10-fa-cifar10-240-1',
        'resnet56_fa.cifar100-fa-cifar100-240-1',
    ]
    assert [run.epochs for run in todo] == [240, 240, 240]  # FA paper, Sec. III-D


def test_a_run_of_more_epochs_is_another_run(zoo, tmp_path, monkeypatch):
    done = dict(model='resnet20_fa', tag='cifar10', recipe='cpu', epochs=35, seed=42, arguments=dict(epochs=30))
    monkeypatch.setattr(zoo, 'load_results', lambda: [done])
    entry = '- {{models: [resnet20_fa], data: [cifar10], recipe: cpu, epochs: {}}}\n'
    todo = zoo.read_manifest(manifest(tmp_path, ''.join(map(entry.format, (30, 40, 60)))), tmp_path)
    assert [(run.epochs, run.folder.name) for run in todo] == [
        (40, 'resnet20_fa.cifar10-cpu-40-42'),
        (60, 'resnet20_fa.cifar10-cpu-60-42'),
    ]


ENTRY = '- {models: [resnet20_fa], data: [cifar10], recipe: cpu'


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (ENTRY + ', seed: [1, 2]}', r"unknown key 'seed'; choose from .*seeds"),
        (ENTRY + ', seeds: 1}', r'seeds is 1, and must be a list: \[1\]'),
        (ENTRY + ", args: '--lr 0.1'}", r"args is '--lr 0.1', and must be a list"),
        (ENTRY + ", args: ['--epochs=40']}", r'--epochs=40 in args: .* epochs and seeds are keys'),
        ('- {models: [resnet20_fa], recipe: cpu}', 'an entry lacks data: '),
        (ENTRY + ", epochs: '40'}", "'40' is no whole number"),
        (ENTRY + ', epochs:}', 'None is no whole number'),
        (ENTRY + ', seeds: [a]}', "'a' is no whole number"),
        (ENTRY + ', args: [--recipe, cpu-short]}', '--recipe in args'),
        ('- {models: [resnet20_fa], data: [cifar10], recipe: 7}', 'recipe is 7, and must be a name'),
        ("- {models: [resnet20_fa], data: [cifar10], recipe: 'cpu-{dataset}'}", "unknown recipe 'cpu-{dataset}'"),
        ('- 5', 'a manifest is a list of entries'),
        ('- {models: [', 'no YAML'),
        (f'{ENTRY}, args: [--lr, 0.1]}}\n{ENTRY}, args: [--lr, 0.2]}}', 'resnet20_fa.cifar10-cpu-30-42 is there twice'),
    ],
)
def test_mistakes_in_a_manifest_are_named(zoo, tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        zoo.read_manifest(manifest(tmp_path, text), tmp_path)


def test_what_a_manifest_may_leave_open(zoo, tmp_path):
    assert zoo.read_manifest(manifest(tmp_path, ''), tmp_path) == []
    (run,) = zoo.read_manifest(manifest(tmp_path, ENTRY + ', warm_start:, args: [--lr, 0.1]}'), tmp_path)
    assert (run.epochs, run.seed, run.warm_start, run.args) == (30, 42, None, ('--lr', '0.1'))


def test_epochs_without_a_row_are_counted(zoo, tmp_path):
    """--val-interval writes the rows of evaluated epochs alone."""
    (run,) = zoo.read_manifest(manifest(tmp_path, ENTRY + '}'), tmp_path)
    assert run.epochs_done == 0
    run.folder.mkdir()
    (run.folder / 'summary.csv').write_text('epoch,train_loss\n3,0.5\n7,0.4\n')
    torch.save({}, run.folder / 'last.pth.tar')
    assert run.epochs_done == 8


@pytest.mark.parametrize('ended, left', [(True, ['hub']), (False, ['train', 'hub'])])
def test_what_is_left_of_a_run(zoo, tmp_path, ended, left):
    """A complete curve says nothing of its last checkpoint, nor of cooldown epochs."""
    (run,) = zoo.read_manifest(manifest(tmp_path, ENTRY + ', epochs: 2}'), tmp_path)
    run.folder.mkdir()
    (run.folder / 'summary.csv').write_text('epoch,train_loss\n0,0.5\n1,0.4\n')
    (run.folder / 'run.json').write_text(json.dumps(dict(seed=42, **(dict(ended=True) if ended else {}))))
    (run.folder / 'last.pth.tar').touch()
    assert [command[3] for command in run.commands(tmp_path, 'cpu')] == left
    (run.folder / 'last.pth.tar').unlink()
    assert [command[3] for command in run.commands(tmp_path, 'cpu')] == ['train', 'hub']


def test_a_recipe_that_does_not_exist_is_named(zoo, tmp_path):
    path = manifest(tmp_path, '- {models: [resnet20_fa], data: [cifar10], recipe: nosuch}')
    result = CliRunner().invoke(zoo.main, ['--data-root', str(tmp_path), '--manifest', str(path)])
    assert result.exit_code == 1 and "unknown recipe 'nosuch'; " in result.output


@pytest.mark.parametrize('path', sorted(SCRIPT.parent.glob('zoo*.yaml')), ids=lambda path: path.stem)
def test_the_manifests_name_models_and_recipes_that_exist(zoo, tmp_path, path):
    import timm

    todo = zoo.read_manifest(path, tmp_path)
    assert todo and len({run.folder for run in todo}) == len(todo)
    assert {f'{run.model}.{run.data}' for run in todo} <= set(timm.list_models('*.*', include_tags=True))


def test_the_manifest_of_the_releases(zoo, tmp_path):
    runs = zoo.read_manifest(SCRIPT.with_name('zoo-cpu.yaml'), tmp_path)
    results = [json.loads((folder / 'results.json').read_text()) for folder in released().values()]
    keys = ('model', 'tag', 'recipe', 'epochs', 'seed')
    made = {(*(r[key] for key in keys), r['warm_start'].split()[0] if 'warm_start' in r else None) for r in results}
    assert {(run.model, run.data, run.recipe, run.epochs, run.seed, run.warm_start) for run in runs} == made


def test_the_manifest_of_the_releases_has_their_arguments(zoo, tmp_path, train_script):
    ours = argparse.ArgumentParser(allow_abbrev=False)
    ours.add_argument('--crop-padding', type=int)
    ours.add_argument('--teacher', action='append')
    for run in zoo.read_manifest(SCRIPT.with_name('zoo-cpu.yaml'), tmp_path):
        result = json.loads((released()[f'{run.model}.{run.data}'] / 'results.json').read_text())
        own, timms = ours.parse_known_args(run.args)
        assert own.crop_padding == result['options']['crop_padding']
        assert own.teacher == result['options'].get('teacher')
        argv = ['--model', f'{run.model}.{run.data}', '--epochs', str(run.epochs), *timms]
        given = parse_arguments(load_train_script(train_script), argv, run.recipe).given
        places = ('val_split', 'initial_checkpoint', 'seed', 'config', 'device')
        given, recorded = ({k: v for k, v in of.items() if k not in places} for of in (given, result['arguments']))
        if own.teacher:  # whose targets are smooth
            given['smoothing'] = 0.0
        assert given == recorded, run.folder.name


@pytest.mark.parametrize(('there', 'new', 'kept'), [(None, 90.0, 'new'), (89.0, 90.0, 'new'), (91.0, 90.0, 'there')])
def test_the_better_release_stays_and_the_other_leaves_its_results(zoo, tmp_path, there, new, kept):
    hub_configs, name = tmp_path / 'hub_configs', 'resnet20_fa.cifar10'
    if there:
        release(hub_configs / name, there, 'there')
    zoo.keep_better(release(tmp_path / 'run' / name, new, 'new'), hub_configs)
    assert (hub_configs / name / 'model.safetensors').read_text() == kept
    assert [path.name for path in hub_configs.iterdir()] == [name]
    left = {'there': 'new', 'new': 'there'}[kept]
    expected = [f'{name}-{left}-9-42.json'] if there else []
    assert [path.name for path in (tmp_path / 'results').glob('*')] == expected


def test_no_results_file_takes_anothers_place(zoo, tmp_path):
    """Runs without a recipe differ by nothing that their names could say."""
    name, hub_configs = 'resnet20_fa.cifar10', tmp_path / 'hub_configs'
    for i, top1 in enumerate((80.0, 85.0, 90.0, 90.0)):
        folder = release(tmp_path / f'run{i}' / name, top1, 'none')
        text = (folder / 'results.json').read_text().replace('"recipe": "none", ', '')
        (folder / 'results.json').write_text(text)
        zoo.keep_better(folder, hub_configs)
    left = {path.name: json.loads(path.read_text())['last_epoch_top1'] for path in (tmp_path / 'results').glob('*')}
    stem = f'{name}-unnamed-9-42'
    assert left == {f'{stem}.json': 80, f'{stem}-2.json': 85, f'{stem}-3.json': 90}


@pytest.mark.parametrize(('given', 'expected'), [(None, ['0', '1', '0']), ('2,3', ['2', '3', '2'])])
def test_the_gpus_that_were_given(zoo, tmp_path, monkeypatch, given, expected):
    if given:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', given)
    else:
        monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(zoo.Run, 'commands', lambda *args: iter(()))
    (run,) = zoo.read_manifest(manifest(tmp_path, ENTRY + '}'), tmp_path)
    visible = []
    for slot in range(3):
        job = zoo.Job(run, tmp_path, 'cuda', slot)
        visible.append(job.env['CUDA_VISIBLE_DEVICES'])
        job.close()
    assert visible == expected


def test_data_that_do_not_fit_are_named(zoo, tmp_path):
    (tmp_path / 'cifar10').mkdir()
    result = CliRunner().invoke(
        zoo.main, ['--data-root', str(tmp_path), '--manifest', str(manifest(tmp_path, ENTRY + '}')), '--plan']
    )
    assert result.exit_code == 1 and result.exception.code == 1 and f'Error: {tmp_path}' in result.output


def test_data_that_is_not_there_is_left_out_by_name(zoo, tmp_path):
    path = manifest(tmp_path, '- {models: [resnet20_fa], data: [cifar10], recipe: fa-cifar10}')
    result = CliRunner().invoke(zoo.main, ['--data-root', str(tmp_path), '--manifest', str(path)])
    assert result.exit_code == 0
    assert f'left out: 1 runs on cifar10, which {tmp_path} does not hold' in result.output
    assert result.output.splitlines()[-1].startswith('nothing to train; what has a results file')


_ZOO_IN = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location('zoo', sys.argv.pop(1))
zoo = importlib.util.module_from_spec(spec); sys.modules['zoo'] = zoo; spec.loader.exec_module(zoo)
root = pathlib.Path(sys.argv.pop(1))
zoo.hub_configs_dir, zoo.RESULTS_DIR, zoo.load_results = lambda: root / 'hub_configs', root / 'results', lambda: []
zoo.main()
"""


@pytest.mark.slow
def test_a_killed_zoo_goes_on_where_it_was(train_script, cifar10_few, tmp_path):
    (tmp_path / 'hub_configs').mkdir()
    (tmp_path / 'data').mkdir()
    shutil.copytree(cifar10_few, tmp_path / 'data' / 'cifar10')
    path = manifest(
        tmp_path,
        '- {models: [resnet20_saam, resnet20_fa], data: [cifar10], recipe: cpu-short,'
        ' epochs: 12, args: [--batch-size, 20]}',
    )
    command = [sys.executable, '-c', _ZOO_IN, str(SCRIPT), str(tmp_path), '--manifest', str(path)]
    command += ['--data-root', str(tmp_path / 'data'), '--runs', str(tmp_path / 'runs'), '--jobs', '1']
    env = {**os.environ, 'TIMM_TRAIN_SCRIPT': str(train_script)}
    folder = tmp_path / 'runs' / 'resnet20_saam.cifar10-cpu-short-12-42'
    killed = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not (folder / 'last.pth.tar').exists():
            assert killed.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        subprocess.run(['pkill', '-KILL', '-f', str(tmp_path)], check=False)  # the machine was taken away
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith('finished 2 of 2 runs, 0 failed; the same command does the rest\n')
    assert 'Restoring' in (folder / 'log.txt').read_text() or 'Resum' in (folder / 'log.txt').read_text()
    for model in ('resnet20_saam', 'resnet20_fa'):
        results = json.loads((tmp_path / 'hub_configs' / f'{model}.cifar10' / 'results.json').read_text())
        assert results['epochs'] == 12 and results['seed'] == 42
