"""`equalize verify`."""

from typing import Annotated

import typer

from equalize.cli import options as o
from equalize.cli.flag_groups import ArchFlags, grouped

__all__ = ["verify"]


@grouped
def verify(
    context: typer.Context,
    out: Annotated[
        str, typer.Argument(metavar="OUT", show_default=False, help="A directory that equalize calibrate wrote.")
    ],
    against: o.Against,
    *,
    data: o.MaybeData = None,
    size: o.Size = None,
    split: o.Split = None,
    arch: ArchFlags,
    json: o.Json = False,
) -> None:
    """Prove that OUT is MODEL, equalized, and nothing else.

    Same keys; only the listed tensors changed; and each fusion layer, on a few images of --data or else on random
    inputs, does what the plan says.
    """
    if data is None:
        o.demand_data(size=size, split=split)
    from equalize.cli.terminal import Terminal

    with Terminal(context, as_json=json) as terminal:
        config = o.read_calibration(samples="2", size=size, split=split, batch_size=2)
        name = arch.name(against)
        from equalize.cli.reports.plan import verification_json, verification_report
        from equalize.commands.verify import verify_checkpoint

        compared_on = f"images of {data}" if data else "random inputs"
        plan, check = verify_checkpoint(out, name, data, config)
        terminal.result(verification_json(out, against, plan, check))
        terminal.show(verification_report(out, against, plan, check, compared_on))
