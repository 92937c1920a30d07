"""`equalize calibrate`."""

from typing import TYPE_CHECKING, Annotated

import typer

from equalize.cli import options as o
from equalize.cli import panels as p
from equalize.cli.flag_groups import ImageFlags, ModelFlags, PreprocessFlags
from equalize.cli.next_command import OF_A_PASS, OF_DRAWING, command_line, next_command
from equalize.cli.values import ScaleName

if TYPE_CHECKING:
    from equalize.moments.measure import Measurement

_LEFT = OF_A_PASS | OF_DRAWING  # for the next command

Strategy = Annotated[
    o.StrategyName,
    p.equalization(
        "auto: drawn weights are rescaled, trained ones migrated or preserved; a layer with nothing to gain is "
        "left alone. migrate and preserve keep what the network computes; rescale and reinit (weights drawn anew) "
        "change it."
    ),
]


Sites = Annotated[
    str | None,
    p.equalization(
        "Fusion layers to equalize, by module path.", "GLOB", "those with a resampled branch", names=("--sites",)
    ),
]
Force = Annotated[
    bool, p.equalization("Go on though the BatchNorms say that the input is wrong.", names=("--force-preprocessing",))
]


def calibrate(
    context: typer.Context,
    model: o.Model,
    data: o.Data,
    out: o.Out,
    *,
    strategy: Strategy = "auto",
    scale: Annotated[ScaleName, p.equalization(o.SCALE_HELP)] = "step",
    sites: Sites = None,
    images: ImageFlags,
    preprocess: PreprocessFlags,
    force_preprocessing: Force = False,
    model_flags: ModelFlags,
    keep_norm: o.KeepNorm = False,
    dry_run: Annotated[bool, p.output("Measure and report; write nothing.", names=("--dry-run",))] = False,
    overwrite: o.Overwrite = False,
    report: o.Report = None,
    json: o.Json = False,
) -> None:
    """Measure MODEL on images and write OUT, equalized.

    OUT has MODEL's format and loads in its library; it is loaded again and compared with MODEL before it appears.
    """
    from equalize.cli.terminal import open_terminal

    with open_terminal(context, as_json=json) as terminal, terminal.among_peers():
        from equalize.cli.reports.plan import plan_report
        from equalize.commands.calibrate import calibrate_checkpoint, write_calibration_report

        kept: list[Measurement] = []
        with terminal.progress("measuring") as progress:
            plan = calibrate_checkpoint(
                *(model_flags.name(model, preprocess=preprocess.override()), data, out),
                strategy=strategy,
                scale=scale,
                pattern=sites,
                force_preprocessing=force_preprocessing,
                config=images.config(model_flags.seed),
                dry_run=dry_run,
                overwrite=overwrite,
                command=command_line(context, out="OUT"),  # a plan does not depend on where it is written
                keep=kept.append if report else None,
                progress=progress,
                notify=terminal.note,
                warn=terminal.warn,
            )
        onward = next_command(context, "finetune", out, out="TRAINED", leave=_LEFT) if plan.facts["output"] else ""
        page = write_calibration_report(plan, kept, report, onward) if report else None
        terminal.result(plan.to_json(), plan_report(plan))
        terminal.hint(f"report: {page}" if page else None, onward)
