"""`equalize evaluate`."""

from dataclasses import asdict, dataclass
from typing import Annotated

from typer import Context

from equalize.cli import options as o
from equalize.cli import panels as p
from equalize.cli.flag_groups import ArchFlags, ForwardFlags, PreprocessFlags


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreFlags(ForwardFlags):
    """The fields of `EvalConfig`."""

    split: Annotated[str | None, p.data("Of the data set.", "NAME", "val, else test")] = None
    ignore_index: o.IgnoreIndex = None
    reduce_labels: o.ReduceLabels = "auto"
    colors: o.Colors = None
    masks_drawn_on: o.DrawnOn = "auto"
    class_names: o.ClassNames = None


def evaluate(
    context: Context,
    model: o.Model,
    data: o.Data,
    *,
    flags: ScoreFlags,
    preprocess: PreprocessFlags,
    arch: ArchFlags,
    num_classes: o.NumClasses = None,
    max_pixels: o.MaxPixels = None,
    json: o.Json = False,
) -> None:
    """Score MODEL on images with masks, in percent.

    mIoU, mAcc, aAcc and a table of the classes. Images are brought to --size, or the checkpoint's size, or left at
    their own; the logits are brought to the size of the mask, which is scored as it is stored. Under torchrun every
    process scores a share.
    """
    from equalize.cli.terminal import open_terminal

    with open_terminal(context, as_json=json) as terminal:
        from equalize.cli.reports.training import score_report
        from equalize.commands import evaluate as command
        from equalize.distributed import leave

        name = arch.name(model, num_classes=num_classes, preprocess=preprocess.override())
        config = command.EvalConfig(**asdict(flags))
        with terminal.progress("scoring") as progress:
            found = command.evaluate(name, data, config, progress=progress, notify=terminal.note, warn=terminal.warn)
        terminal.result(found.to_json(), score_report(found))
        leave()
