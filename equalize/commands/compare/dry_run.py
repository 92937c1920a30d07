"""`equalize compare --dry-run`: which runs there would be, and about how long they take."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from equalize.commands.compare.arms import fusion_layers
from equalize.commands.compare.runs import Runs
from equalize.commands.compare.setup import Run, Setup
from equalize.commands.finetune.dry_run import evaluations_of, facts_of, scored_images, steps_of
from equalize.commands.finetune.pace import Pace, pace_of
from equalize.commands.finetune.splits import Task, open_task
from equalize.commands.images import input_shape
from equalize.device import device_of
from equalize.messages import Notify, ignore
from equalize.plan.plan import SCHEMA


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonForecast:
    """A comparison before its first run, or its next."""

    setup: Setup
    task: Task
    """Of the first seed."""
    output: str
    finished: tuple[Run, ...]
    missing: tuple[Run, ...]
    """Of arms, rates and seeds as given; those of `Setup.seeds`, where others confirm."""
    begun: tuple[str, ...]
    """Names of missing runs that were interrupted."""
    confirming: int
    """Runs that confirm each arm at its best rate, which the missing ones decide."""
    measurements: int
    """Passes over the images that are measured before a first step."""
    pace: Pace

    @property
    def steps(self) -> int:
        """Of each run."""
        return steps_of(self.setup.config, self.setup.train.pairs)

    @property
    def evaluations(self) -> int:
        """Of each run, and one after its last step, image by image."""
        config = self.setup.config_of(self.setup.runs[0])
        return evaluations_of(config, self.steps, steps_of(config, self.setup.train.pairs, epochs=1)) + 1

    @property
    def seconds(self) -> float:
        """About how long what is missing takes; runs that were interrupted are counted in full."""
        runs = len(self.missing) + self.confirming
        images = runs * self.evaluations * scored_images(self.task)
        images += self.measurements * min(self.setup.config.samples, self.setup.train.pairs)
        cached = self.pace.cached * (self.setup.train.pairs + scored_images(self.task))
        return runs * self.steps * self.pace.step + images * self.pace.image + cached

    def to_json(self) -> dict[str, Any]:
        """What `equalize compare --dry-run --json` prints."""
        setup = self.setup
        return {
            "schema": SCHEMA,
            "dry_run": True,
            **facts_of(self.task),
            "output": self.output,
            "arms": [arm.name for arm in setup.arms],
            "lrs": list(setup.rates),
            "seeds": list(setup.seeds),
            "confirm_seeds": list(setup.confirm_seeds),
            "test": setup.test and {"split": setup.test.split, "images": len(setup.test.images)},
            "runs": [{"name": run.name, "there": run in self.finished} for run in setup.runs],
            "begun": list(self.begun),
            "missing": len(self.missing),
            "confirming": self.confirming,
            "steps": self.steps,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
            "pace": asdict(self.pace),
        }


def forecast_comparison(
    setup: Setup, out: str | Path, *, notify: Notify = ignore, warn: Notify = ignore
) -> ComparisonForecast:
    """Looks at what is finished in OUT, checks network and data, times a few steps, and writes nothing to OUT.

    Raises:
        InputError: OUT holds a comparison with other settings; or a network that cannot be compared.
    """
    runs = Runs(out, setup, write=False)
    first = setup.runs[0]
    config = setup.config_of(first)
    name = replace(setup.name, seed=first.seed)
    task = open_task(name, setup.data, config, device_of(config.device), notify, warn)
    fusion_layers(task.checkpoint, input_shape(task.checkpoint, config.size))
    missing = tuple(run for run in setup.runs if not runs.finished(run))
    confirmed = sum(runs.confirmed(seed) for seed in setup.confirm_seeds)
    starts = {(run.arm.start, run.seed) for run in missing if not runs.has_start(run)}
    confirming = len(setup.arms) * len(setup.confirm_seeds) - confirmed
    of_arms = len({arm.start for arm in setup.arms})
    return ComparisonForecast(
        setup=setup,
        task=task,
        output=str(out),
        finished=tuple(run for run in setup.runs if runs.finished(run)),
        missing=missing,
        begun=tuple(run.name for run in missing if runs.begun(run)),
        confirming=confirming,
        measurements=len(starts) + min(confirming, of_arms * len(setup.confirm_seeds)),
        pace=pace_of(task),
    )
