"""Checks a labeled split against a network: number of classes, names, how labels are stored."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from equalize.checkpoint.checkpoint import Checkpoint
from equalize.checkpoint.outputs import pad_images
from equalize.commands.network_input import size_error
from equalize.commands.training_record import TrainingRecord
from equalize.data.bands import read_picture
from equalize.data.classes import class_names, read_class_names
from equalize.data.colors import colors_of
from equalize.data.dataset import DataSet
from equalize.data.label_check import LabelSettings, preflight
from equalize.data.masks import LabelRule
from equalize.errors import DataError
from equalize.eval_mode import eval_mode, refusing
from equalize.messages import Notify, ignore

if TYPE_CHECKING:
    from equalize.commands.calibration_config import CalibrationConfig
    from equalize.commands.evaluate import EvalConfig
    from equalize.commands.finetune.config import TrainConfig
    from equalize.commands.predict.predict import PredictConfig

Size = tuple[int, int] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LabeledSplit:
    """Pairs of images and masks, checked on a sample."""

    dataset: DataSet
    rule: LabelRule
    """How stored labels become classes."""
    num_classes: int
    """Of the network."""
    names: tuple[str, ...] | None = None
    """Of the classes, if known."""

    @property
    def left_out(self) -> int | None:
        """The class that is not scored, since it is the ignored label."""
        return self.rule.ignore_index if 0 <= self.rule.ignore_index < self.num_classes else None


def as_classes(logits_NCHW: Tensor) -> Tensor:
    """Logits (N, K, H, W) with K >= 2: a single output is that of class 1, against 0 for class 0."""
    if logits_NCHW.shape[1] > 1:
        return logits_NCHW
    return torch.cat([torch.zeros_like(logits_NCHW), logits_NCHW], dim=1)


def with_output(
    checkpoint: Checkpoint, dataset: DataSet, size: Size, device: torch.device, notify: Notify = ignore
) -> tuple[Checkpoint, int]:
    """What a run on the first image shows: the checkpoint, see `Checkpoint.with_output`, and its number of classes.

    An InputError if it does not take images of that size, or has several outputs that may be meant.
    """
    image_NCHW = first_image(checkpoint, dataset, size, device)
    height, width = image_NCHW.shape[2:]
    with refusing(partial(size_error, checkpoint, (height, width))):  # of one size, it fails at a concat or elsewhere
        checkpoint = checkpoint.with_output(image_NCHW, notify)
        with eval_mode(checkpoint.model):
            return checkpoint, as_classes(checkpoint.logits(image_NCHW)).shape[1]


def first_image(checkpoint: Checkpoint, dataset: DataSet, size: Size, device: torch.device) -> Tensor:
    """The first image, (1, C, H, W), padded to what the network takes."""
    picture = read_picture(dataset.images[0], checkpoint.preprocess.bands)
    return pad_images(checkpoint.preprocess(picture, size)[None].to(device), checkpoint.multiple)


def label_settings(
    config: "CalibrationConfig | EvalConfig | TrainConfig", dataset: DataSet, checkpoint: Checkpoint
) -> LabelSettings:
    """What a command's settings and a checkpoint say of masks."""
    return LabelSettings(
        ignore_index=config.ignore_index,
        reduce_labels=config.reduce_labels,
        reduced_before=TrainingRecord.of(checkpoint, ignore).reduced_before(checkpoint),
        colors=colors_of(dataset, config.colors),
        drawn_on=config.masks_drawn_on,
    )


def check_split(
    dataset: DataSet,
    num_classes: int,
    names: tuple[str, ...] | None,
    known: LabelSettings | LabelRule,
    *,
    channels: int = 3,
    notify: Notify = ignore,
    warn: Notify = ignore,
) -> LabeledSplit:
    """Determines how a split's labels are stored, see `preflight`, and notifies of it; `names` are the network's."""
    rule, found = preflight(dataset, num_classes, known, channels=channels, warn=warn)
    notify(f"{dataset.describe()}; {found}")
    return LabeledSplit(dataset=dataset, rule=rule, num_classes=num_classes, names=names)


def names_of(
    num_classes: int,
    dataset: DataSet,
    checkpoint: Checkpoint,
    config: "EvalConfig | PredictConfig | TrainConfig",
    *,
    trained_on: bool = False,
    warn: Notify = ignore,
) -> tuple[str, ...] | None:
    """Names for that many classes: from the file that is given, from the checkpoint, or from the data set.

    Where it is `trained_on`, the data set's go first if few of the checkpoint's are the same. `warn` gets a line where
    the two have a name for classes of different numbers. A DataError if the file names another number of classes.
    """
    if (path := config.class_names) is not None:
        names = read_class_names(path)
        if len(names) != num_classes:
            what = "names another number of classes than there are"
            raise DataError(path, what, got=len(names), expected=num_classes)
        return names
    of_data = class_names(dataset, num_classes, config.colors)
    known = [names for names in (checkpoint.classes, of_data) if names and len(names) == num_classes]
    if len(known) > 1 and (moved := _moved(*known)):
        name, here, there = moved
        what = f"{name!r} is class {there} of the data set, and class {here} of {checkpoint.source}"
        warn(f"{dataset.root}: {what}; scores and training go by the numbers in the masks")
    made_up = checkpoint.classes and checkpoint.classes[0] == "LABEL_0"  # by transformers
    alike = sum(_plain(one) == _plain(other) for one, other in zip(*known, strict=True)) if len(known) > 1 else 0
    if made_up or (trained_on and len(known) > 1 and 2 * alike < num_classes):
        known.reverse()
    return next(iter(known), None)


def _plain(name: str) -> str:
    """A name without what is spelled differently here and there."""
    return re.sub(r"[\W_]", "", name.casefold())


def _moved(mine: Sequence[str], theirs: Sequence[str]) -> tuple[str, int, int] | None:
    """The first name that two lists have, once each, at different places, and these."""
    one, other = ([_plain(name) for name in names] for names in (mine, theirs))
    shared = [place for place, name in enumerate(one) if name and one.count(name) == other.count(name) == 1]
    places = ((mine[place], place, other.index(one[place])) for place in shared)
    return next((each for each in places if each[1] != each[2]), None)
