"""The images that are run through a network: selection, size, device and precision."""

import contextlib
import math
import os
import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from equalize.checkpoint import Checkpoint
from equalize.data import Batches, DataSet, ReduceLabels, open_data, sample, stored_rule
from equalize.device import device_of
from equalize.errors import DataError
from equalize.messages import Progress, ignore_progress
from equalize.moments.blocks import Block, Blocks, Skip

_DEFAULT_SIZE = (512, 512)
_MOST_IMAGES = 8
_MOST_PIXELS = 2**22  # a batch
_MOST_WORKERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationConfig:
    """Which images are measured, and how."""

    samples: int | None = 256
    """How many are drawn; None for all."""
    tolerance: float | None = None
    """Stop when the 95 % interval of every sigma is this tight."""
    size: tuple[int, int] | None = None
    """(H, W) that images are brought to; the checkpoint's own if None."""
    split: str | None = None
    batch_size: int | None = None
    """None for at most 8 images, and at most 4 megapixels."""
    device: str = "auto"
    precision: str = "fp32"
    workers: int | None = None
    """Processes that read images; None for a few where there is an accelerator, else none."""
    skip_bad: float = 0.0
    """Share of the images that may be unreadable."""
    ignore_index: int = 255
    """The label of pixels that do not count."""
    reduce_labels: ReduceLabels = "auto"
    """Whether those of label 0 do not count either."""
    seed: int = 0


NO_LABELS = "no masks: delta is of targets that lie in every branch alike, not of your labels"
"""What is said where the indicator has no labels."""


class Images(Blocks):
    """The images that are measured: iterable as often as needed, by one process or several.

    `skipped` are those that could not be read in the pass that ran last; `labeled` says whether blocks have labels.
    """

    shared = True

    def __init__(
        self,
        data: str | Path,
        checkpoint: Checkpoint,
        config: CalibrationConfig,
        progress: Progress = ignore_progress,
        *,
        labels: bool = False,
    ) -> None:
        """Opens the data; with `labels` the blocks have those of the images that have masks."""
        self.dataset: DataSet = open_data(data, split=config.split)
        pairs = sample(self.dataset.pairs_of_images, config.samples, config.seed)
        if config.tolerance is not None:  # neighboring images are alike: a run that stops early needs a random order
            random.Random(config.seed).shuffle(pairs)
        self.paths = [image for image, _ in pairs]
        self.labeled = labels and any(mask is not None for _, mask in pairs)
        masks = [mask for _, mask in pairs] if self.labeled else []
        self.skipped: list[Skip] = []
        self._progress = progress
        size = config.size or checkpoint.preprocess.size
        device = device_of(config.device)
        workers = _workers(device) if config.workers is None else config.workers
        read = partial(Batches, self.paths, checkpoint.preprocess, size=size, skip_bad=config.skip_bad)
        sides = size or _first(read(batch_size=1), self.dataset).shape[2:]
        self.batch_size = config.batch_size or _batch_size(sides)
        self.shapes = ((min(self.batch_size, len(self.paths)), 3, *sides),)
        self.shape = (2, 3, *sides)  # (N, C, H, W) that a network is traced with: the first image's size
        self.pixels = len(self.paths) * math.prod(sides)
        self._batches = read(
            batch_size=self.batch_size,
            workers=workers,
            pinned=device.type == "cuda",
            masks=masks,
            rule=stored_rule(self.dataset, config.ignore_index, config.reduce_labels),
        )

    def number(self) -> int:
        """The number of blocks."""
        return len(self._batches)

    def read(self, first: int = 0, step: int = 1) -> Generator[Block, None, None]:
        """The blocks `first`, `first + step`, ..."""
        done = 0
        with contextlib.closing(self._batches.groups(first, step)) as groups:
            for group in groups:
                done += sum(len(batch.paths) for batch in group.batches)
                self._progress(min(done * step, len(self.paths)), len(self.paths))  # the other processes are as far
                yield Block(
                    index=group.index,
                    first=group.index * self._batches.group_size,
                    batches=tuple(batch.images for batch in group.batches),
                    names=[str(path) for batch in group.batches for path in batch.paths],
                    skipped=group.skipped,
                    labels=tuple(batch.labels for batch in group.batches if batch.labels is not None),
                )

    def leave_out(self, skipped: Sequence[Skip]) -> None:
        """Records images that could not be read; a DataError if they are more than the allowed share."""
        self.skipped = list(skipped)
        self._batches.check_skipped(skipped)

    def few(self, number: int) -> Tensor:
        """The first images, `number` at most."""
        return _first(self._batches, self.dataset)[:number]


def _first(found: Batches, dataset: DataSet) -> Tensor:
    batch = next(iter(found), None)
    if batch is None:
        raise DataError(dataset.root, "holds no readable image")
    return batch.images


def _batch_size(sides: Sequence[int]) -> int:
    """The batch size: independent of the machine, as it affects rounding."""
    return min(_MOST_IMAGES, max(1, _MOST_PIXELS // math.prod(sides)))


def _workers(device: torch.device) -> int:
    """The number of reading processes; none on a CPU, where reading takes a few percent of the time."""
    if device.type != "cuda":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(_MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


def input_shape(checkpoint: Checkpoint, size: tuple[int, int] | None) -> tuple[int, ...]:
    """What a network is traced with, (2, 3, H, W); see `working_size`."""
    return (2, 3, *working_size(checkpoint, size))


def working_size(checkpoint: Checkpoint, size: tuple[int, int] | None) -> tuple[int, int]:
    """(H, W): the size asked for, else the checkpoint's, else 512 x 512."""
    return size or checkpoint.preprocess.size or _DEFAULT_SIZE
