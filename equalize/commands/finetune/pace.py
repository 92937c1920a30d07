"""How fast a training goes and how much memory it takes, from a few steps and images that are really run.

They are the trainer's own steps, with the same batches, on pairs from all over the split; what they write goes to a
temporary directory that is removed.
"""

import contextlib
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from equalize.commands.finetune.callbacks import CheckpointWriter
from equalize.commands.finetune.run_directory import RunDirectory
from equalize.commands.finetune.splits import Task
from equalize.commands.finetune.trainer import SegmentationTrainer, unchanged_globals
from equalize.commands.labels import LabeledSplit
from equalize.messages import SILENT, ignore
from equalize.quiet import quiet_transformers

TIMED = 3
"""Steps; the one before them, which allocates memory and chooses kernels, is not counted."""
_NEVER = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds and bytes."""

    step: float
    """An optimizer step: the median of those timed."""
    image: float
    """To score an image, or about as long to measure it."""
    cached: float
    """To compute what the frozen backbone gives for an image, where that is stored; else 0."""
    memory: int | None
    """At the peak: of the GPU, or of the whole process; None where the system does not say."""


def pace_of(task: Task) -> Pace:
    """Runs a few steps, which change the model, and scores a few images."""
    config, device = task.config, task.device
    pairs = config.batch_size * config.accumulate * (TIMED + 1)
    short = replace(
        config, epochs=None, max_steps=TIMED + 1, eval_every=_NEVER, eval_first=None, patience=None, cache_dir=None
    )
    train, val = _some(task.train, pairs), task.val and _some(task.val, config.batch_size)
    sample = replace(task, train=train, val=val, config=replace(short, report_to=()))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory() as place, unchanged_globals(), quiet_transformers():
        began = time.perf_counter()
        trainer = SegmentationTrainer(sample, _writer(sample, Path(place)), ignore)
        cached = (time.perf_counter() - began) / train.dataset.pairs if config.cache_backbone else 0.0
        watch = _Stopwatch(device)
        trainer.add_callback(watch)
        trainer.train()
        step = statistics.median(watch.seconds())
        image = step / (config.batch_size * config.accumulate)
        if val is not None:
            if config.cache_backbone:
                trainer.evaluate()  # stores what the next one reads
            began = time.perf_counter()
            trainer.evaluate()
            _finish(device)
            image = (time.perf_counter() - began) / len(val.dataset.images)
    return Pace(step=step, image=image, cached=cached, memory=_peak_memory(device))


class _Stopwatch(TrainerCallback):  # type: ignore[misc]
    """Notes the end of every step, and keeps the trainer from scoring, saving and logging."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ends: list[float] = []

    def seconds(self) -> list[float]:
        """Of each step but the first."""
        return [end - before for before, end in zip(self._ends, self._ends[1:], strict=False)]

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        _finish(self._device)
        self._ends.append(time.perf_counter())
        self._nothing_else(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._nothing_else(control)

    @staticmethod
    def _nothing_else(control: Any) -> None:
        control.should_evaluate = control.should_save = control.should_log = False


def _some(labeled: LabeledSplit, most: int) -> LabeledSplit:
    """At most so many pairs, from all over the split."""
    pairs = labeled.dataset.with_masks()
    images, masks = zip(*pairs[:: max(1, len(pairs) // most)][:most], strict=True)
    return replace(labeled, dataset=replace(labeled.dataset, images=images, masks=masks))


def _writer(task: Task, place: Path) -> CheckpointWriter:
    return CheckpointWriter(
        checkpoint=task.checkpoint,
        run=RunDirectory(place, None, resume=False, overwrite=True),
        plan=None,
        facts={},
        monitor=SILENT,
        models=False,
    )


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(ImportError):  # Windows has none
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None
