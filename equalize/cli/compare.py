"""`equalize compare`."""

from typing import Annotated, Any, Literal

import typer

from equalize.cli import options as o
from equalize.cli import training_options as t

__all__ = ["compare"]


def compare(
    context: typer.Context,
    model: o.Model,
    data: o.Data,
    out: Annotated[
        str,
        typer.Option(
            "-o", "--out", metavar="OUT", show_default=False, help="The directory to write, or to go on with."
        ),
    ],
    arms: Annotated[
        str,
        typer.Option(
            "--arms",
            metavar="ARM,ARM,...",
            help="none, redrawn (fusion layers drawn anew), and equalized: auto, migrate, preserve, rescale, reinit "
            "(redrawn and equalized), each also +keep-norm, +explicit or +folded.",
        ),
    ] = "none,auto",
    seeds: Annotated[int, typer.Option("--seeds", metavar="K", help="Runs of each arm and rate, from --seed on.")] = 3,
    lrs: Annotated[
        str | None, typer.Option("--lrs", metavar="LR,LR,...", help="Rates that every arm is trained with.")
    ] = None,
    evaluations: Annotated[
        int, typer.Option("--evaluations", metavar="N", help="Of each run; one after a tenth of the steps is added.")
    ] = 10,
    config: Annotated[
        str | None, typer.Option("--config", metavar="FILE", help="YAML with settings of finetune; flags win.")
    ] = None,
    epochs: t.Epochs = None,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", "--steps", metavar="K", help="Instead of --epochs.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", metavar="N", help="Pairs a step; 8 if left away.")
    ] = None,
    accumulate: t.Accumulate = None,
    optimizer: t.Optimizer = None,
    lr: Annotated[float | None, typer.Option("--lr", help="One rate, instead of --lrs; 1e-4 if left away.")] = None,
    head_lr_mult: t.HeadLrMult = None,
    precision: t.Precision = None,
    freeze_backbone: t.FreezeBackbone = None,
    freeze_norms: t.FreezeNorms = None,
    size: o.Size = None,
    crop: t.Crop = None,
    num_classes: t.NumClasses = None,
    class_names: o.ClassNames = None,
    ignore_index: t.IgnoreIndex = None,
    reduce_labels: t.ReduceLabels = None,
    train_split: t.TrainSplit = None,
    val_split: t.ValSplit = None,
    samples: Annotated[
        int | None, typer.Option("--samples", metavar="N", help="Images that sigmas are measured on; 256 if left away.")
    ] = None,
    train_as: Annotated[
        Literal["explicit", "folded"] | None,
        typer.Option("--train-as", help="Of equalized arms that don't say; as in finetune if left away."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="The first one; 0 if left away.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", metavar="N", help="Processes that read images.")] = None,
    device: t.Device = None,
    init_missing: o.InitMissing = False,
    arch: o.Arch = None,
    arch_arg: o.ArchArgs = None,
    json: o.Json = False,
) -> None:
    """Train MODEL with and without equalization, from the same seeds, and say whether it made a difference.

    All arms of a seed have the same weights, order of the data and augmentations. OUT gets compare.json, compare.md
    and, with matplotlib, compare.png; called again with the same flags, what is finished is not trained again, and
    more arms, rates or seeds can be added.
    """
    if lr is not None and lrs is not None:
        raise typer.BadParameter("cannot stand with --lrs", param_hint="--lr")
    given: dict[str, Any] = {key: value for key, value in locals().items() if key in _SETTINGS and value is not None}
    from equalize.cli.terminal import Terminal

    with Terminal(context, as_json=json) as terminal:
        given |= {key: o.read_size(value) for key, value in {"size": size, "crop": crop}.items() if value}
        rates = o.read_numbers(lrs, "--lrs") if lrs else ()
        name = o.read_name(model, arch=arch, arch_args=arch_arg, init_missing=init_missing)
        from equalize.commands.compare.arms import read_arms

        read = read_arms(arms.split(","))
        from pathlib import Path

        from equalize.cli.reports.comparison import comparison_report, markdown
        from equalize.commands.compare.compare import compare as run
        from equalize.commands.compare.compare import demand_one_process
        from equalize.commands.compare.curves import can_draw, draw_curves
        from equalize.commands.compare.setup import Setup
        from equalize.commands.finetune.config import Recipe

        with terminal.among_peers():  # of several that are refused only one says why
            demand_one_process()
        setup = Setup.make(
            name,
            data,
            Recipe.make(given, config),
            arms=read,
            rates=rates,
            seeds=seeds,
            evaluations=evaluations,
            say=terminal.note,
        )
        with terminal.progress("training") as progress:
            found = run(setup, out, progress=progress, say=terminal.note, warn=terminal.warn)
        place, drawn = Path(out), can_draw()
        if drawn:
            draw_curves(found, place / "compare.png")
        (place / "compare.md").write_text(markdown(found, "compare.png" if drawn else None), encoding="utf-8")
        terminal.result(found.to_json())
        terminal.show(comparison_report(found))
        wrote = "compare.json, compare.md" + (", compare.png" if drawn else "")
        terminal.hint(f"wrote {wrote} to {out}")
        if not drawn:
            terminal.hint("for a picture of the learning curves: pip install 'equalize[plot]', then this command again")


_SETTINGS = {
    *("epochs", "max_steps", "batch_size", "accumulate", "optimizer", "lr", "head_lr_mult", "precision"),
    *("freeze_backbone", "freeze_norms", "num_classes", "class_names", "ignore_index", "reduce_labels"),
    *("train_split", "val_split", "samples", "train_as", "seed", "workers", "device"),
}
