"""`equalize compare`: trains the runs that are missing and evaluates all of them."""

import functools
import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equalize.commands.compare.arms import baselines
from equalize.commands.compare.runs import Runs
from equalize.commands.compare.setup import Run, Setup
from equalize.commands.compare.statistics import Cell, Cells, Row, Verdict, compare_arms
from equalize.commands.finetune.run_directory import write_whole
from equalize.errors import InputError
from equalize.messages import Notify, Progress, ignore, ignore_progress
from equalize.version import __version__

_ONLY_IN_RUNS = {"start", "loss", "IoU"}  # fields of a run that only its own file has


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The results of all runs."""

    setup: Setup
    results: tuple[Mapping[str, Any], ...]
    """The content of each run's file, in the order of `setup.runs`."""
    cells: Cells
    rows: tuple[Row, ...]
    """Every arm against its baseline, at every rate."""
    verdicts: tuple[Verdict, ...]

    @property
    def images(self) -> int:
        """The number of images that are scored."""
        return int(next(iter(self.cells.values())).counts_S2NK.shape[2])

    def results_of(self, arm: str, rate: float) -> list[Mapping[str, Any]]:
        """The runs of one arm at one rate, a seed each."""
        return [each for each in self.results if each["arm"] == arm and each["lr"] == rate]

    def to_json(self) -> dict[str, Any]:
        """The content of compare.json."""
        settings = self.setup.settings()
        return {
            "schema": 1,
            "equalize": __version__,
            "source": self.setup.name.source,
            "data": self.setup.data,
            **{key: settings[key] for key in ("arms", "lrs", "seeds")},
            "steps": self.setup.config.max_steps,
            "early_step": self.setup.config.eval_first,
            "images": self.images,
            "settings": settings,
            "runs": [{key: value for key, value in run.items() if key not in _ONLY_IN_RUNS} for run in self.results],
            "comparisons": [asdict(row) for row in self.rows],
            "verdict": [asdict(verdict) for verdict in self.verdicts],
        }


def compare(
    setup: Setup,
    out: str | Path,
    *,
    progress: Progress = ignore_progress,
    notify: Notify = ignore,
    warn: Notify = ignore,
) -> Comparison:
    """Trains what is not yet trained, writes OUT/compare.json.

    What is finished in OUT is not trained again. `progress` is called with the pairs trained on and to be trained on,
    over all runs that are missing; `warn` once for each line.

    Raises:
        InputError: `out` holds a comparison with other settings; or a network that cannot be compared.
        NumericsError: a loss is not finite.
    """
    runs = Runs(out, setup)
    try:
        _train_missing(runs, progress, notify, warn)
    except InputError:
        runs.withdraw()
        raise
    found = _gather(setup, runs)
    write_whole(runs.path / "compare.json", json.dumps(found.to_json(), indent=2, allow_nan=False) + "\n")
    return found


def _train_missing(runs: Runs, progress: Progress, notify: Notify, warn: Notify) -> None:
    every = runs.setup.runs
    missing = [run for run in every if not runs.finished(run)]
    warn_once = functools.cache(warn)
    if len(missing) < len(every):
        notify(f"{len(every) - len(missing)} of {len(every)} runs are there already")
    for number, run in enumerate(missing):

        def report(done: int, of: int, before: int = number) -> None:
            progress(before * of + done, len(missing) * of)

        runs.train(run, progress=report, notify=notify if number == 0 else ignore, warn=warn_once)
        done = runs.result(run)
        notify(f"{run.name}: mIoU {done['mIoU']:.2f} after {done['steps']} steps, {done['seconds']:.0f} s")
        for refusal in done["refusals"]:
            warn_once(f"{run.arm.name} leaves {refusal['at']} as it is: {refusal['reason']}")


def _gather(setup: Setup, runs: Runs) -> Comparison:
    results = {run: runs.result(run) for run in setup.runs}
    cells: dict[tuple[str, float], Cell] = {}
    for arm, rate in itertools.product(setup.arms, setup.rates):
        same = [Run(arm=arm, rate=rate, seed=seed) for seed in setup.seeds]
        cells[arm.name, rate] = Cell(
            final=tuple(results[run]["mIoU"] for run in same),
            early=tuple(results[run]["early"]["mIoU"] for run in same),
            counts_S2NK=np.stack([runs.counts(run) for run in same]),
        )
    early = f"{setup.config.eval_first} of {setup.config.max_steps} steps"
    rows, verdicts = compare_arms(cells, baselines(setup.arms), setup.rates, early=early, seed=setup.config.seed)
    return Comparison(
        setup=setup, results=tuple(results.values()), cells=cells, rows=tuple(rows), verdicts=tuple(verdicts)
    )
