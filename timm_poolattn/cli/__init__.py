"""`poolattn`: each command calls a function of the package that a notebook can call too."""

import json
import runpy
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path

import click

from ..models import HUB_ORG, HubError
from ..version import __version__


class _Error(click.ClickException):
    exit_code = 2


def _raised_by_us(e: Exception) -> bool:
    *_, (frame, _) = traceback.walk_tb(e.__traceback__)
    return frame.f_globals['__name__'].startswith('timm_poolattn')


class _Group(click.Group):
    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except (FileNotFoundError, HubError) as e:
            raise _Error(str(e)) from e
        except ValueError as e:
            if _raised_by_us(e):  # for a mistake of the user; any other is a defect and keeps its traceback
                raise _Error(str(e)) from e
            raise


json_option = click.option('--json', 'as_json', is_flag=True, help='Print JSON.')
device_option = click.option('--device', help='Default: cuda where there is one, else cpu.')


def _default_device(device: str | None) -> str:
    import torch

    return device or ('cuda' if torch.cuda.is_available() else 'cpu')


def _require(extra: str, *modules: str) -> None:
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise _Error(f"this needs {', '.join(missing)}: pip install 'timm_poolattn[{extra}]'")


@click.group(cls=_Group, context_settings=dict(help_option_names=['-h', '--help']))
@click.version_option(__version__)
def main() -> None:
    """Pooling-based attention for timm."""


@main.command('list')
@click.argument('filter', default='')
@json_option
def list_(filter: str, as_json: bool) -> None:
    """List models: family, gate, size, and top-1 accuracy where trained. FILTER is a name or a pattern."""
    from ..report.model_list import list_models

    rows = list_models(filter)
    if not rows:
        raise _Error(f"no model matches {filter!r}; try `poolattn list '*{filter.strip('*')}*'`")
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    click.echo(f'{"model":<23}{"family":<20}{"gate":<7}{"parameters":>12}{"Mmult-adds":>12}  top-1 (%)')
    for row in rows:
        accuracy = '  '.join(f'{tag} {top1:.2f}' for tag, top1 in row['top1'].items())
        line = f'{row["model"]:<23}{row["family"]:<20}{row["gate"] or "-":<7}'
        line += f'{row["parameters"]:>12,}{row["multiply_adds"] / 1e6:>12.2f}  {accuracy}'
        click.echo(line.rstrip())


@main.command()
@click.argument('images', nargs=-1, type=click.Path())
@click.option('--model', 'name', default='resnet20_saam', show_default=True, help="A name with weights, or timm's.")
@click.option('--topk', type=click.IntRange(1), default=5, show_default=True)
@click.option('--demo', is_flag=True, help="Classify scikit-image's photo of a cat (the `demo` extra).")
@json_option
def predict(images, name: str, topk: int, demo: bool, as_json: bool) -> None:
    """Classify IMAGES, of any size and mode."""
    if demo:
        skimage = find_spec('skimage')
        if skimage is None:
            raise _Error("--demo takes its photo from scikit-image: pip install 'timm_poolattn[demo]'")
        images = (*images, Path(skimage.origin).parent / 'data' / 'chelsea.png')
    if not images:
        raise _Error('no image given; `poolattn predict --demo` has one')
    from ..inference import load_pretrained, predict

    results = predict(load_pretrained(name), images, topk)
    if as_json:
        click.echo(json.dumps(results, indent=2))
        return
    for result in results:
        click.echo(result['image'])
        for p in result['predictions']:
            click.echo(f'  {p["probability"]:7.2%}  {p["label"]}')


@main.command()
@click.option('--model', 'name', required=True, help="A name with weights, or timm's hf-hub:REPO or local-dir:FOLDER.")
@click.option('--data-dir', required=True, type=click.Path(), help="A folder or tar by class, or --dataset's root.")
@click.option('--dataset', default='', help='torch/cifar10 or torch/cifar100. Default: a folder or a tar.')
@click.option('--split', default='test', show_default=True)
@click.option('--batch-size', type=click.IntRange(1), default=500, show_default=True)
@device_option
@json_option
def validate(name, data_dir, dataset, split, batch_size, device, as_json: bool) -> None:
    """Accuracy of a trained model on a data set."""
    from ..data import load_images
    from ..inference import decoded_size, evaluate, load_pretrained

    model = load_pretrained(name)
    img_mode = 'L' if model.in_chans == 1 else 'RGB'
    data = load_images(data_dir, split, name=dataset, img_mode=img_mode, size=decoded_size(model))
    result = dict(model=name, **evaluate(model, data, batch_size=batch_size, device=_default_device(device)))
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        click.echo(
            f'{name}: top-1 {result["top1"]:.2f}%  top-5 {result["top5"]:.2f}%  loss {result["loss"]:.4f}'
            f'  on {result["images"]} images'
        )


@main.command()
@click.argument('name')
@click.argument('out', type=click.Path(dir_okay=False, path_type=Path))
@click.option('--format', required=True, type=click.Choice(['onnx', 'torchscript', 'pt2']))
@click.option('--untrained', is_flag=True, help='Export NAME with random weights.')
def export(name: str, out: Path, format: str, untrained: bool) -> None:
    """Write the model NAME to the file OUT, for batches of any size, and check it against the model."""
    if format == 'onnx':
        _require('onnx', 'onnx', 'onnxscript', 'onnxruntime')
    from ..export import export
    from ..inference import load_pretrained, load_untrained

    written = export((load_untrained if untrained else load_pretrained)(name), out, format)
    size = 'x'.join(map(str, written['input_size']))
    click.echo(
        f'wrote {out}: {name}{" with random weights" * untrained}, {written["bytes"] / 1e6:.1f} MB, for any number of'
        f' {size} images; largest difference from the model {written["difference"]:.1e}'
    )


@main.command(context_settings=dict(ignore_unknown_options=True))
@click.argument('script', type=click.Path())
@click.argument('args', nargs=-1, type=click.UNPROCESSED)
def run(script: str, args) -> None:
    """Run SCRIPT, a script of timm's (validate.py, benchmark.py, ...), unchanged, with our models registered."""
    if not Path(script).is_file():
        raise _Error(f"{script}: no such file; a checkout of huggingface/pytorch-image-models has timm's scripts")
    sys.argv = [script, *args]
    sys.path.insert(0, str(Path(script).resolve().parent))  # where python looks first for what a script imports
    runpy.run_path(script, run_name='__main__')


def train_options(command):
    """What `train` and `finetune` share: options of ours, and any argument of timm's train.py."""
    for option in (
        click.option(
            '--timm-script', type=click.Path(), help="timm's train.py. Default: $TIMM_TRAIN_SCRIPT, or found."
        ),
        click.option(
            '--allow-unpinned-script', is_flag=True, help='Run a downloaded train.py without a pinned SHA-256.'
        ),
        click.option(
            '--resident/--no-resident', default=True, help="Hold the data on the device, or use timm's loader."
        ),
        click.option(
            '--crop-padding', type=click.IntRange(0), help='Of the random crop. Default: an eighth of the side.'
        ),
        click.option('--penalty-weight', type=float, default=0.1, show_default=True, help='eta of the SPEM penalty.'),
        click.argument('timm_args', nargs=-1, type=click.UNPROCESSED),
    ):
        command = option(command)
    return command


def _run(function, *args, allow_unpinned_script: bool, **options):
    """Call `train` or `finetune`; what stops a run ends in one line."""
    from ..training import RunStopped

    try:
        return function(*args, allow_unpinned=allow_unpinned_script, **options)
    except RunStopped as e:
        raise _Error(str(e)) from e
    except KeyboardInterrupt as e:
        click.echo(str(e) or 'interrupted before the first epoch', err=True)
        sys.exit(130)  # a shell's code for it


_TIMM_ARGS = dict(ignore_unknown_options=True, allow_extra_args=True, allow_interspersed_args=True)


@main.command(context_settings=_TIMM_ARGS)
@click.option('--recipe', help='A name in train_scripts/recipes; every other argument overrides its values.')
@train_options
def train(timm_args, **options) -> None:
    """Train with timm's own train.py, which takes every other argument: --model, --data-dir, --config, ..."""
    from ..training import train

    _run(train, timm_args, **options)


@main.command(context_settings=_TIMM_ARGS)
@click.argument('data_dir', type=click.Path())
@train_options
def finetune(data_dir, timm_args, **options) -> None:
    """Fine-tune trained weights to the classes of DATA_DIR, a folder or tar of images of any size, by class.

    Every other argument is one of timm's train.py, and overrides the recipe `finetune`: --model, --epochs, --output ...
    """
    from ..training import finetune

    result = _run(finetune, data_dir, timm_args, **options)
    click.echo(result.table())
    picture = result.figure or "not drawn: pip install 'timm_poolattn[explain]'"
    click.echo(f'confusion matrix: {picture}')
    click.echo(
        f'top-1 {result.top1:.2f}% with the best epoch, {result.epoch}; to use it:'
        f' poolattn predict IMAGES --model local-dir:{result.model_dir}'
    )


@main.command('warm-start')
@click.argument('source')
@click.argument('name')
@click.option('-o', '--out', required=True, type=click.Path(path_type=Path), help='A .safetensors file.')
def warm_start(source: str, name: str, out: Path) -> None:
    """Write a first checkpoint of model NAME from SOURCE: a trained name, or a .safetensors file.

    NAME may be deeper, have another gate, or other classes; give the file to `poolattn train --initial-checkpoint`.
    """
    from ..training import warm_start

    count = warm_start(name, source, out)
    click.echo(f'{count["copied"]} tensors of {name} from {source}, {count["new"]} new -> {out}')


@main.command()
@click.argument('run_dir', type=click.Path())
@click.option('--name', help="The model. Default: the run's, and any other is refused.")
@click.option('--tag', required=True, help='The training data: cifar10, cifar100, ...')
@click.option(
    '--checkpoint',
    type=click.Choice(['last', 'best']),
    default='last',
    show_default=True,
    help='Best is chosen on the test set, which flatters it.',
)
@click.option('--data-dir', type=click.Path(), help="The data to evaluate on. Default: the run's.")
@click.option('--out', type=click.Path(path_type=Path), help='Default: hub_configs/ of the checkout.')
def release(run_dir, **options) -> None:
    """Lay out a release folder from RUN_DIR, the output folder of `poolattn train`."""
    from ..hub import release

    click.echo(f'released {release(run_dir, **options)}')


@main.command()
@click.argument('target')
@click.option(
    '--data-dir', type=click.Path(), help="Check accuracy too: a folder or tar by class, or --dataset's root."
)
@click.option('--dataset', default='', help='torch/cifar10 or torch/cifar100. Default: a folder or a tar.')
@click.option('--split', default='test', show_default=True)
@click.option('--endpoint', help='Of the Hub. Default: $HF_ENDPOINT, or https://huggingface.co.')
@json_option
@click.pass_context
def verify(ctx, target: str, as_json: bool, **options) -> None:
    """Check a release: TARGET is a name, a folder, or hf-hub:REPO. Exit code 1 where a check fails."""
    from ..hub import verify

    checks = verify(target, **options)
    if as_json:
        click.echo(json.dumps([check._asdict() for check in checks], indent=2))
    else:
        for check in checks:
            click.echo(f'{"ok" if check.ok else "FAILED":<8}{check.name:<12}{check.detail}')
    ctx.exit(0 if checks[-1].ok else 1)


@main.command()
@click.argument('targets', nargs=-1)
@click.option('--all', 'everything', is_flag=True, help='Every release of hub_configs.')
@click.option('--org', envvar=HUB_ORG, required=True, help=f'Organisation or user. Default: ${HUB_ORG}.')
@click.option('--private', is_flag=True, help='Create private repositories.')
@click.option('--pr', 'create_pr', is_flag=True, help='Propose the files in a pull request.')
@click.option('--replace', is_flag=True, help='Replace other weights; the old ones stay under a tag.')
@click.option('--dry-run', is_flag=True, help='Only say what would be done.')
@click.option('--collection', metavar='SLUG', help='Add the repositories to this collection.')
@click.option('--endpoint', help='Of the Hub. Default: $HF_ENDPOINT, or https://huggingface.co.')
@click.option('--workers', type=click.IntRange(1), default=4, show_default=True, help='Releases at once.')
@json_option
@click.pass_context
def publish(ctx, targets, everything: bool, as_json: bool, **options) -> None:
    """Publish TARGETS, names or folders of releases, to the Hub. Exit code 1 where one fails."""
    from ..hub import publish
    from ..models import released

    if bool(targets) == everything:
        raise _Error('name the releases to publish, or take --all of them')
    rows = publish(released() if everything else targets, **options)
    if as_json:
        click.echo(json.dumps([row._asdict() for row in rows], indent=2))
    else:
        for row in rows:
            click.echo(f'{row.status:<20}{row.repo_id:<40}{row.detail}')
    ctx.exit(1 if any(row.status == 'failed' for row in rows) else 0)


@main.command()
def cards() -> None:
    """Write the model cards of hub_configs again, from their results files."""
    from ..hub import write_texts
    from ..models import released
    from ..report.results import released_results

    for name, results in released_results().items():
        write_texts(released()[name], results)
    click.echo(f'wrote the cards of {", ".join(released())}')


@main.command()
def readme() -> None:
    """Write the generated tables of the READMEs and results.csv, from the results files and the benchmarks."""
    from ..report.readme_tables import write_tables

    click.echo(f'wrote {", ".join(map(str, write_tables()))}')


@main.command()
@click.argument('images', nargs=-1, required=True, type=click.Path())
@click.option('--model', 'name', required=True, help='A model with gates and weights.')
@click.option('--compare', multiple=True, help='Another model, side by side with it; may be given again.')
@click.option('-o', '--out', required=True, type=click.Path(file_okay=False), help='The folder for the figures.')
def explain(images, name: str, compare, out) -> None:
    """Draw, for each of IMAGES, what a model predicts, where it sees it (Grad-CAM), and what its gates did."""
    _require('explain', 'matplotlib', 'captum')
    from ..explain.figures import explain

    written = explain(images, name, out, compare)
    click.echo(f'{len(written)} figure{"s" * (len(written) > 1)} in {out}: {", ".join(path.name for path in written)}')


figure_option = click.option('-o', '--out', required=True, type=click.Path(dir_okay=False), help='PNG, SVG or PDF.')


@main.command()
@click.argument('runs', nargs=-1, required=True, type=click.Path())
@figure_option
def curves(runs, out) -> None:
    """Draw the training curves of RUNS (run folders, release folders or results files) on shared axes."""
    _require('explain', 'matplotlib', 'captum')
    from ..report.plots import curves

    click.echo(f'drew the curves of {len(runs)} run{"s" * (len(runs) > 1)}: {curves(runs, out)}')


@main.command('lambda')
@click.argument('model')
@figure_option
def lambda_(model: str, out) -> None:
    """Draw SPEM's lambda over depth, as MODEL learned it."""
    _require('explain', 'matplotlib', 'captum')
    from ..report.plots import draw_lambda

    click.echo(f'drew lambda of {model}: {draw_lambda(model, out)}')


@main.command()
@click.argument('name', metavar='[lambda|paths]', type=click.Choice(['lambda', 'paths']))
@click.argument('results', nargs=-1, type=click.Path())
@figure_option
def ablation(name: str, results, out) -> None:
    """Draw accuracy against fixed lambda (SPEM's Fig. 2) or against paths (SAAM's Fig. 3).

    RESULTS are release folders or results files, besides those that the package has.
    """
    _require('explain', 'matplotlib', 'captum')
    from ..report.plots import ablation

    click.echo(f'drew accuracy against {name}: {ablation(name, out, results)}')


@main.command()
@click.option('-o', '--out', required=True, type=click.Path(dir_okay=False), help='report.html or report.md.')
@click.option('--benchmark', type=click.Path(), help='What `poolattn bench models --json` printed.')
def report(out, benchmark) -> None:
    """Every row of the papers' tables beside ours, as one page or as Markdown."""
    from ..report.page import write_report

    click.echo(f'wrote {write_report(out, benchmark)}')


@main.group()
def bench() -> None:
    """Measure; every figure is a median of one run."""


def _rounded(value):
    return round(value, 4) if isinstance(value, float) else value


def _echo_bench(result: dict, as_json: bool, columns: dict[str, str]) -> None:
    """Print a benchmark as JSON, or its rows as a table of `columns`, title by key."""
    rows = result['rows']
    if as_json:
        rows = [{key: _rounded(value) for key, value in row.items()} for row in rows]
        click.echo(json.dumps({**result, 'rows': rows}, indent=2))
        return
    click.echo('  '.join(f'{key} {value}' for key, value in result.items() if key != 'rows'))
    table = [[*columns.values()]]
    for row in rows:
        table.append([f'{v:.2f}' if isinstance(v := row.get(key, '-'), float) else str(v) for key in columns])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        click.echo('  '.join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))


repeats_option = click.option('--repeats', type=click.IntRange(1), default=5, show_default=True, help='Turns.')
compile_option = click.option('--compile/--no-compile', help='Measure them compiled, too: minutes for a deep model.')


@bench.command('gates')
@click.option(
    '--model', 'models', multiple=True, help="Networks whose maps' sizes to take. Default: resnet20, 164, 50."
)
@click.option('--gate', 'gates', multiple=True, help='Default: every one.')
@click.option('--layout', 'layouts', multiple=True, type=click.Choice(['contiguous', 'channels_last']))
@click.option('--dtype', 'dtypes', multiple=True, type=click.Choice(['float32', 'bfloat16', 'float16']))
@click.option('--batch-size', type=click.IntRange(1), default=64, show_default=True)
@compile_option
@repeats_option
@device_option
@json_option
def bench_gates(device, as_json: bool, **options) -> None:
    """Each gate alone: time, memory and bytes moved, beside a copy of its input and timm's SE."""
    from ..bench.gates import bench_gates

    options = {key: value for key, value in options.items() if value != ()}
    result = bench_gates(device=_default_device(device), **options)
    columns = dict(gate='gate', channels='channels', size='size', layout='layout', dtype='dtype', mode='mode')
    for kind, title in (('forward', 'forward'), ('training', 'training')):
        columns |= {f'{kind}_ms': f'{title} ms', f'{kind}_ms_to_identity': 'to copy', f'{kind}_ms_to_se': 'to SE'}
        columns |= {f'{kind}_moved': 'maps moved', f'{kind}_to_floor': 'to floor'}
    columns |= dict(forward_bandwidth_to_copy='GB/s to copy', peak_maps='peak maps')
    _echo_bench(result, as_json, columns)


@bench.command('import')
@click.option('--runs', type=click.IntRange(1), default=5, show_default=True)
@json_option
def bench_import(runs: int, as_json: bool) -> None:
    """What importing timm_poolattn adds to importing timm."""
    from ..bench.imports import bench_import

    result = bench_import(runs)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        click.echo(
            f'import timm {result["timm_ms"]:.0f} ms, import timm_poolattn after it'
            f' {result["timm_poolattn_ms"]:.0f} ms (x{result["ratio"]:.3f}); medians of {runs} processes'
        )


@bench.command('loader')
@click.option('--data-dir', required=True, type=click.Path(), help='A folder or tar by class.')
@click.option('--split', default='train', show_default=True)
@click.option('--batch-size', type=click.IntRange(1), default=128, show_default=True)
@click.option('--workers', type=click.IntRange(0), default=2, show_default=True, help="Of timm's loader.")
@click.option('--airbench', type=click.Path(), help='A checkout of KellerJordan/cifar10-airbench, to measure beside.')
@device_option
@json_option
def bench_loader(data_dir, device, as_json: bool, **options) -> None:
    """Images/s of the loader that holds its data on the device, beside timm's."""
    from ..bench.loader import bench_loader

    rows = bench_loader(data_dir, device=_default_device(device), **options)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        slower = f'  resident is {row["ratio"]:.1f}x as fast' if row is not rows[0] else ''
        click.echo(f'{row["loader"]:<18}{row["images_per_s"]:>10,.0f} images/s{slower}')


@bench.command('models')
@click.option('--model', 'names', multiple=True, help='Default: resnet164_spem, resnet56_saam, resnet56_fa.')
@click.option('--batch-size', type=click.IntRange(1), default=64, show_default=True)
@click.option(
    '--layout', 'layouts', multiple=True, type=click.Choice(['contiguous', 'channels_last']), help='Default: both.'
)
@click.option(
    '--dtype',
    'dtypes',
    multiple=True,
    type=click.Choice(['float32', 'bfloat16']),
    help='Of autocast. Default: float32.',
)
@click.option('--reparameterize', is_flag=True, help="Inference with BNs folded into convs, too (timm's --reparam).")
@click.option('--spem-authors', type=click.Path(path_type=Path), help='A checkout of github.com/Qrange-group/SPEM.')
@compile_option
@repeats_option
@device_option
@json_option
def bench_models(device, as_json: bool, **options) -> None:
    """Whole networks: speed, memory and construction, relative to the same backbone without gates."""
    from ..bench.models import bench_models

    options = {key: value for key, value in options.items() if value != ()}
    result = bench_models(device=_default_device(device), **options)
    columns = dict(model='model', layout='layout', dtype='dtype', mode='mode')
    for kind in ('inference', 'training'):
        columns |= {f'{kind}_images_per_s': f'{kind} images/s', f'{kind}_to_plain': 'time to plain'}
        columns |= {f'{kind}_to_authors': 'to authors'} if options['spem_authors'] else {}
    _echo_bench(result, as_json, columns | dict(peak_mib='peak MiB', peak_to_plain='to plain', construct_s='build s'))


@bench.command('skip')
@click.option('--model', 'name', required=True, help='A trained *_fa or *_fase model.')
@click.option('--data-dir', required=True, type=click.Path(), help="A folder or tar by class, or --dataset's root.")
@click.option('--dataset', default='', help='torch/cifar10 or torch/cifar100. Default: a folder or a tar.')
@click.option('--split', default='test', show_default=True)
@click.option('--per-sample/--per-batch', default=True, help='Skip for single images, or for whole batches.')
@click.option('--batch-size', type=click.IntRange(1), default=500, show_default=True)
@device_option
@json_option
def bench_skip(name, data_dir, dataset, split, per_sample, batch_size, device, as_json: bool) -> None:
    """FA as adaptive computation: threshold against accuracy, blocks run and images/s."""
    from ..bench.skipping import bench_skip
    from ..data import load_images
    from ..inference import load_pretrained

    model, data = load_pretrained(name), load_images(data_dir, split, name=dataset)
    rows = bench_skip(model, data, per_sample=per_sample, batch_size=batch_size, device=_default_device(device))
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    click.echo('threshold  top-1 (%)  blocks run  images/s  to plain')
    for row in rows:
        click.echo(
            f'{row["threshold"]:9.2f}  {row["top1"]:9.2f}  {row["blocks_run"]:10.1%}  {row["images_per_s"]:8.0f}'
            f'  {row["speedup"]:7.2f}x'
        )


@bench.command('train')
@click.argument('models', nargs=-1, required=True)
@click.option('--mode', 'modes', multiple=True, help='eager, channels_last, autocast or compiled. Default: all.')
@click.option('--batch-size', type=click.IntRange(1), default=128, show_default=True)
@click.option('--steps', type=click.IntRange(1), default=20, show_default=True, help='In each of three turns.')
@click.option('--compile-mode', help="torch.compile's; reduce-overhead for CUDA graphs.")
@device_option
@json_option
def bench_train(models, modes, device, as_json: bool, **options) -> None:
    """Images/s and memory of a training step of MODELS, each with its gate and without."""
    from ..bench.step import MODES, bench_train

    rows = bench_train(models, modes=modes or MODES, device=_default_device(device), **options)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    click.echo(f'{"model":<24}{"mode":<15}{"images/s":>10}{"peak MB":>9}   floor: images/s   GFLOP   GB moved')
    for row in rows:
        click.echo(
            f'{row["model"]:<24}{row["mode"]:<15}{row["images_per_s"]:>10,.0f}{row["peak_mb"]:>9.0f}'
            f'{row["floor_images_per_s"]:>18,.0f}{row["gflop"]:>8.1f}{row["gbytes"]:>11.2f}'
        )
