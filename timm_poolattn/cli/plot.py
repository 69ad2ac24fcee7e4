"""Figures of runs: curves, lambda, ablation."""

import click

from ..utils import require

figure_option = click.option('-o', '--out', required=True, type=click.Path(dir_okay=False), help='PNG, SVG or PDF.')


@click.group()
def plot() -> None:
    """Draw runs: curves, lambda, ablations."""


@plot.command()
@click.argument('runs', nargs=-1, required=True, type=click.Path())
@figure_option
def curves(runs, out) -> None:
    """Draw training curves on shared axes.

    RUNS are run folders, release folders or results files.
    """
    require('explain', 'matplotlib', 'captum')
    from ..report.plots import curves

    click.echo(f'drew the curves of {len(runs)} run{"s" * (len(runs) > 1)}: {curves(runs, out)}')


@plot.command('lambda')
@click.argument('model')
@figure_option
def lambda_(model: str, out) -> None:
    """Draw the lambda that MODEL learned.

    It is SPEM's, over depth.
    """
    require('explain', 'matplotlib', 'captum')
    from ..report.plots import draw_lambda

    click.echo(f'drew lambda of {model}: {draw_lambda(model, out)}')


@plot.command()
@click.argument('name', metavar='[lambda|paths]', type=click.Choice(['lambda', 'paths']))
@click.argument('results', nargs=-1, type=click.Path())
@figure_option
def ablation(name: str, results, out) -> None:
    """Draw an ablation of a paper.

    It is accuracy against SPEM's fixed lambda (its Figure 2) or against SAAM's paths (its Figure 3). RESULTS are run
    folders, release folders or results files, besides those that the package has.
    """
    require('explain', 'matplotlib', 'captum')
    from ..report.plots import ablation

    click.echo(f'drew accuracy against {name}: {ablation(name, out, results)}')
