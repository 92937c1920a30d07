"""`equalize evaluate`."""

from typing import Annotated

import typer

from equalize.cli import options as o

__all__ = ["evaluate"]


Split = Annotated[
    str | None, typer.Option("--split", metavar="NAME", help="Of the data set; val, else test, if left away.")
]
SlidingWindow = Annotated[
    bool, typer.Option("--sliding-window", help="Leave images at their own size, slide a window of --size over them.")
]


def evaluate(
    context: typer.Context,
    model: o.Model,
    data: o.Data,
    split: Split = None,
    size: o.Size = None,
    sliding_window: SlidingWindow = False,
    ignore_index: o.IgnoreIndex = 255,
    reduce_labels: o.ReduceLabels = "auto",
    class_names: o.ClassNames = None,
    batch_size: o.BatchSize = 8,
    device: o.Device = "auto",
    precision: o.Precision = o.PrecisionName.FP32,
    workers: o.Workers = 0,
    arch: o.Arch = None,
    arch_arg: o.ArchArgs = None,
    num_classes: o.NumClasses = None,
    json: o.Json = False,
) -> None:
    """Score MODEL on images with masks: mIoU, mAcc, aAcc and a table of the classes, in percent.

    Images are brought to --size, or the checkpoint's size, or left at their own; the logits are brought to the size
    of the mask, which is scored as it is stored. Under torchrun every process scores a share.
    """
    from equalize.cli.terminal import Terminal

    with Terminal(context, as_json=json) as terminal:
        name = o.read_name(model, arch=arch, arch_args=arch_arg, num_classes=num_classes)
        from equalize.cli.reports.training import score_report
        from equalize.commands import evaluate as command
        from equalize.distributed import is_main, leave

        config = command.EvalConfig(
            split=split,
            size=o.read_size(size),
            sliding_window=sliding_window,
            ignore_index=ignore_index,
            reduce_labels=reduce_labels,
            class_names=class_names,
            batch_size=batch_size,
            device=device,
            precision=precision.value,
            workers=workers,
        )
        with terminal.progress("scoring") as progress:
            found = command.evaluate(name, data, config, progress=progress, notify=terminal.note)
        if is_main():
            terminal.result(found.to_json())
            terminal.show(score_report(found))
        leave()
