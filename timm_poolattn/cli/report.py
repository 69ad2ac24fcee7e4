"""The report, and the page to try models."""

import click

from ..utils import require


@click.command()
@click.argument('results', nargs=-1, type=click.Path())
@click.option('-o', '--out', required=True, type=click.Path(dir_okay=False), help='report.html or report.md.')
@click.option('--benchmark', type=click.Path(), help='What `poolattn bench models --json` printed.')
def report(results, out, benchmark) -> None:
    """Write the papers' tables beside ours.

    It is one page, or Markdown, by the suffix of the file. RESULTS are run folders, release folders or results files,
    besides those that the package has; runs that differ in their seed alone are one entry.
    """
    from ..report.page import write_report

    click.echo(f'wrote {write_report(out, benchmark, results)}')


@click.command()
@click.option('--model', 'names', multiple=True, help='A model with weights; may be given again. Default: those here.')
def demo(names) -> None:
    """Serve a page to try models on a photo.

    It is for this machine alone; GRADIO_SERVER_NAME and GRADIO_SERVER_PORT name another address.
    """
    require('app', 'gradio', 'matplotlib', 'captum')
    from ..report.demo import serve

    serve(names)
