"""The `equalize` command and its subcommands."""

from typing import Annotated

import typer

from equalize.cli.apply import apply
from equalize.cli.calibrate import calibrate
from equalize.cli.compare import compare
from equalize.cli.demo import demo
from equalize.cli.evaluate import evaluate
from equalize.cli.examples import EXAMPLES
from equalize.cli.finetune import finetune
from equalize.cli.flag_groups import grouped
from equalize.cli.panels import PanelCommand, PanelGroup
from equalize.cli.predict import predict
from equalize.cli.push import push
from equalize.cli.scan import scan
from equalize.cli.verify import verify
from equalize.version import __version__

app = typer.Typer(
    name="equalize",
    help="Embed scale equalization into the fusion layers of pretrained segmentation checkpoints.",
    cls=PanelGroup,
    rich_markup_mode=None,  # see panels.py
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for _command in (scan, calibrate, apply, verify, finetune, evaluate, compare, predict, push, demo):
    app.command(cls=PanelCommand, epilog=EXAMPLES[_command.__name__])(grouped(_command))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"equalize {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _equalize(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks, and what libraries log and warn about.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
