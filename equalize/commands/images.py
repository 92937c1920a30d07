"""The images that are run through a network: selection, size, device and precision."""

import contextlib
import itertools
import math
import random
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from equalize.checkpoint.checkpoint import Checkpoint
from equalize.checkpoint.outputs import pad_images, round_up
from equalize.commands.calibration_config import CalibrationConfig
from equalize.commands.input_check import check_input
from equalize.commands.labels import label_settings
from equalize.commands.network_input import axes_of, fit_input
from equalize.data.dataset import DataSet, open_data, sample
from equalize.data.images import Item
from equalize.data.label_check import stored_rule
from equalize.data.loader import Batches, workers_for
from equalize.data.masks import LabelRule
from equalize.device import device_of
from equalize.errors import DataError
from equalize.messages import Notify, Progress, ignore, ignore_progress
from equalize.moments.blocks import FEWEST_IMAGES, Block, Blocks, Skip

_DEFAULT_SIZE = (512, 512)
_DEFAULT_SIDE = {1: 4096, 3: 64}  # of networks of other axes than two
_MOST_IMAGES = 8
_MOST_PIXELS = 2**22  # a batch
_FEW = 4  # images that are enough to see whether the input is right
_NO_LABELS = "no masks: delta is of targets that lie in every branch alike, not of your labels"


class Images(Blocks):
    """The images that are measured: iterable as often as needed, by one process or several.

    `skipped` are those that could not be read in the pass that ran last; `about_labels` is a line on what their masks
    mean to blocks, if anything.
    """

    shared = True

    def __init__(
        self,
        dataset: DataSet,
        checkpoint: Checkpoint,
        config: CalibrationConfig,
        progress: Progress = ignore_progress,
        *,
        labels: bool = False,
    ) -> None:
        """Opens the images; with `labels` the blocks have those of the images that have masks."""
        self.dataset = dataset
        pairs = sample(list(itertools.zip_longest(dataset.images, dataset.masks)), config.samples, config.seed)
        if config.tolerance > 0:  # neighboring images are alike: a run that stops early needs a random order
            random.Random(config.seed).shuffle(pairs)
        self.paths = [image for image, _ in pairs]
        rule, self.about_labels = _rule_of(dataset, checkpoint, config) if labels else (None, "")
        self.skipped: list[Skip] = []
        self._progress = progress
        self._checkpoint, self._skip_bad = checkpoint, config.skip_bad
        self._multiple, channels = checkpoint.multiple, checkpoint.preprocess.bands
        self._size = size = config.size or checkpoint.preprocess.size
        device = device_of(config.device)
        workers = workers_for(device, config.workers)
        read = partial(
            Batches, self.paths, checkpoint.preprocess, size=size, channels=channels, skip_bad=config.skip_bad
        )
        height, width = size or _first(read(batch_size=1), self.dataset).shape[2:]
        sides = round_up((height, width), self._multiple)
        most = min(_MOST_IMAGES, max(1, _MOST_PIXELS // math.prod(sides)))  # whatever the machine: it affects rounding
        self.batch_size = config.batch_size or most
        self.shapes = ((min(self.batch_size, len(self.paths)), channels, *sides),)
        self.shape = (2, channels, *sides)  # (N, C, H, W) that a network is traced with: the first image's size
        self.pixels = len(self.paths) * math.prod(sides)
        self._batches = read(
            batch_size=self.batch_size,
            workers=workers,
            pinned=device.type == "cuda",
            masks=[mask for _, mask in pairs] if rule else [],
            rule=rule or LabelRule(),
            run=FEWEST_IMAGES,
        )
        self.between_decisions = self._batches.groups_a_run

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
                    first=self._batches.bounds(group.index)[0],
                    batches=tuple(pad_images(batch.images, self._multiple) for batch in group.batches),
                    names=[str(path) for batch in group.batches for path in batch.paths],
                    skipped=group.skipped,
                    labels=tuple(
                        pad_images(batch.labels, self._multiple, -1)
                        for batch in group.batches
                        if batch.labels is not None
                    ),
                )

    def leave_out(self, skipped: Sequence[Skip]) -> None:
        """Records images that could not be read; a DataError if they are more than the allowed share."""
        self.skipped = list(skipped)
        self._batches.check_skipped(skipped)

    @property
    def readable(self) -> int:
        """How many images there are, without those that were skipped."""
        return len(self.paths) - len(self.skipped)

    def report_skipped(self, warn: Notify) -> None:
        """Names what could not be read."""
        for path, reason in self.skipped:
            warn(f"skipped {path}: {reason}")

    def spread(self) -> list[Tensor]:
        """A few images; see `spread_images`."""
        return spread_images(self.paths, self._checkpoint, self._size, skip_bad=self._skip_bad)

    def few(self, number: int) -> Tensor:
        """The first images, `number` at most."""
        return pad_images(_first(self._batches, self.dataset)[:number], self._multiple)


def _rule_of(dataset: DataSet, checkpoint: Checkpoint, config: CalibrationConfig) -> tuple[LabelRule | None, str]:
    """How the masks are stored, None if there are none to be read; and a line about it."""
    if not dataset.pairs:
        return None, _NO_LABELS
    rule, found = stored_rule(dataset, label_settings(config, dataset, checkpoint), checkpoint.preprocess.bands)
    return rule, f"masks: {found}" if rule else f"masks: {found}, as if there were {_NO_LABELS}"


def _first(found: Batches, dataset: DataSet) -> Tensor:
    batch = next(iter(found), None)
    if batch is None:
        raise DataError(dataset.root, "holds no readable image")
    return batch.images


def open_images(
    data: str | Path,
    checkpoint: Checkpoint,
    config: CalibrationConfig,
    progress: Progress = ignore_progress,
    notify: Notify = ignore,
    *,
    labels: bool = False,
) -> tuple[Checkpoint, Images]:
    """The images that are measured, and the checkpoint with what its network takes of them; says what was found.

    A DataError if there are no images, an InputError if the network does not take them.
    """
    dataset = open_data(data, split=config.split)
    checkpoint = fit_input(checkpoint, dataset.images, config.size, notify, skip_bad=config.skip_bad)
    notify(f"preprocessing: {checkpoint.preprocess}")
    notify(f"data: {dataset.describe()}")
    images = Images(dataset, checkpoint, config, progress, labels=labels)
    if labels:
        notify(images.about_labels)
    return checkpoint, images


def fit_images(
    checkpoint: Checkpoint,
    images: Sequence[Item],
    size: tuple[int, int] | None,
    device: torch.device,
    notify: Notify,
    warn: Notify,
    *,
    skip_bad: float | None = None,
) -> Checkpoint:
    """The checkpoint, moved to `device`, with what its network takes of the images; says all that was found of it.

    Raises:
        InputError: the network does not take them.
    """
    for note in checkpoint.notes:
        notify(note)
    checkpoint.model.to(device)
    checkpoint = fit_input(checkpoint, images, size, notify, skip_bad=skip_bad)
    notify(f"preprocessing: {checkpoint.preprocess}")
    check_input(checkpoint, spread_images(images, checkpoint, size, skip_bad=skip_bad)).report(notify, warn)
    return checkpoint


def spread_images(
    images: Sequence[Item], checkpoint: Checkpoint, size: tuple[int, int] | None, *, skip_bad: float | None = None
) -> list[Tensor]:
    """A few images, (1, C, H, W) each, evenly spaced over all: neighbors are alike."""
    chosen = images[:: max(1, len(images) // _FEW)][:_FEW]
    read = Batches(
        *(chosen, checkpoint.preprocess),
        batch_size=1,
        size=size or checkpoint.preprocess.size,
        channels=checkpoint.preprocess.bands,
        skip_bad=1.0 if skip_bad else skip_bad,
    )
    return [pad_images(batch.images, checkpoint.multiple) for batch in read]


def input_shape(checkpoint: Checkpoint, size: tuple[int, int] | None) -> tuple[int, ...]:
    """What a network is traced with, (2, C, H, W) by `working_size`; fewer or more axes if it takes no images."""
    axes, sides = axes_of(checkpoint.model, size or checkpoint.preprocess.size), working_size(checkpoint, size)
    if axes.space != 2:
        return (2, axes.channels, *[_DEFAULT_SIDE[axes.space]] * axes.space)
    return (2, axes.channels, *sides)


def working_size(checkpoint: Checkpoint, size: tuple[int, int] | None) -> tuple[int, int]:
    """(H, W): the size asked for, else the checkpoint's, else 512 x 512."""
    return size or checkpoint.preprocess.size or _DEFAULT_SIZE
