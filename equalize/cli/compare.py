"""`equalize compare`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equalize.cli import options as o
from equalize.cli import panels as p
from equalize.cli import values
from equalize.cli.flag_groups import ArchFlags, PreprocessFlags
from equalize.cli.next_command import same_command
from equalize.cli.process import demand_one_process
from equalize.cli.training_options import CommonTrainingFlags, MaybeModel, run_config

if TYPE_CHECKING:
    from equalize.cli.terminal import Terminal
    from equalize.commands.compare.compare import Comparison
    from equalize.commands.compare.setup import Setup

Arms = Annotated[
    str,
    p.equalization(
        metavar="ARM,ARM,...",
        help="none, none+head-lr3, none+head-lr10 (a higher rate for fusion layers), rescale and paper (folded, at the "
        "two scales), explicit (trained through equalizers), preserve, preserve+paper, migrate, auto, redrawn "
        "(fusion layers drawn anew), reinit (redrawn and equalized); the last three may end in +explicit or +folded.",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepFlags:
    """Flags of the runs that each arm has."""

    seeds: Annotated[int | None, p.optimizer("Runs of each arm and rate, from --seed on.", "K", "3")] = None
    tune_seeds: Annotated[int | None, p.optimizer("In place of --seeds: they only choose each arm's rate.", "K")] = None
    confirm_seeds: Annotated[
        int, p.optimizer("With --tune-seeds: as many more, of each arm at its best rate.", "K")
    ] = 0
    test_split: Annotated[str | None, p.data("What the confirming runs are scored on, once.", "NAME")] = None
    lrs: Annotated[
        Any,
        p.optimizer("Learning rates that every arm is trained with.", "LR,LR,...", "--lr", parser=values.read_numbers),
    ] = None
    evaluations: Annotated[int, p.output("Of each run; one after a tenth is added.", "N")] = 10

    def check(self, training: CommonTrainingFlags) -> None:
        """Refuses flags that contradict each other."""
        if training.lr is not None and self.lrs is not None:
            raise typer.BadParameter("cannot stand with --lrs", param_hint="--lr")
        if self.seeds is not None and self.tune_seeds is not None:
            raise typer.BadParameter("cannot stand with --tune-seeds", param_hint="--seeds")
        if (self.tune_seeds is None) != (self.confirm_seeds == 0):
            needed = "--confirm-seeds" if self.confirm_seeds == 0 else "--tune-seeds"
            raise typer.BadParameter("is missing: one tunes, the other confirms", param_hint=needed)

    def settings(self) -> dict[str, Any]:
        """The flags as `Setup.make` takes them."""
        return {
            "rates": self.lrs or (),
            "seeds": next((number for number in (self.tune_seeds, self.seeds) if number is not None), 3),
            "confirm_seeds": self.confirm_seeds,
            "test_split": self.test_split,
            "evaluations": self.evaluations,
        }


_REMEDY = "start equalize compare without it, once for each device: they share the runs"


def compare(
    context: typer.Context,
    model: MaybeModel = None,
    *,
    data: o.MaybeData = None,
    out: o.Out,
    arms: Arms = "none,auto",
    sweep: SweepFlags,
    training: CommonTrainingFlags,
    keep_norm: o.KeepNorm = False,
    init_missing: o.InitMissing = False,
    preprocess: PreprocessFlags,
    arch: ArchFlags,
    dry_run: o.DryRun = False,
    json: o.Json = False,
) -> None:
    """Train MODEL with and without equalization and compare.

    Says whether it made a difference, with an interval over the seeds.
    All arms of a seed have the same weights, order of the data and augmentations. OUT gets compare.json, compare.md,
    report.html and, with matplotlib, their pictures; called again with the same flags, what is finished is not trained
    again, and more arms, rates or seeds can be added. Started several times, the processes share the runs.
    """
    sweep.check(training)
    from equalize.cli.terminal import open_terminal

    with open_terminal(context, as_json=json) as terminal, terminal.among_peers():
        demand_one_process("each run of a comparison is trained by one process", _REMEDY)
        from equalize.cli.training_bars import training_bars
        from equalize.commands.compare.arms import read_arms
        from equalize.commands.compare.compare import compare as run
        from equalize.commands.compare.setup import Setup

        subject, settings = run_config(
            model, data, training, arch=arch, preprocess=preprocess, init_missing=init_missing
        )
        setup = Setup.make(
            subject.name(seed=0),  # each run has its own
            str(subject.data),
            settings,
            arms=read_arms(arms.split(",")),
            **sweep.settings(),
            notify=terminal.note,
        )
        if dry_run:
            _forecast(context, terminal, setup, out)
            return
        with training_bars(terminal, out) as bars:
            found = run(setup, out, monitor=bars, notify=terminal.note, warn=terminal.warn)
        _report(terminal, found, out)


def _forecast(context: typer.Context, terminal: "Terminal", setup: "Setup", out: str) -> None:
    from equalize.cli.reports.dry_run import comparison_forecast
    from equalize.commands.compare.dry_run import forecast_comparison

    forecast = forecast_comparison(setup, out, notify=terminal.note, warn=terminal.warn)
    terminal.result(forecast.to_json(), comparison_forecast(forecast))
    terminal.hint(same_command(context, leave=("dry_run", "json")))


def _report(terminal: "Terminal", found: "Comparison", out: str) -> None:
    from equalize.cli.reports.comparison import comparison_report
    from equalize.commands.compare.report import write_report

    files = write_report(found, Path(out))
    terminal.result(found.to_json(), comparison_report(found))
    terminal.hint(f"wrote {', '.join(['compare.json', *files])} to {out}")
    if not any(file.endswith(".png") for file in files):
        terminal.hint("for pictures: pip install 'equalize[plot]', then this command again")
