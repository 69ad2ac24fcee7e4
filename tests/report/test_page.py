"""The report: what its rows say, and the page itself in a real browser."""

import json
import re
import statistics
from pathlib import Path

import pytest

from timm_poolattn.hub import release
from timm_poolattn.models import architecture
from timm_poolattn.papers import model_args, table_rows
from timm_poolattn.report import results
from timm_poolattn.report.model_list import list_models
from timm_poolattn.report.page import markdown_report, read_benchmark, summary_table, write_report
from timm_poolattn.report.results import load_results, read_results, with_results
from timm_poolattn.report.rows import measured_runs, recipe_name, report_rows, results_of, training_rate
from timm_poolattn.training import read_curve, recipes, train
from timm_poolattn.utils import UserError, released

from ..cli.test_cli import fails


@pytest.fixture(scope='module')
def some_runs():
    """Results of resnet20_saam: two seeds of the paper's recipe, one shorter run, and one of another architecture."""
    ours = next(r for r in load_results() if (r['model'], r['tag']) == ('resnet20_saam', 'cifar10'))
    long = {**ours, 'recipe': 'saam-cifar10', 'arguments': dict(lr=0.1), 'options': {}, 'epochs': 182}
    runs = [{**long, 'seed': seed, 'test': dict(ours['test'], top1=top1)} for seed, top1 in ((1, 92.5), (2, 92.9))]
    other = {**long, 'arguments': dict(model_kwargs=dict(gate_kwargs=dict(kernel_size=7)))}
    return [ours, *runs, other]


@pytest.fixture(scope='module')
def page(tmp_path_factory, some_runs):
    """The page with all rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, 'load_results', lambda: some_runs)
        folder = tmp_path_factory.mktemp('report')
        benchmark = folder / 'benchmark.json'
        measured = dict(model='resnet20_saam', dtype='float32', inference_images_per_s=1234.5)
        rows = [dict(mode='eager', **measured), dict(mode='compiled', **{**measured, 'inference_images_per_s': 2})]
        benchmark.write_text(json.dumps(dict(rows=rows)))
        path = write_report(folder / 'report.html', benchmark)
    return path


@pytest.fixture
def tab(browser, page):
    """The page in a tab 1600 pixels wide; an error of its script, or any request but for itself, fails the test."""
    with browser.new_page(viewport=dict(width=1600, height=900)) as tab:
        wrong = []
        tab.on('pageerror', lambda error: wrong.append(error))
        tab.on('request', lambda request: wrong.append(request.url) if not request.url.startswith('file:') else None)
        tab.goto(page.as_uri())
        yield tab
        assert not wrong


def column(tab, name):
    return tab.locator(f'#body td[data-label="{name}"]').all_inner_texts()


class TestRows:
    def test_a_result_belongs_to_rows_of_its_architecture(self, some_runs):
        rows = [r for r in table_rows() if r['model'] == 'resnet20_saam']
        assert [len(results_of(model_args(r), some_runs)) for r in rows if r['dataset'] == 'cifar10'] == [3]
        assert not any(results_of(model_args(r), some_runs) for r in rows if r['dataset'] != 'cifar10')

    def test_flavours_and_variants_are_told_apart(self):
        result = dict(model='resnet56_se', tag='cifar10', arguments={})
        of = lambda paper, r: results_of(  # noqa: E731
            model_args(
                next(x for x in table_rows() if (x['paper'], x['model'], x['dataset']) == (paper, r['model'], r['tag']))
            ),
            [r],
        )
        assert of('saam', result) and not of('fa', result)
        fa = {**result, 'arguments': dict(model_kwargs=dict(flavour='fa'))}  # 1/8, the table's, is its default
        assert of('fa', fa) and not of('saam', fa)
        fixed = dict(fixed_lambda=0.3)
        spem = dict(model='resnet164_spem', tag='cifar10', arguments=dict(model_kwargs=dict(gate_kwargs=fixed)))
        matched = [r['variant'] for r in table_rows() if results_of(model_args(r), [spem])]
        assert matched == ['fixed lambda 0.3: u = 0.3 f_max + 0.7 f_min']
        learned = dict(model='resnet164_spem', tag='cifar10', arguments={})
        tables = [r['table'] for r in table_rows() if results_of(model_args(r), [learned])]
        assert tables == ['1', '2', '3', '4']  # the paper prints it in each

    def test_counts(self):
        rows = report_rows(load_results())
        assert len(rows) == 158
        own = {r['model']: r for r in list_models('resnet20_*')}
        for row in rows:
            if row['model'] == 'resnet20_saam' and row['dataset'] == 'CIFAR-10':
                assert row['parameters'] == own['resnet20_saam']['parameters']
                assert row['multiply_adds'] == own['resnet20_saam']['multiply_adds']
            if row['model'] == 'resnet20_cbam' and row['dataset'] == 'CIFAR-100':
                assert row['multiply_adds'] == own['resnet20_cbam']['multiply_adds'] + 64 * 90  # the classifier's
        for printed, row in zip(table_rows(), rows, strict=True):
            if 'mflops' in printed:
                assert row['multiply_adds'] / 1e6 == pytest.approx(printed['mflops'], abs=2.1)
            assert row['parameters'] == printed.get('params_exact', row['parameters'])
        small, large = (
            next(r for r in rows if r['model'] == m and r['dataset'] == 'CIFAR-10')
            for m in ('resnet20_se', 'resnet110_se')
        )
        ratio = large['multiply_adds'] / small['multiply_adds']
        assert large['estimated_hours'] / small['estimated_hours'] == pytest.approx(ratio)

    def test_recipe_and_start(self):
        runs = {r['recipe'] for row in report_rows(load_results()) for r in row['measured']}
        assert 'cpu-short' in runs and 'cpu-short, from resnet20_saam.cifar10' in runs and 'own recipe' not in runs

    def test_gate_less_plain(self, some_runs):
        """Where both were trained alike, with the seeds of each."""
        gated = some_runs[1:3]  # 92.5, 92.9
        plain = [
            {**r, 'model': 'resnet20', 'test': dict(r['test'], top1=top1)}
            for r, top1 in zip(gated, (92.0, 92.2), strict=True)
        ]
        args = dict(model_name='resnet20_saam.cifar10')
        (entry,) = measured_runs(args, [*gated, *plain])
        error = ((0.28**2 + 0.14**2) / 2) ** 0.5
        assert entry['gain'] == dict(difference=0.6, error=pytest.approx(error, abs=0.01), plain_runs=2)
        (entry,) = measured_runs(args, [*gated, {**plain[0], 'recipe': 'another'}])
        assert entry['gain'] is None
        taught = {**plain[0], 'teacher_weights': dict(resnet20='another')}
        assert measured_runs(args, [*gated, taught])[0]['gain'] is None

    def test_a_seed_that_ran_twice_is_two_runs(self, some_runs):
        twice = [dict(r, seed=1) for r in some_runs[1:3]]
        plain = [{**r, 'model': 'resnet20'} for r in twice]
        (entry,) = measured_runs(dict(model_name='resnet20_saam.cifar10'), [*twice, *plain])
        assert entry['runs'] == 2 and entry['gain']['error'] == pytest.approx((2 * 0.08 / 2) ** 0.5, abs=0.01)

    def test_unlike_data_and_processes_are_not_seeds(self, some_runs):
        one, two = some_runs[1:3]
        args = dict(model_name='resnet20_saam.cifar10')
        few = {**two, 'test': dict(two['test'], images=200)}
        apart = {**two, 'hardware': f'4 processes, each with a batch of its own: {two["hardware"]}'}
        assert len(measured_runs(args, [one, two])) == 1
        assert len(measured_runs(args, [one, few])) == len(measured_runs(args, [one, apart])) == 2

    def test_runs_that_are_not_released(self, train_script, cifar10_few, tmp_path):
        """Two seeds by their folders: mean and spread in the row of the paper."""
        folders = []
        for seed in ('1', '2'):
            argv = ['--model', 'resnet20_saam.cifar10', '--data-dir', str(cifar10_few), '--val-split', 'test']
            argv += ['--epochs', '1', '-b', '8', '--seed', seed, '--output', str(tmp_path), '--experiment', seed]
            folders.append(train(argv, recipe='saam-cifar10', timm_script=train_script))
        top1 = [read_curve(folder)[-1]['eval_top1'] for folder in folders]
        text = write_report(tmp_path / 'report.md', results=folders).read_text()
        said = f'{statistics.mean(top1):.2f} ± {statistics.stdev(top1):.2f}'
        assert said in text and 'saam-cifar10, 1 epoch, 2 runs' in text
        assert said not in write_report(tmp_path / 'without.md').read_text()
        assert write_report(tmp_path / 'twice.md', results=[*folders, *folders]).read_text() == text
        facts = json.loads((tmp_path / '1' / 'run.json').read_text())
        assert facts['test_images'] == len(list((cifar10_few / 'test').rglob('*.png')))
        released = release(folders[0], 'cifar10', out=tmp_path / 'released')
        runs = with_results([released, *folders])
        assert ['weights' in r for r in runs[-2:]] == [True, False] and len(runs) == len(load_results()) + 2
        (entry,) = measured_runs(dict(model_name='resnet20_saam.cifar10'), runs[-2:])
        assert entry['runs'] == 2
        (tmp_path / '2' / 'run.json').write_text(json.dumps({**facts, 'classes': [*'abcdefghij']}))
        with pytest.raises(
            UserError, match=r'its 10 classes \(a, ...\) are not those of cifar10: no table of the papers has it'
        ):
            write_report(tmp_path / 'report.md', results=folders)
        (tmp_path / '1' / 'summary.csv').write_text('epoch,train_loss\n0,1.0\n')
        with pytest.raises(
            UserError, match='1 of 1 epochs, the last not evaluated; go on with --resume auto, or train'
        ):
            write_report(tmp_path / 'report.md', results=folders)
        (tmp_path / '1' / 'summary.csv').unlink()
        with pytest.raises(UserError, match='0 of 1 epochs'):
            write_report(tmp_path / 'report.md', results=folders)

    def test_a_run_of_no_row_is_said(self, some_runs, tmp_path, caplog):
        for model in ('resnet20_saam', 'resnet20_bottleneck'):
            file = tmp_path / f'{model}.json'
            file.write_text(json.dumps({**some_runs[1], 'model': model}))
            write_report(tmp_path / 'report.md', results=[file])
        assert [record.getMessage() for record in caplog.records] == [
            f'{file}: its model is in no table of the papers, so the report leaves it out'
        ]

    def test_other_classes_are_another_network(self, some_runs):
        run = some_runs[1]
        photos = {**run, 'arguments': {**run['arguments'], 'num_classes': 2}}
        args = dict(model_name='resnet20_saam.cifar10')
        assert results_of(args, [run, photos]) == [run]
        assert results_of({**args, 'num_classes': 2}, [run, photos]) == [photos]

    def test_rate(self, some_runs):
        macs = list_models('resnet20_saam')[0]['multiply_adds']
        run = dict(some_runs[0], epochs=10, wall_time_s=1000)
        assert training_rate([run]) == (pytest.approx(macs * 500), run['hardware'])
        assert training_rate([]) == (0.0, '')

    def test_commands_are_those_of_recipes_that_exist(self, page):
        rows = json.loads(re.search(r'const rows = (.*);\n', page.read_text())[1])
        assert len(rows) == 158
        for row in rows:
            recipe = re.match(r'poolattn train --recipe (\S+) --model \S+', row['command'])[1]
            assert recipe in recipes()
        commands = {row['command'] for row in rows if row['variant'].startswith('fixed lambda 0.3')}
        assert (
            'poolattn train --recipe spem-cifar10 --model resnet164_spem.cifar10'
            ' --model-kwargs "gate_kwargs={\'fixed_lambda\': 0.3}" --data-dir DATA' in commands
        )

    def test_commands_name_the_rows_architecture(self, page):
        """What timm's own parser makes of a command is the network of the row, counted."""
        import argparse
        import shlex

        from timm.utils import ParseKwargs

        parser = argparse.ArgumentParser(allow_abbrev=False)
        parser.add_argument('--model')
        parser.add_argument('--num-classes', type=int)
        parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs)
        rows = json.loads(re.search(r'const rows = (.*);\n', page.read_text())[1])
        for printed, row in zip(table_rows(), rows, strict=True):
            args, _ = parser.parse_known_args(shlex.split(row['command']))
            classes = {'num_classes': args.num_classes} if args.num_classes else {}
            commanded = dict(model_name=args.model, **classes, **args.model_kwargs)
            assert architecture(commanded) == architecture(model_args(printed))


class TestPage:
    def test_every_row(self, tab):
        assert tab.locator('#body tr').count() == 1  # that was run; the rest is folded
        tab.click('#fold')
        assert tab.locator('#body tr').count() == 158 and column(tab, 'model')[0] == 'resnet20_saam'
        assert tab.locator('#count').inner_text() == '158 of 158 rows'

    def test_seeds_and_spread(self, tab):
        ours = read_results(released()['resnet20_saam.cifar10'])
        top1 = ours['test']['top1']
        tab.select_option('#status', 'run')
        assert [column(tab, name)[0].split('\n') for name in ('our top-1', 'to the paper')] == [
            ['1: 92.70 ± 0.28', f'2: {top1:.2f}'],  # the longer training comes first
            ['1: +0.10', f'2: {top1 - 92.6:+.2f}'],
        ]
        how = column(tab, 'training')[0]
        assert '1: saam-cifar10, 182 epochs, 2 runs' in how
        assert f'2: {recipe_name(ours)}, {ours["epochs"]} epochs, 1 run' in how
        assert column(tab, 'images/s') == ['1,235']
        (card,) = tab.locator('#body a', has_text='model card').all()
        assert card.locator('..').inner_text().startswith('2:')  # the run that was released, not the other
        assert card.get_attribute('href').endswith('hub_configs/resnet20_saam.cifar10/README.md')

    def test_model_cards_are_where_the_links_lead(self, page):
        cards = json.loads(re.search(r'const cards = (.*);\n', page.read_text())[1])
        assert cards.keys() == released().keys()
        assert all((page.parent / link).is_file() for link in cards.values())

    def test_filters(self, tab):
        tab.click('#fold')
        counts = {}
        for row in table_rows():
            counts[row['paper']] = counts.get(row['paper'], 0) + 1
        for name, label in (('spem', 'SPEM'), ('saam', 'SAAM'), ('fa', 'FA')):
            tab.select_option('#paper', label)
            assert tab.locator('#body tr').count() == counts[name]
        tab.select_option('#gate', 'fase')
        assert set(column(tab, 'gate')) == {'fase'}
        tab.select_option('#dataset', 'CIFAR-100')
        assert column(tab, 'model') == ['vgg19_fase', 'resnet110_fase']
        assert tab.locator('#plots figure').count() == 2
        tab.fill('#search', 'VGG')
        assert column(tab, 'model') == ['vgg19_fase'] and tab.locator('#count').inner_text() == '1 of 158 rows'
        tab.fill('#search', 'no such model')
        assert tab.locator('#body tr').count() == 0 and tab.locator('#plots figure').count() == 0

    def test_sorts(self, tab):
        tab.select_option('#status', 'not run')
        head = tab.locator('#head button', has_text=re.compile('^parameters$'))
        for sign in (1, -1):
            head.click()
            values = [int(v.replace(',', '')) for v in column(tab, 'parameters')]
            assert values == sorted(values, reverse=sign < 0) and len(values) == 157
        assert head.locator('..').get_attribute('aria-sort') == 'descending'
        tab.locator('#head button', has_text='paper top-1').click()
        assert column(tab, 'paper top-1')[0] and not column(tab, 'paper top-1')[-1]  # what has no value comes last
        tab.locator('#head button', has_text='model').click()
        models = column(tab, 'model')
        assert models.index('resnet20') < models.index('resnet110')  # numbers as numbers

    def test_plots_show_every_accuracy(self, tab):
        assert tab.locator('#plots figure').count() == 8  # four data sets, parameters and multiply-adds
        titles = [t for text in tab.locator('#plots title').all_text_contents() for t in text.split('\n')]
        for row in table_rows():
            if 'top1' in row and row['dataset'] == 'cifar10':
                assert sum(t.endswith(f'Table {row["table"]}: {row["top1"]}%') for t in titles) >= 2, row
        assert tab.locator('#plots .ours').count() == 2 * 2
        overlaps = """[...document.querySelectorAll('#plots svg')].flatMap(svg => {
            const marks = [...svg.querySelectorAll('circle')].map(c => [c.cx.baseVal.value, c.cy.baseVal.value]);
            const near = ([x, y]) => ([u, v]) => Math.hypot(x - u, y - v) < 6;
            return marks.flatMap((mark, i) => marks.slice(0, i).filter(near(mark))); })"""
        assert tab.evaluate(overlaps) == []
        outside = """[...document.querySelectorAll('#plots svg')].flatMap(svg => {
            const frame = svg.getBoundingClientRect();
            return [...svg.querySelectorAll('circle, path, text')].filter(mark => {
                const box = mark.getBoundingClientRect();
                return box.left < frame.left || box.right > frame.right || box.top < frame.top
                    || box.bottom > frame.bottom || !(box.width > 0); }).map(mark => mark.outerHTML); })"""
        assert tab.evaluate(outside) == []

    @pytest.mark.parametrize('scheme', ['light', 'dark'])
    @pytest.mark.parametrize('width', [400, 700, 1200, 1600])
    def test_fits_and_is_readable(self, tab, width, scheme):
        tab.set_viewport_size(dict(width=width, height=900))
        tab.emulate_media(color_scheme=scheme)
        assert tab.evaluate('document.documentElement.scrollWidth') <= width
        tab.locator('#body details').first.evaluate('e => e.open = true')
        assert tab.evaluate('document.documentElement.scrollWidth') <= width
        luminance = """(e, property) => {
            const [r, g, b] = getComputedStyle(e)[property].match(/[\\d.]+/g).map(v => {
                v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; }"""
        page = tab.locator('body').evaluate(luminance, 'backgroundColor')
        assert (page < 0.1) == (scheme == 'dark')
        for selector in ('h1', '#body td', '.soft', '#body summary'):  # WCAG AA
            ink = tab.locator(selector).first.evaluate(luminance, 'color')
            assert (max(ink, page) + 0.05) / (min(ink, page) + 0.05) >= 4.5, selector
        if width < 1150:  # cards in place of columns: every figure with its name
            assert not tab.locator('thead').is_visible() and tab.locator('#sort').is_visible()
            tab.select_option('#status', 'not run')
            tab.select_option('#sort', label='parameters, falling')
            assert column(tab, 'parameters')[0].replace('\n', ' ').endswith('44,616,034')


class TestFiles:
    def test_markdown(self, some_runs):
        text = markdown_report(report_rows(some_runs))
        assert (
            '| `resnet20_saam` | CIFAR-10 | SAAM, Table II | 92.60 | 92.70 ± 0.28 | +0.10 |  |'
            ' saam-cifar10, 182 epochs, 2 runs |' in text
        )
        assert text.index('## Rows that were run') < text.index('## Every row') < text.index('<summary>SAAM, Table II<')
        assert re.search(r'\| not run \| `poolattn train --recipe saam-cifar100 .*` \(about .*\) \|', text)

    def test_summary(self, some_runs):
        """The released run counts, and without it the longest."""
        ours, *others = some_runs
        lines = summary_table(report_rows(some_runs)).splitlines()
        assert f'| SAAM | CIFAR-10 | 15 | 1 | {ours["test"]["top1"] - 92.6:+.2f} |' in lines
        assert '| SAAM | CIFAR-10 | 15 | 1 | +0.10 |' in summary_table(report_rows(others)).splitlines()
        assert sum(int(line.split('|')[3]) for line in lines[2:]) == 158

    def test_neighbours_are_left_alone(self, tmp_path):
        """A name that a writer might use for its temporary file, a link among them."""
        (tmp_path / 'mine').write_text('mine')
        (tmp_path / 'x.tmp').symlink_to(tmp_path / 'mine')
        write_report(tmp_path / 'x.html')
        assert (tmp_path / 'mine').read_text() == 'mine' and (tmp_path / 'x.tmp').is_symlink()
        assert {p.name for p in tmp_path.iterdir()} == {'mine', 'x.tmp', 'x.html'}

    def test_mistakes(self, tmp_path):
        assert 'a report is .html or .md' in fails('report', '-o', tmp_path / 'report.pdf')
        assert 'no such file' in fails('report', '-o', tmp_path / 'report.md', '--benchmark', tmp_path / 'x.json')
        Path(tmp_path / 'x.json').write_text('{"a": 1}')
        with pytest.raises(UserError, match='not what `poolattn bench models --json` prints'):
            read_benchmark(tmp_path / 'x.json')
        assert not list(tmp_path.glob('report*'))
