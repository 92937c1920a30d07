"""`equalize compare`: every run that is missing, then what all of them say."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equalize.commands.compare.arms import baselines
from equalize.commands.compare.runs import Runs
from equalize.commands.compare.setup import Run, Setup
from equalize.commands.compare.verdict import Cell, Row, Verdict, judge
from equalize.commands.finetune.run_directory import write_whole
from equalize.commands.images import Progress
from equalize.errors import InputError
from equalize.version import __version__

__all__ = ["SCHEMA", "Comparison", "compare", "demand_one_process"]

SCHEMA = 1

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What the runs came to.

    Attributes:
        setup: what was compared.
        results: the content of each run's file, in the order of `setup.runs`.
        cells: the same by arm and rate.
        rows: every arm against its baseline, at every rate.
        verdicts: three answers for each of them.
    """

    setup: Setup
    results: tuple[Mapping[str, Any], ...]
    cells: Mapping[tuple[str, float], Cell]
    rows: tuple[Row, ...]
    verdicts: tuple[Verdict, ...]

    def results_of(self, arm: str, rate: float) -> list[Mapping[str, Any]]:
        """The runs of one arm at one rate, a seed each."""
        return [each for each in self.results if each["arm"] == arm and each["lr"] == rate]

    def to_json(self) -> dict[str, Any]:
        """The content of compare.json."""
        setup = self.setup
        left_out = {"start", "loss", "IoU"}  # they stand in each run's own file
        return {
            "schema": SCHEMA,
            "equalize": __version__,
            "source": setup.name.source,
            "data": setup.data,
            "arms": [arm.name for arm in setup.arms],
            "lrs": list(setup.rates),
            "seeds": list(setup.seeds),
            "steps": setup.recipe.max_steps,
            "early_step": setup.recipe.eval_first,
            "images": int(next(iter(self.cells.values())).counts_S2NK.shape[2]),
            "settings": setup.settings(),
            "runs": [{key: value for key, value in run.items() if key not in left_out} for run in self.results],
            "comparisons": [row.to_json() for row in self.rows],
            "verdict": [verdict.to_json() for verdict in self.verdicts],
        }


def compare(
    setup: Setup,
    out: str | Path,
    *,
    progress: Progress = lambda done, of: None,
    say: Say = lambda line: None,
    warn: Say = lambda line: None,
) -> Comparison:
    """Trains what is not yet trained, writes OUT/compare.json.

    Args:
        setup: what is compared.
        out: the directory; what is finished there is not trained again.
        progress: called with the pairs trained on and to be trained on, over all runs that are missing.
        say: called with what a user should know, a line at a time.
        warn: called with what a user may want to act on.

    Raises:
        InputError: `out` holds a comparison with other settings; or a network that cannot be compared.
        NumericsError: a loss is not finite.
    """
    demand_one_process()
    runs = Runs(out, setup)
    warned: set[str] = set()
    missing = [run for run in setup.runs if not runs.finished(run)]
    if len(missing) < len(setup.runs):
        say(f"{len(setup.runs) - len(missing)} of {len(setup.runs)} runs are there already")
    for number, run in enumerate(missing):
        try:
            runs.train(
                run,
                progress=_nth(number, len(missing), progress),
                say=say if number == 0 else lambda line: None,
                warn=warn,
            )
        except InputError:
            runs.withdraw()
            raise
        done = runs.result(run)
        say(f"{run.name}: mIoU {done['mIoU']:.2f} after {done['steps']} steps, {done['seconds']:.0f} s")
        for refusal in done["refusals"]:
            line = f"{run.arm.name} leaves {refusal['at']} as it is: {refusal['reason']}"
            if line not in warned:
                warn(line)
            warned.add(line)
    found = _gather(setup, runs)
    write_whole(runs.path / "compare.json", json.dumps(found.to_json(), indent=2, allow_nan=False) + "\n")
    return found


def demand_one_process() -> None:
    """Refuses to be one of several processes that a launcher started.

    Raises:
        InputError: it is.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise InputError("torchrun", "a comparison runs in one process", remedy="call equalize compare without it")


def _nth(number: int, runs: int, progress: Progress) -> Progress:
    return lambda done, of: progress(number * of + done, runs * of)


def _gather(setup: Setup, runs: Runs) -> Comparison:
    cells = {
        (arm.name, rate): _cell(runs, [Run(arm=arm, rate=rate, seed=seed) for seed in setup.seeds])
        for arm in setup.arms
        for rate in setup.rates
    }
    tenth = f"{setup.recipe.eval_first} of {setup.recipe.max_steps} steps"
    rows, verdicts = judge(cells, baselines(setup.arms), setup.rates, early=tenth, seed=setup.recipe.seed)
    return Comparison(
        setup=setup,
        results=tuple(runs.result(run) for run in setup.runs),
        cells=cells,
        rows=tuple(rows),
        verdicts=tuple(verdicts),
    )


def _cell(runs: Runs, seeds: Sequence[Run]) -> Cell:
    results = [runs.result(run) for run in seeds]
    return Cell(
        final=tuple(result["mIoU"] for result in results),
        early=tuple(result["early"]["mIoU"] for result in results),
        counts_S2NK=np.stack([runs.counts(run) for run in seeds]),
    )
