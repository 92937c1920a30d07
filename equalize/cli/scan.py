"""`equalize scan`."""

from contextlib import nullcontext
from typing import Annotated, Any

import typer

from equalize.cli import options as o
from equalize.cli import panels as p
from equalize.cli import values
from equalize.cli.flag_groups import ImageFlags, ModelFlags, PreprocessFlags
from equalize.cli.next_command import next_command

_OF_IMAGES = (
    *("samples", "split", "tolerance", "report", "mean", "std", "rescale", "channel_order"),
    *("skip_bad", "ignore_index", "reduce_labels", "colors", "masks_drawn_on", "optimizer"),
)


Shape = Annotated[
    Any,
    p.data("Of the network's input; instead of --size.", "N,C,...", names=("--input-shape",), parser=values.read_shape),
]


def scan(
    context: typer.Context,
    model: o.Model,
    *,
    input_shape: Shape = None,
    every: Annotated[bool, p.output("List those without a resampled branch too.", names=("--all",))] = False,
    data: o.MaybeData = None,
    report: o.Report = None,
    images: ImageFlags,
    preprocess: PreprocessFlags,
    model_flags: ModelFlags,
    json: o.Json = False,
) -> None:
    """Show the fusion layers of MODEL and their branches.

    Says what cannot be equalized, and why. With --data, the scale of each branch is measured as well; without, only
    the network's structure is read.
    """
    if input_shape and (images.size or data):
        flag = "--size" if images.size else "--data"
        raise typer.BadParameter(f"cannot stand with {flag}", param_hint="--input-shape")
    if data is None:
        values.demand_data(context, *_OF_IMAGES)
    from equalize.cli.loading import without_collection
    from equalize.cli.terminal import open_terminal

    brief = without_collection() if data is None else nullcontext()
    with brief, open_terminal(context, as_json=json) as terminal, terminal.among_peers():
        from equalize.cli.reports.plan import scan_report
        from equalize.commands.scan import scan_checkpoint, write_scan_report

        with terminal.progress("measuring") as progress:
            found = scan_checkpoint(
                model_flags.name(model, preprocess=preprocess.override()),
                shape=input_shape,
                plain=every,
                data=data,
                config=images.config(model_flags.seed),
                histograms=report is not None,
                progress=progress,
                notify=terminal.note,
                warn=terminal.warn,
            )
        onward = ""
        if found.scan.sites:
            drawn = {"init_missing": "", "num_classes": "N"} if found.missing else {}
            onward = next_command(context, "calibrate", model, out="OUT", defaults={"data": "IMAGES", **drawn})
        page = write_scan_report(found, report, onward) if report else None
        terminal.result(found.to_json(), scan_report(found, every=every))
        terminal.hint(f"report: {page}" if page else None, onward)
