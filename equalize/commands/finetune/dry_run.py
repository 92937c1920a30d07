"""`equalize finetune --dry-run`: what would be trained, and about how long it takes."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from equalize.checkpoint.loading import ModelName
from equalize.commands.finetune.config import TrainConfig
from equalize.commands.finetune.config_file import Subject
from equalize.commands.finetune.finetune import (
    attach_plan,
    identity_of,
    open_run,
    plan_in_effect,
    refuse_early,
    training_device,
)
from equalize.commands.finetune.pace import Pace, pace_of
from equalize.commands.finetune.sharding import check_launch
from equalize.commands.finetune.splits import Task, open_task
from equalize.commands.images import input_shape, working_size
from equalize.commands.scan import select_sites
from equalize.distributed import is_main, join, rank_and_number
from equalize.messages import SILENT, Notify, first_of, ignore
from equalize.plan.plan import SCHEMA


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingForecast:
    """A training before its first step."""

    task: Task
    output: str
    strategy: str | None
    """Of the equalization that is in effect or comes first."""
    train_as: str | None
    first_step: int
    """The step that a resumed training goes on after, else 0."""
    steps: int
    """In all, as `epochs` and `evaluations`."""
    epochs: float
    evaluations: int
    measured: int
    """Images that are measured before the first step."""
    pace: Pace

    @property
    def seconds(self) -> float:
        """About how long what is left takes; without the writing of weights."""
        left = 1 - self.first_step / self.steps
        images = self.measured + left * self.evaluations * scored_images(self.task)
        cached = self.pace.cached * (self.task.train.dataset.pairs + scored_images(self.task))
        return left * self.steps * self.pace.step + images * self.pace.image + cached

    def to_json(self) -> dict[str, Any]:
        """What `equalize finetune --dry-run --json` prints."""
        config = self.task.config
        return {
            "schema": SCHEMA,
            "dry_run": True,
            **facts_of(self.task),
            "output": self.output,
            "strategy": self.strategy,
            "train_as": self.train_as,
            "steps": self.steps,
            "first_step": self.first_step,
            "epochs": self.epochs,
            "evaluations": self.evaluations,
            "seed": config.seed,
            "lr": config.peak_lr,
            "seconds": self.seconds,
            "pace": asdict(self.pace),
        }


def forecast_training(
    name: ModelName,
    data: str | Path,
    out: str | Path,
    config: TrainConfig | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    notify: Notify = ignore,
    warn: Notify = ignore,
) -> TrainingForecast:
    """Checks everything as `finetune` does, times a few steps, and writes nothing to `out`.

    Raises:
        InputError: something cannot be trained with.
    """
    config = (config or TrainConfig()).resolved()
    run = open_run(name, data, out, config, resume=resume, overwrite=overwrite)
    device = join(training_device(config))
    if not is_main():
        notify = warn = ignore
    check_launch(device, notify)
    task = open_task(name, data, config, device, notify, warn)
    refuse_early(task, will_have_plan=config.calibrate is not None)
    plan = None if config.calibrate else plan_in_effect(task, run, SILENT, notify, warn)
    if run.resumed:
        run.demand_resumable(identity_of(task, Subject.of(name, data)), notify)
    pairs = task.train.dataset.pairs
    steps, an_epoch = steps_of(config, pairs), steps_of(config, pairs, epochs=1)
    first = min(steps, run.newest_step()) if run.resumed else 0
    train_as = attach_plan(plan, config.train_as, task.checkpoint, notify)
    if config.calibrate:
        train_as = config.train_as or "explicit"
        found = select_sites(task.checkpoint.model, input_shape(task.checkpoint, config.size)).sites
        notify(f"fusion layers that are measured first: {first_of([site.layer for site in found]) or 'none'}")
    return TrainingForecast(
        task=task,
        output=str(out),
        strategy=config.calibrate or (plan.strategy if plan else None),
        train_as=train_as,
        first_step=first,
        steps=steps,
        epochs=round(steps / an_epoch, 2),
        evaluations=evaluations_of(config, steps, an_epoch) if task.val else 0,
        measured=min(config.samples, pairs) if config.calibrate and not first else 0,
        pace=pace_of(task),
    )


def steps_of(config: TrainConfig, pairs: int, epochs: int | None = None) -> int:
    """Optimizer steps of a training on so many pairs, as the trainer counts them; or of `epochs`."""
    if config.max_steps and epochs is None:
        return config.max_steps
    a_batch = config.batch_size * rank_and_number()[1]
    batches = max(1, pairs // a_batch)  # the last one is dropped if it is not full
    return (epochs or config.epochs or 1) * -(-batches // config.accumulate)


def evaluations_of(config: TrainConfig, steps: int, an_epoch: int) -> int:
    """How often a training is scored: every so many steps, after the last one, and once more after `eval_first`."""
    every = config.eval_every or an_epoch
    scored = {*range(every, steps + 1, every), steps}
    return len(scored | {config.eval_first} - {None})


def scored_images(task: Task) -> int:
    """Images of an evaluation."""
    return len(task.val.dataset.images) if task.val else 0


def facts_of(task: Task) -> dict[str, Any]:
    """Model, data, classes and what a step is made of."""
    config, train, val = task.config, task.train, task.val
    crop = config.crop or working_size(task.checkpoint, config.size)
    return {
        "source": task.name.source,
        "architecture": task.checkpoint.architecture,
        "drawn": list(task.checkpoint.newly_initialized),
        "data": str(train.dataset.root),
        "train": {"split": train.dataset.split, "pairs": train.dataset.pairs},
        "val": val and {"split": val.dataset.split, "images": len(val.dataset.images)},
        "classes": train.num_classes,
        "class_names": None if train.names is None else list(train.names),
        "batch_size": config.batch_size,
        "accumulate": config.accumulate,
        "optimizer": config.optimizer,
        "crop": list(crop),
        "precision": config.precision,
        "device": str(task.device),
    }
