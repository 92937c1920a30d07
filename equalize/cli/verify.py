"""`equalize verify`."""

from typing import Annotated

import typer

from equalize.cli import options as o
from equalize.cli import panels as p
from equalize.cli import values
from equalize.cli.flag_groups import ArchFlags, PreprocessFlags


def verify(
    context: typer.Context,
    out: Annotated[
        str, typer.Argument(metavar="OUT", show_default=False, help="A directory that equalize calibrate wrote.")
    ],
    against: Annotated[str, p.model("The model that OUT was made of.", "MODEL", False, names=("--against",))],
    *,
    data: o.MaybeData = None,
    size: o.Size = None,
    split: o.Split = None,
    preprocess: PreprocessFlags,
    max_pixels: o.MaxPixels = None,
    arch: ArchFlags,
    json: o.Json = False,
) -> None:
    """Prove that OUT is MODEL, equalized, and nothing else.

    Same keys; only the listed tensors changed; and each fusion layer, on a few images of --data or else on random
    inputs, does what the plan says. Of a model that was trained since, which no such proof fits, it checks that it is
    the same network, loaded by its library, and that MODEL is what it was made of.
    """
    if data is None:
        values.demand_data(context, "size", "split", "mean", "std", "rescale", "channel_order")
    from equalize.cli.terminal import open_terminal

    with open_terminal(context, as_json=json) as terminal:
        from equalize.cli.reports.plan import trained_report, verification_json, verification_report
        from equalize.commands.calibration_config import CalibrationConfig
        from equalize.commands.verify import verify_checkpoint
        from equalize.commands.verify_trained import verify_trained
        from equalize.plan.plan import Plan

        name = arch.name(against, preprocess=preprocess.override())
        if "finetuned" in (plan := Plan.read(out)).facts:
            trained = verify_trained(out, name, plan)
            terminal.result(
                verification_json(out, against, plan, trained=trained), trained_report(out, against, plan, trained)
            )
            return
        config = CalibrationConfig(samples=2, size=size, split=split, batch_size=2)
        plan, check = verify_checkpoint(out, name, data, config, notify=terminal.note)
        compared_on = f"images of {data}" if data else "random inputs"
        report = verification_report(out, against, plan, check, compared_on)
        terminal.result(verification_json(out, against, plan, check), report)
