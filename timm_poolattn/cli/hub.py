"""Release folders: release, verify, publish."""

from pathlib import Path

import click

from ..utils import HUB_ORG, UserError
from .options import dataset_option, echo_json, json_option

endpoint_option = click.option('--endpoint', help='Of the Hub. Default: $HF_ENDPOINT, or https://huggingface.co.')


@click.group()
def hub() -> None:
    """Lay out a release, check it, publish it."""


@hub.command()
@click.argument('run_dir', type=click.Path())
@click.option('--tag', required=True, help='The training data: cifar10, cifar100, or a name for your own.')
@click.option(
    '--checkpoint',
    type=click.Choice(['last', 'best']),
    default='last',
    show_default=True,
    help='Best is chosen on the test set, which flatters it.',
)
@click.option('--data-dir', type=click.Path(), help="The data to evaluate on. Default: the run's.")
@click.option('--out', type=click.Path(path_type=Path), help='Default: hub_configs/ of the checkout.')
@click.option('--onnx', is_flag=True, help='Add ONNX files: float32, and 8 bits where accurate.')
@click.option('--replace', is_flag=True, help='Put the weights into the place of others.')
def release(run_dir, **options) -> None:
    """Lay out a release folder from a run.

    RUN_DIR is the output folder of `poolattn train`.
    """
    from ..hub import release

    click.echo(f'released {release(run_dir, **options)}')


@hub.command()
@click.argument('target')
@click.option(
    '--data-dir', type=click.Path(), help="Check accuracy too: a folder or tar by class, or --dataset's root."
)
@dataset_option
@click.option('--split', help='Of the data. Default: the one that the run evaluated on.')
@endpoint_option
@json_option
@click.pass_context
def verify(ctx, target: str, as_json: bool, **options) -> None:
    """Check a release.

    TARGET is a name, a folder, or hf-hub:REPO. The exit code is 1 where a check fails.
    """
    from ..hub import verify

    checks = verify(target, **options)
    if as_json:
        echo_json([check._asdict() for check in checks])
    else:
        for check in checks:
            click.echo(f'{"ok" if check.ok else "FAILED":<8}{check.name:<12}{check.detail}')
    ctx.exit(0 if all(check.ok for check in checks) else 1)


@hub.command()
@click.argument('targets', nargs=-1)
@click.option('--all', 'everything', is_flag=True, help='Every release of hub_configs.')
@click.option('--org', envvar=HUB_ORG, required=True, help=f'Organisation or user. Default: ${HUB_ORG}.')
@click.option('--private', is_flag=True, help='Create private repositories.')
@click.option('--pr', 'create_pr', is_flag=True, help='Propose the files in a pull request.')
@click.option('--replace', is_flag=True, help='Replace other weights; the old ones stay under a tag.')
@click.option('--dry-run', is_flag=True, help='Only say what would be done.')
@click.option('--collection', metavar='SLUG', help='Add the repositories to this collection.')
@endpoint_option
@click.option('--workers', type=click.IntRange(1), default=4, show_default=True, help='Releases at once.')
@json_option
@click.pass_context
def publish(ctx, targets, everything: bool, as_json: bool, **options) -> None:
    """Publish releases to the Hub.

    TARGETS are names or folders of releases. The exit code is 1 where one fails.
    """
    from ..hub import publish
    from ..utils import released

    if bool(targets) == everything:
        raise UserError('name the releases to publish, or take --all of them')
    rows = publish(released() if everything else targets, **options)
    if as_json:
        echo_json([row._asdict() for row in rows])
    else:
        for row in rows:
            click.echo(f'{row.status:<20}{row.repo_id:<40}{row.detail}')
    ctx.exit(1 if any(row.status == 'failed' for row in rows) else 0)
