"""`equalize compare`: trains the runs that are missing and evaluates all of them."""

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equalize.commands.compare.arms import baselines
from equalize.commands.compare.confirmation import Confirmed, confirm
from equalize.commands.compare.runs import Runs
from equalize.commands.compare.setup import Run, Setup
from equalize.commands.compare.statistics import Cell, Cells, Row, Verdict, compare_arms
from equalize.commands.compare.tuning import Tuned, tune
from equalize.commands.finetune.run_directory import write_whole
from equalize.data.dataset import DataSet
from equalize.errors import InputError
from equalize.messages import SILENT, Notify, TrainingMonitor, ignore
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
    """None where rates were only tuned."""
    tuned: tuple[Tuned, ...] = ()
    confirmed: tuple[Confirmed, ...] = ()

    @property
    def images(self) -> int:
        """The number of images that are scored."""
        return int(next(iter(self.cells.values())).counts_S2NK.shape[2])

    def results_of(self, arm: str, rate: float, *, confirming: bool = False) -> list[Mapping[str, Any]]:
        """The runs of one arm at one rate, a seed each: of `setup.seeds`, or of those that confirm."""
        seeds = self.setup.confirm_seeds if confirming else self.setup.seeds
        return [each for each in self.results if (each["arm"], each["lr"]) == (arm, rate) and each["seed"] in seeds]

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
            **(self._confirmation(self.setup.test) if self.setup.test else {}),
        }

    def _confirmation(self, test: DataSet) -> dict[str, Any]:
        return {
            "tuned_on": self.setup.val.split,
            "confirmed_on": test.split,
            "confirm_seeds": list(self.setup.confirm_seeds),
            "tuned": [{**asdict(each), "best": each.best} for each in self.tuned],
            "confirmed": [asdict(each) for each in self.confirmed],
        }


def compare(
    setup: Setup, out: str | Path, *, monitor: TrainingMonitor = SILENT, notify: Notify = ignore, warn: Notify = ignore
) -> Comparison:
    """Trains what is not yet trained, writes OUT/compare.json.

    What is finished in OUT is not trained again, and what another process trains there is waited for. `monitor` is
    told of each run that is trained; `warn` is called once for each line.

    Raises:
        InputError: `out` holds a comparison with other settings; or a network that cannot be compared.
        NumericsError: a loss is not finite.
    """
    runs = Runs(out, setup)
    train = functools.partial(_train_missing, runs, monitor=monitor, notify=notify, warn=functools.cache(warn))
    try:
        tuned = {} if setup.test is None else tune(setup, train, lambda run: float(runs.result(run)["mIoU"]))
        arms = {arm.name: arm for arm in setup.arms}
        confirming = [
            Run(arm=arms[name], rate=each.best, seed=seed)
            for seed in setup.confirm_seeds
            for name, each in tuned.items()
        ]
        train(confirming if tuned else setup.runs)
    except InputError:
        runs.withdraw()
        raise
    found = _confirmed(runs, tuned) if tuned else _gather(runs)
    write_whole(runs.path / "compare.json", json.dumps(found.to_json(), indent=2, allow_nan=False) + "\n")
    return found


def _train_missing(runs: Runs, every: Sequence[Run], *, monitor: TrainingMonitor, notify: Notify, warn: Notify) -> None:
    missing = len(runs.missing(every))
    if missing < len(every):
        notify(f"{len(every) - missing} of {len(every)} runs are there already")
    for mine, run in enumerate(runs.take_turns(every, notify)):
        watching = monitor.for_run(run.name, missing - len(runs.missing(every)), missing)
        runs.train(run, monitor=watching, notify=notify if mine == 0 else ignore, warn=warn)
        done = runs.result(run)
        notify(f"{run.name}: mIoU {done['mIoU']:.2f} after {done['steps']} steps, {done['seconds']:.0f} s")
        for refusal in done["refusals"]:
            warn(f"{run.arm.name} leaves {refusal['at']} as it is: {refusal['reason']}")


def _cell(runs: Runs, same: Sequence[Run], split: str = "val") -> Cell:
    results = [runs.result(run) for run in same]
    return Cell(
        final=tuple((result if split == "val" else result[split])["mIoU"] for result in results),
        early=tuple(result["early"]["mIoU"] for result in results),
        counts_S2NK=np.stack([runs.counts(run, split) for run in same]),
    )


def _gather(runs: Runs) -> Comparison:
    setup = runs.setup
    cells = {
        (arm.name, rate): _cell(runs, [Run(arm=arm, rate=rate, seed=seed) for seed in setup.seeds])
        for arm, rate in itertools.product(setup.arms, setup.rates)
    }
    early = f"{setup.config.eval_first} of {setup.config.max_steps} steps"
    rows, verdicts = compare_arms(cells, baselines(setup.arms), setup.rates, early=early, seed=setup.config.seed)
    results = tuple(runs.result(run) for run in setup.runs)
    return Comparison(setup=setup, results=results, cells=cells, rows=tuple(rows), verdicts=tuple(verdicts))


def _confirmed(runs: Runs, tuned: Mapping[str, Tuned]) -> Comparison:
    """The sweeps on the split that chose rates, and each arm's best rate on the third one."""
    setup, arms = runs.setup, {arm.name: arm for arm in runs.setup.arms}
    swept = {
        (name, rate): [Run(arm=arms[name], rate=rate, seed=seed) for seed in setup.seeds]
        for name, each in tuned.items()
        for rate in sorted({*each.rates, each.tenth})
    }
    best = {
        name: [Run(arm=arms[name], rate=each.best, seed=seed) for seed in setup.confirm_seeds]
        for name, each in tuned.items()
    }
    cells = {key: _cell(runs, same) for key, same in swept.items()}
    curves = {name: [runs.result(run)["curve"] for run in same] for name, same in best.items()}
    confirmed = confirm(
        {name: _cell(runs, same, "test") for name, same in best.items()},
        {name: np.mean(each, axis=0).tolist() for name, each in curves.items()},
        {name: each.best for name, each in tuned.items()},
        {name: max(each.means) - cells[name, each.tenth].mean for name, each in tuned.items()},
        baselines(setup.arms),
        seed=setup.config.seed,
    )
    return Comparison(
        setup=setup,
        results=tuple(runs.result(run) for same in (*swept.values(), *best.values()) for run in same),
        cells=cells,
        rows=(),
        verdicts=(),
        tuned=tuple(tuned.values()),
        confirmed=tuple(confirmed),
    )
