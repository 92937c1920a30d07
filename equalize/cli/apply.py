"""`equalize apply`."""

from typing import Annotated

import typer

from equalize.cli import options as o
from equalize.cli.flag_groups import ArchFlags


def apply(
    context: typer.Context,
    plan: Annotated[
        str, typer.Argument(metavar="PLAN", show_default=False, help="An equalize.json, or a directory that holds one.")
    ],
    model: o.Model,
    out: o.Out,
    *,
    arch: ArchFlags,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Do to MODEL what PLAN says, and write OUT; no data needed.

    What was written is loaded again and compared with MODEL, on random inputs, before OUT appears.
    """
    from equalize.cli.terminal import open_terminal

    with open_terminal(context, as_json=json) as terminal:
        from equalize.cli.reports.plan import plan_report
        from equalize.commands.apply import apply_plan
        from equalize.plan.plan import Plan

        done = apply_plan(Plan.read(plan), arch.name(model), out, overwrite=overwrite, notify=terminal.note)
        terminal.result(done.to_json(), plan_report(done, compared_on="random inputs"))
