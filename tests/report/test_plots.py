import csv
import io
import json
import re
import shutil
from collections import Counter

import pytest
import timm
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from PIL import Image

from timm_poolattn.report.plots import (
    ablation_figure,
    ablation_points,
    curves,
    curves_figure,
    find_curve,
    learned_lambda,
)
from timm_poolattn.utils import released

from ..cli.test_cli import fails, run


@pytest.fixture
def run_dir(tmp_path):
    """Four epochs of SPEM, evaluated every second one, by timm's own writer; train.py writes no row of the others."""
    from timm.utils import update_summary

    folder = tmp_path / 'runs' / 'mine'
    folder.mkdir(parents=True)
    for epoch in (1, 3):
        train = dict(loss=2.0 - epoch / 4, penalty=4.5, mean_lambda=0.5 + epoch / 10)
        result = dict(loss=1.5, top1=60.0 + epoch, top5=90.0)
        update_summary(epoch, train, result, folder / 'summary.csv', lr=0.1 / (epoch + 1), write_header=epoch == 1)
    return folder


def lines(figure, title):
    (ax,) = (ax for ax in figure.axes if ax.get_title() == title)
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in ax.get_lines()]


class TestCurves:
    def test_epochs_without_evaluation(self, run_dir):
        curve = find_curve(run_dir)
        assert [row['epoch'] for row in curve] == [1, 3]
        assert [row['eval_top1'] for row in curve] == [61, 63]
        assert [row['lr'] for row in curve] == [0.05, 0.025]

    def test_what_is_drawn(self, run_dir):
        released_curve = find_curve(released()['resnet20_saam.cifar10'])
        figure = curves_figure({'mine': find_curve(run_dir), 'theirs': released_curve})
        mine, theirs = lines(figure, 'top-1 error in evaluation (%)')
        assert mine == ([1, 3], [39, 37])
        assert theirs[1] == [pytest.approx(100 - row['eval_top1']) for row in released_curve]
        assert lines(figure, r'SPEM: mean $\lambda$ of the blocks')[0] == ([1, 3], [0.6, 0.8])
        assert len({tuple(ax.get_xlim()) for ax in figure.axes if ax.get_title()}) == 1  # shared
        without = curves_figure({'theirs': released_curve})
        assert [ax.get_title() for ax in without.axes] == ['top-1 error in evaluation (%)', 'loss', 'learning rate']

    def test_command(self, run_dir, tmp_path):
        out = tmp_path / 'curves.svg'
        folder = released()['resnet20_fa.cifar10']
        assert run('plot', 'curves', run_dir, folder, folder / 'results.json', '-o', out).stdout.endswith(
            f'3 runs: {out}\n'
        )
        assert out.read_text().count('<svg') == 1

    def test_the_legend_tells_runs_apart(self, run_dir, tmp_path):
        """By the shortest ends of their paths, whatever the names hold, and by colour and mark."""
        folders = [tmp_path / name for name in ('a/x/run', 'b/x/run', '_$x_$', *map(str, range(9)))]
        for folder in folders:
            shutil.copytree(run_dir, folder)
        out = tmp_path / 'curves.svg'
        curves([*folders, folders[0] / 'summary.csv'], out)
        figure = curves_figure({name: find_curve(run_dir) for name in ('_$x_$', *'abcdefghijk')})
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()][:2] == [r'_\$x_\$', 'a']
        drawn = {(line.get_color(), line.get_marker()) for line in legend.get_lines()[:-2]}
        assert len(drawn) == 12
        says = re.findall(r'<!-- (.*?) -->', out.read_text())
        assert {'a/x/run', 'b/x/run', '0', '8'} <= set(says) and 'evaluation' in says

    def test_one_epoch_is_a_point_that_shows(self, run_dir):
        figure = curves_figure({name: find_curve(run_dir)[1:] for name in 'ab'})
        lines = figure.axes[0].get_lines()
        assert {line.get_marker() for line in lines} == {'o', 's'} and {line.get_mfc() for line in lines} == {'none'}
        figure.savefig(svg := io.StringIO(), format='svg')
        marks = Counter(re.findall(r'<use [^>]*stroke: (#\w+)', svg.getvalue()))
        lines = Counter(to_hex(line.get_color()) for ax in figure.axes for line in ax.get_lines())
        assert len(lines) == 2 and all(
            marks[colour] == count + 1 for colour, count in lines.items()
        )  # and the legend's

    def test_mistakes(self, run_dir, tmp_path):
        out = tmp_path / 'curves.png'
        assert 'no summary.csv and no results.json in it' in fails('plot', 'curves', run_dir, run_dir.parent, '-o', out)
        assert 'no such folder or results file' in fails('plot', 'curves', tmp_path / 'nowhere', '-o', out)
        (tmp_path / 'x.json').write_text('[]')
        assert 'not a results.json' in fails('plot', 'curves', tmp_path / 'x.json', '-o', out)
        assert 'a figure is .png, .svg or .pdf' in fails('plot', 'curves', run_dir, '-o', tmp_path / 'x.docx')
        of_run = result('x', 90.0)
        for curve in (5, [5], [dict(loss=1.0)], [dict(epoch='one')]):
            (tmp_path / 'x.json').write_text(json.dumps(dict(of_run, curve=curve)))
            assert 'not one of numbers by epoch' in fails('plot', 'curves', tmp_path / 'x.json', '-o', out)
        (tmp_path / 'x.json').write_text(json.dumps(dict(of_run, curve=[dict(epoch=0)])))
        assert 'no accuracy, loss or learning rate' in fails('plot', 'curves', tmp_path / 'x.json', '-o', out)
        with open(run_dir / 'summary.csv', 'w') as f:
            csv.writer(f).writerow(['epoch', 'train_loss', 'lr'])
        assert 'no epoch of this run has ended yet' in fails('plot', 'curves', run_dir, '-o', out)
        assert not out.exists()


class TestLambda:
    def test_learned(self):
        model = timm.create_model('resnet83_spem')
        torch.nn.init.constant_(model.stages[1].blocks[4].gate.p[0], 1.0)  # 1 / (1 + 1/4)
        values = learned_lambda(model)
        assert len(values) == 27 and values['0.0'] == 0.5 and values['1.4'] == pytest.approx(0.8)

    def test_command(self, tmp_path):
        run('plot', 'lambda', 'resnet20_spem', '-o', tmp_path / 'lambda.png')
        with Image.open(tmp_path / 'lambda.png') as image:
            assert image.width > 500
        assert 'resnet20_fa: CifarResNet has no SPEM gates' in fails(
            'plot', 'lambda', 'resnet20_fa', '-o', tmp_path / 'x.png'
        )


def result(model, top1, tag='cifar10', seed=0, **gate_kwargs):
    arguments = dict(lr=0.1, seed=seed, **(dict(model_kwargs=dict(gate_kwargs=gate_kwargs)) if gate_kwargs else {}))
    test = dict(top1=top1)
    return dict(model=model, tag=tag, test=test, epochs=164, arguments=arguments, options={}, curve=[], seed=seed)


class TestAblation:
    def test_lambda(self):
        runs = [result('resnet164_spem', 93 + x, fixed_lambda=x) for x in (0.1, 0.3, 0.5)]
        runs += [result('resnet164_spem', 93.3, seed=1, fixed_lambda=0.1), result('resnet164_spem', 95.0)]
        others = [result('resnet164_saam', 90.0), result('resnet83_spem', 91.0), result('resnet164', 90.0)]
        points = ablation_points('lambda', runs + others)
        values = {0.1: [93.1, 93.3], 0.3: [93.3], 0.5: [93.5], 'learned': [95.0]}
        assert points == {'cifar10': {'resnet164, 164 epochs': values}}
        (ax,) = ablation_figure('lambda', points).axes
        drawn = {container.get_label(): container.lines[0] for container in ax.containers}
        assert list(drawn['resnet164, 164 epochs'].get_ydata()) == [pytest.approx(93.2), 93.3, 93.5]
        places = [list(line.get_xdata()) for line in drawn.values()]
        assert [round(x, 1) for x in drawn['resnet164, paper'].get_xdata()] == [0.1, 0.3, 0.5, 0.7, 0.9]
        assert not set(places[0]) & set(places[1])  # aside, so that no point covers another
        assert list(drawn['resnet164, paper'].get_ydata()) == [94.32, 93.96, 94.67, 94.72, 94.33]  # Table 3

    def test_paths(self):
        runs = [result(f'resnet56_saam{k}', 72 - k, 'cifar100') for k in (2, 4)]
        runs.append(result('resnet56_saam', 72.0, 'cifar100'))
        points = ablation_points('paths', runs)
        assert points == {'cifar100': {'resnet56, 164 epochs': {2: [70], 4: [68], 1: [72.0]}}}
        (ax,) = ablation_figure('paths', points).axes
        assert isinstance(ax, Axes)
        drawn = {container.get_label(): container.lines[0] for container in ax.containers}
        assert list(drawn['resnet56, paper'].get_ydata()) == [72.49, 71.48, 71.3]  # Sec. V-A

    def test_runs_trained_in_another_way_are_a_series_of_their_own(self):
        runs = [result('resnet56_saam', 92.0), result('resnet56_saam2', 92.5)]
        longer = [{**r, 'arguments': dict(lr=0.2)} for r in runs]
        assert list(ablation_points('paths', runs + longer)['cifar10']) == [
            'resnet56, 164 epochs',
            'resnet56, 164 epochs (2)',
        ]
        assert not ablation_points('paths', [runs[0], longer[1]])['cifar10']

    def test_other_networks_and_another_epochs_weights_are_series_of_their_own(self):
        runs = [result('resnet20_spem', 92.0), result('resnet20_spem', 91.0, fixed_lambda=0.3)]
        others = [result('resnet20_spem', 50.0, reweight='max'), {**runs[0], 'checkpoint': dict(which='best')}]
        others.append(result('resnet20_spem', 60.0, reweight='max', fixed_lambda=0.3))
        points = ablation_points('lambda', runs + others)['cifar10']
        started = [{**runs[0], 'warm_start': 'resnet20.cifar10 resnet20_spem.cifar10', 'test': dict(top1=10.0)}]
        started.append({**runs[0], 'arguments': {**runs[0]['arguments'], 'initial_checkpoint': 'a.pth'}})
        part = dict(arguments=dict(runs[0]['arguments'], lr=1.0), options={})
        started.append({**runs[0], 'resumed': [part], 'test': dict(top1=20.0)})
        assert ablation_points('lambda', runs + others + started)['cifar10'] == points
        assert [*points.values()] == [{'learned': [92.0], 0.3: [91.0]}, {'learned': [50.0], 0.3: [60.0]}]

    def test_command(self, tmp_path):
        for k in (1, 2):
            folder = tmp_path / str(k)
            folder.mkdir()
            (folder / 'results.json').write_text(json.dumps(result(f'resnet20_saam{k if k > 1 else ""}', 90 + k)))
        out = tmp_path / 'paths.png'
        run('plot', 'ablation', 'paths', tmp_path / '1', tmp_path / '2' / 'results.json', '-o', out)
        assert Image.open(out).width > 500

    @pytest.mark.parametrize('name', ['lambda', 'paths'])
    def test_too_few_runs(self, name, tmp_path, monkeypatch):
        monkeypatch.setattr('timm_poolattn.report.results.load_results', lambda: [])
        message = fails('plot', 'ablation', name, '-o', tmp_path / 'x.png')
        assert 'make them with poolattn train --recipe' in message
        assert 'no such file' in fails('plot', 'ablation', name, tmp_path / 'nowhere', '-o', tmp_path / 'x.png')
        assert not list(tmp_path.iterdir())
