"""Measurements: gates, import, loader, models, skip, train."""

from pathlib import Path

import click

from .options import data_dir_option, dataset_option, device_option, echo_json, json_option, split_option


@click.group()
def bench() -> None:
    """Measure speed and memory.

    Every figure is a median of one run.
    """


def _rounded(value):
    return round(value, 4) if isinstance(value, float) else value


def _echo_bench(result: dict, as_json: bool, columns: dict[str, str]) -> None:
    """Print a benchmark as JSON, or its rows as a table of `columns`, title by key."""
    rows = result['rows']
    if as_json:
        rows = [{key: _rounded(value) for key, value in row.items()} for row in rows]
        echo_json({**result, 'rows': rows})
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
    """Measure each gate alone.

    Time, memory and bytes moved stand beside those of a copy of its input and of timm's SE.
    """
    from ..bench.gates import bench_gates

    options = {key: value for key, value in options.items() if value != ()}
    result = bench_gates(device=device, **options)
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
    """Measure the import, beside timm's."""
    from ..bench.imports import bench_import

    result = bench_import(runs)
    if as_json:
        echo_json(result)
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
    """Measure the resident loader, beside timm's."""
    from ..bench.loader import bench_loader

    rows = bench_loader(data_dir, device=device, **options)
    if as_json:
        echo_json(rows)
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
    """Measure networks with and without gates.

    Speed, memory and construction are relative to the same backbone without gates.
    """
    from ..bench.models import bench_models

    options = {key: value for key, value in options.items() if value != ()}
    result = bench_models(device=device, **options)
    columns = dict(model='model', layout='layout', dtype='dtype', mode='mode')
    for kind in ('inference', 'training'):
        columns |= {f'{kind}_images_per_s': f'{kind} images/s', f'{kind}_to_plain': 'time to plain'}
        columns |= {f'{kind}_to_authors': 'to authors'} if options['spem_authors'] else {}
    _echo_bench(result, as_json, columns | dict(peak_mib='peak MiB', peak_to_plain='to plain', construct_s='build s'))


@bench.command('skip')
@click.option('--model', 'name', required=True, help='A trained *_fa or *_fase model.')
@data_dir_option
@dataset_option
@split_option
@click.option('--per-sample/--per-batch', default=True, help='Skip for single images, or for whole batches.')
@click.option('--batch-size', type=click.IntRange(1), default=500, show_default=True)
@device_option
@json_option
def bench_skip(name, data_dir, dataset, split, per_sample, batch_size, device, as_json: bool) -> None:
    """Measure what skipping FA's blocks saves.

    It prints thresholds with their accuracy, blocks run and images/s.
    """
    from ..bench.skipping import bench_skip
    from ..inference import load_data, load_pretrained

    model = load_pretrained(name)
    data = load_data(model, data_dir, split, name=dataset)
    rows = bench_skip(model, data, per_sample=per_sample, batch_size=batch_size, device=device)
    if as_json:
        echo_json(rows)
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
    """Measure a training step of MODELS.

    It prints images/s and memory, each with its gate and without.
    """
    from ..bench.step import MODES, bench_train

    rows = bench_train(models, modes=modes or MODES, device=device, **options)
    if as_json:
        echo_json(rows)
        return
    click.echo(f'{"model":<24}{"mode":<15}{"images/s":>10}{"peak MB":>9}   floor: images/s   GFLOP   GB moved')
    for row in rows:
        click.echo(
            f'{row["model"]:<24}{row["mode"]:<15}{row["images_per_s"]:>10,.0f}{row["peak_mb"]:>9.0f}'
            f'{row["floor_images_per_s"]:>18,.0f}{row["gflop"]:>8.1f}{row["gbytes"]:>11.2f}'
        )
