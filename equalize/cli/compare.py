"""`equalize compare`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equalize.cli import options as o
from equalize.cli.flag_groups import ArchFlags, PreprocessFlags
from equalize.cli.training_options import CommonTrainingFlags
from equalize.errors import InputError

if TYPE_CHECKING:
    from equalize.cli.terminal import Terminal
    from equalize.commands.compare.compare import Comparison

__all__ = ["compare"]

Arms = Annotated[
    str,
    typer.Option(
        metavar="ARM,ARM,...",
        help="none, redrawn (fusion layers drawn anew), and equalized: auto, migrate, preserve, rescale, reinit "
        "(redrawn and equalized), each also +keep-norm, +explicit or +folded.",
    ),
]


def compare(
    context: typer.Context,
    model: o.Model,
    data: o.Data,
    out: o.Out,
    *,
    arms: Arms = "none,auto",
    seeds: Annotated[int, typer.Option(metavar="K", help="Runs of each arm and rate, from --seed on.")] = 3,
    lrs: Annotated[
        Any,
        typer.Option(metavar="LR,LR,...", parser=o.read_numbers, help="Rates that every arm is trained with; or --lr."),
    ] = None,
    evaluations: Annotated[int, typer.Option(metavar="N", help="Of each run; one after a tenth is added.")] = 10,
    training: CommonTrainingFlags,
    init_missing: o.InitMissing = False,
    preprocess: PreprocessFlags,
    arch: ArchFlags,
    json: o.Json = False,
) -> None:
    """Train MODEL with and without equalization, from the same seeds, and say whether it made a difference.

    All arms of a seed have the same weights, order of the data and augmentations. OUT gets compare.json, compare.md
    and, with matplotlib, compare.png; called again with the same flags, what is finished is not trained again, and
    more arms, rates or seeds can be added.
    """
    if training.lr is not None and lrs is not None:
        raise typer.BadParameter("cannot stand with --lrs", param_hint="--lr")
    from equalize.cli.terminal import open_terminal

    with open_terminal(context, as_json=json) as terminal, terminal.among_peers():
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise InputError("torchrun", "a comparison runs in one process", remedy="call equalize compare without it")
        from equalize.commands.compare.arms import read_arms
        from equalize.commands.compare.compare import compare as run
        from equalize.commands.compare.setup import Setup
        from equalize.commands.finetune.config import TrainConfig

        setup = Setup.make(
            arch.name(model, init_missing=init_missing, preprocess=preprocess.override()),
            data,
            TrainConfig.make(training.settings(), training.config),
            arms=read_arms(arms.split(",")),
            rates=lrs or (),
            seeds=seeds,
            evaluations=evaluations,
            notify=terminal.note,
        )
        with terminal.progress("training") as progress:
            found = run(setup, out, progress=progress, notify=terminal.note, warn=terminal.warn)
        _report(found, Path(out), terminal)


def _report(found: "Comparison", out: Path, terminal: "Terminal") -> None:
    """Writes compare.md and, with matplotlib, compare.png; prints the report."""
    from equalize.cli.reports.comparison import comparison_report, markdown
    from equalize.commands.compare.curves import can_draw, draw_curves

    has_plot = can_draw()
    if has_plot:
        draw_curves(found, out / "compare.png")
    (out / "compare.md").write_text(markdown(found, "compare.png" if has_plot else None), encoding="utf-8")
    terminal.result(found.to_json(), comparison_report(found))
    terminal.hint(f"wrote compare.json, compare.md{', compare.png' if has_plot else ''} to {out}")
    if not has_plot:
        terminal.hint("for a picture of the learning curves: pip install 'equalize[plot]', then this command again")
