"""`equalize compare`."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from equalize.cli import options as o
from equalize.cli.flag_groups import ArchFlags, grouped
from equalize.cli.training_options import CommonTrainingFlags
from equalize.errors import InputError

if TYPE_CHECKING:
    from equalize.cli.terminal import Terminal
    from equalize.commands.compare.compare import Comparison

__all__ = ["compare"]

Out = Annotated[
    str,
    typer.Option("-o", "--out", metavar="OUT", show_default=False, help="The directory to write, or to go on with."),
]
Arms = Annotated[
    str,
    typer.Option(
        "--arms",
        metavar="ARM,ARM,...",
        help="none, redrawn (fusion layers drawn anew), and equalized: auto, migrate, preserve, rescale, reinit "
        "(redrawn and equalized), each also +keep-norm, +explicit or +folded.",
    ),
]
Seeds = Annotated[int, typer.Option("--seeds", metavar="K", help="Runs of each arm and rate, from --seed on.")]
Rates = Annotated[
    str | None, typer.Option("--lrs", metavar="LR,LR,...", help="Rates that every arm is trained with; or --lr.")
]
Evaluations = Annotated[
    int, typer.Option("--evaluations", metavar="N", help="Of each run; one after a tenth of the steps is added.")
]


@grouped
def compare(
    context: typer.Context,
    model: o.Model,
    data: o.Data,
    out: Out,
    arms: Arms = "none,auto",
    seeds: Seeds = 3,
    lrs: Rates = None,
    evaluations: Evaluations = 10,
    *,
    training: CommonTrainingFlags,
    init_missing: o.InitMissing = False,
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
    from equalize.cli.terminal import Terminal

    with Terminal(context, as_json=json) as terminal:
        given, rates = training.settings(), o.read_numbers(lrs, "--lrs") if lrs else ()
        name = replace(arch.name(model), init_missing=init_missing)
        _demand_one_process(terminal)
        from equalize.commands.compare.arms import read_arms
        from equalize.commands.compare.compare import compare as run
        from equalize.commands.compare.setup import Setup
        from equalize.commands.finetune.config import TrainConfig

        setup = Setup.make(
            *(name, data, TrainConfig.make(given, training.config)),
            arms=read_arms(arms.split(",")),
            rates=rates,
            seeds=seeds,
            evaluations=evaluations,
            notify=terminal.note,
        )
        with terminal.progress("training") as progress:
            found = run(setup, out, progress=progress, notify=terminal.note, warn=terminal.warn)
        _report(found, Path(out), terminal)


def _demand_one_process(terminal: "Terminal") -> None:
    """Under torchrun the main process says why, and the others end with it."""
    with terminal.among_peers():
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise InputError("torchrun", "a comparison runs in one process", remedy="call equalize compare without it")


def _report(found: "Comparison", out: Path, terminal: "Terminal") -> None:
    """Writes compare.md and, where it can be drawn, compare.png; prints the rest."""
    from equalize.cli.reports.comparison import comparison_report, markdown
    from equalize.commands.compare.curves import can_draw, draw_curves

    drawn = can_draw()
    if drawn:
        draw_curves(found, out / "compare.png")
    (out / "compare.md").write_text(markdown(found, "compare.png" if drawn else None), encoding="utf-8")
    terminal.result(found.to_json())
    terminal.show(comparison_report(found))
    wrote = "compare.json, compare.md" + (", compare.png" if drawn else "")
    terminal.hint(f"wrote {wrote} to {out}")
    if not drawn:
        terminal.hint("for a picture of the learning curves: pip install 'equalize[plot]', then this command again")
