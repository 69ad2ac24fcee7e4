"""The report."""

import click


@click.command()
@click.option('-o', '--out', required=True, type=click.Path(dir_okay=False), help='report.html or report.md.')
@click.option('--benchmark', type=click.Path(), help='What `poolattn bench models --json` printed.')
def report(out, benchmark) -> None:
    """Write the papers' tables beside ours.

    It is one page, or Markdown, by the suffix of the file.
    """
    from ..report.page import write_report

    click.echo(f'wrote {write_report(out, benchmark)}')
