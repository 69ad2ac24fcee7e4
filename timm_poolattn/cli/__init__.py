"""`poolattn`: each command calls a function of the package that a notebook can call too."""

import sys

import click

from ..utils import REFUSED, UserError, look_up
from ..version import __version__
from . import bench, hub, models, plot, report, training

#: Where the commands of 0.1.0 went.
_RENAMED = {name: f'poolattn hub {name}' for name in ('release', 'verify', 'publish')}
_RENAMED |= {name: f'poolattn plot {name}' for name in ('curves', 'lambda', 'ablation')}
_RENAMED |= dict(cards='python -m timm_poolattn.hub', readme='python -m timm_poolattn.report.readme_tables')


class OneLineError(click.ClickException):
    """A user's mistake: one line, exit code 2."""

    exit_code = 2


class Poolattn(click.Group):
    """The group of all commands, and what becomes of their errors."""

    def resolve_command(self, ctx: click.Context, args: list[str]):
        """Say where a command of 0.1.0 went, or what is near a misspelt one."""
        name = args[0]
        if name in _RENAMED:
            raise UserError(f'`poolattn {name}` is `{_RENAMED[name]}` since 0.2.0')
        if name.endswith('.py'):
            raise UserError(f'`python -m timm_poolattn {name}` is `poolattn run {name}` since 0.2.0')
        if not name.startswith('-'):
            look_up('command', name, self.commands, '`poolattn -h` describes them')
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except UserError as e:
            raise OneLineError(' '.join(str(e).split())) from e
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as e:
            raise OneLineError(
                f'{e.format_message()} `{e.ctx.command_path if e.ctx else "poolattn"} -h` says more'
            ) from e
        except OSError as e:  # of a path that is not looked at by `replacing` or a reader of ours
            if e.filename is None or e.errno not in REFUSED:
                raise
            raise OneLineError(f'{e.filename}: {e.strerror}; name a place that you may read and write') from e
        except KeyboardInterrupt as e:
            click.echo(str(e) or 'interrupted', err=True)
            sys.exit(130)  # a shell's code for it


@click.group(cls=Poolattn, context_settings=dict(help_option_names=['-h', '--help']))
@click.version_option(__version__)
def main() -> None:
    """Pooling-based attention for timm."""


for command in (*models.COMMANDS, *training.COMMANDS, hub.hub, plot.plot, bench.bench, report.report, report.demo):
    main.add_command(command)
