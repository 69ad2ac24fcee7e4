"""Using models: list, predict, validate, export, explain."""

import sys
from importlib.util import find_spec
from pathlib import Path

import click

from ..utils import UserError, require
from .options import data_dir_option, dataset_option, device_option, echo_json, json_option, split_option

_MODEL = "A name with weights, or timm's hf-hub:REPO or local-dir:FOLDER."


@click.command('list')
@click.argument('filter', default='')
@click.option('--trained', is_flag=True, help='Those with weights alone.')
@json_option
def list_(filter: str, trained: bool, as_json: bool) -> None:
    """List models, their sizes and accuracies.

    FILTER is a name or a pattern. Weights that are not in the package are marked as a download.
    """
    from ..report.model_list import list_models

    rows = list_models(filter, trained=trained)
    if not rows:
        wider = f'*{filter.strip("*")}*'
        try_ = '`poolattn list`' if wider == filter or trained else f"`poolattn list '{wider}'`"
        raise UserError(f'no {"trained " * trained}model matches {filter!r}; try {try_}')
    if as_json:
        echo_json(rows)
        return
    click.echo(f'{"model":<23}{"family":<20}{"gate":<7}{"parameters":>12}{"Mmult-adds":>12}  top-1 (%)')
    for row in rows:
        accuracy = (
            f'{tag} {top1:.2f}{" (download)" * (row["weights"][tag] == "download")}'
            for tag, top1 in row['top1'].items()
        )
        line = f'{row["model"]:<23}{row["family"]:<20}{row["gate"] or "-":<7}'
        line += f'{row["parameters"]:>12,}{row["multiply_adds"] / 1e6:>12.2f}  {"  ".join(accuracy)}'
        click.echo(line.rstrip())


@click.command()
@click.argument('images', nargs=-1, type=click.Path())
@click.option('--model', 'name', default='resnet20_saam', show_default=True, help=_MODEL)
@click.option('--topk', type=click.IntRange(1), default=5, show_default=True, help='How many classes to print.')
@click.option('--demo', is_flag=True, help="Classify scikit-image's photo of a cat (the `demo` extra).")
@json_option
def predict(images, name: str, topk: int, demo: bool, as_json: bool) -> None:
    """Classify IMAGES.

    They may have any size and mode. A file that cannot be read is named, the others are classified, and the exit code
    is 1; it is 2 where none can be read.
    """
    if demo:
        require('demo', 'skimage')
        images = (*images, Path(find_spec('skimage').origin).parent / 'data' / 'chelsea.png')
    if not images:
        raise UserError('no image given; `poolattn predict --demo` has one')
    from ..inference import load_pretrained, predict

    results = predict(load_pretrained(name), images, topk, skip_broken=True)
    errors = [result['error'] for result in results if 'error' in result]
    if len(errors) == len(results) == 1 and not as_json:
        raise UserError(errors[0])
    if as_json:
        echo_json(results)
    for result in results if not as_json else ():
        if 'error' not in result:
            click.echo(click.format_filename(result['image']))
            for p in result['predictions']:
                click.echo(f'  {p["probability"]:7.2%}  {p["label"]}')
    for error in errors:
        click.echo(f'Error: {error}', err=True)
    if errors:
        sys.exit(1 if len(errors) < len(results) else 2)


@click.command()
@click.option('--model', 'name', required=True, help=_MODEL)
@data_dir_option
@dataset_option
@split_option
@click.option('--hold-out', is_flag=True, help='Of a folder of classes, what `finetune` does not train on.')
@click.option('--batch-size', type=click.IntRange(1), default=500, show_default=True)
@device_option
@json_option
def validate(name, data_dir, dataset, split, hold_out, batch_size, device, as_json: bool) -> None:
    """Measure the accuracy of a trained model.

    Of a folder with the classes right in it, every image counts, unless --hold-out is given.
    """
    from ..data.listing import TRAIN_SPLITS, list_split
    from ..inference import evaluate, load_data, load_pretrained

    if hold_out and (dataset or split in TRAIN_SPLITS or (of := list_split(data_dir, split)).base != of.source.root):
        raise UserError(f'--hold-out: {dataset or data_dir}, {split}: only of a folder of classes is a part held out')
    model = load_pretrained(name)
    data = load_data(model, data_dir, split, name=dataset, hold_out=hold_out)
    result = dict(model=name, **evaluate(model, data, batch_size=batch_size, device=device))
    if as_json:
        echo_json(result)
    else:
        click.echo(
            f'{name}: top-1 {result["top1"]:.2f}%  top-5 {result["top5"]:.2f}%  loss {result["loss"]:.4f}'
            f'  on {result["images"]} images'
        )


@click.command()
@click.argument('name')
@click.argument('out', type=click.Path(dir_okay=False, path_type=Path))
@click.option('--format', required=True, type=click.Choice(['onnx', 'torchscript', 'pt2']))
@click.option('--untrained', is_flag=True, help='Export NAME with random weights.')
def export(name: str, out: Path, format: str, untrained: bool) -> None:
    """Write a model as ONNX, TorchScript or pt2.

    The file OUT takes batches of any size, and is checked against the model NAME.
    """
    if format == 'onnx':
        require('onnx', 'onnx', 'onnxscript', 'onnxruntime')
    from ..export import export
    from ..inference import load_pretrained, load_untrained

    written = export((load_untrained if untrained else load_pretrained)(name), out, format)
    size = 'x'.join(map(str, written['input_size']))
    click.echo(
        f'wrote {out}: {name}{" with random weights" * untrained}, {written["bytes"] / 1e6:.1f} MB, for any number of'
        f' {size} images; largest difference from the model {written["difference"]:.1e}'
    )


@click.command()
@click.argument('images', nargs=-1, required=True, type=click.Path())
@click.option('--model', 'name', required=True, help='A model with gates and weights.')
@click.option('--compare', multiple=True, help='Another model, beside it; may be given again.')
@click.option('-o', '--out', required=True, type=click.Path(file_okay=False), help='The folder for the figures.')
def explain(images, name: str, compare, out) -> None:
    """Draw what a model and its gates see.

    One figure for each of IMAGES has the predictions, Grad-CAM of the likeliest classes, and the gates of every block.
    It takes the place of an older figure of the same name.
    """
    require('explain', 'matplotlib', 'captum')
    from ..explain.figures import explain

    written = explain(images, name, out, compare)
    names = ', '.join(click.format_filename(path.name) for path in written)
    click.echo(f'{len(written)} figure{"s" * (len(written) > 1)} in {click.format_filename(out)}: {names}')


COMMANDS = (list_, predict, validate, export, explain)
