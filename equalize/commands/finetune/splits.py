"""The data and the network of a training, checked before its first step, and the pairs that it sees."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from equalize.checkpoint import Checkpoint, ModelName
from equalize.commands.finetune.config import TrainConfig
from equalize.commands.images import input_shape
from equalize.commands.labels import LabelledSplit, check_split, count_classes, names_of
from equalize.data import DataSet, ReduceLabels, class_names, open_data, read_class_names
from equalize.data.augment import Augment
from equalize.data.layouts import SPLIT_SYNONYMS
from equalize.data.pairs import TrainingPairs
from equalize.errors import CheckpointError
from equalize.messages import Notify

__all__ = ["OpenedSplits", "Splits", "Task", "check_splits", "open_splits", "open_task", "training_pairs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedSplits:
    """The splits as they lie on disk; `val` is None where nothing can be scored."""

    train: DataSet
    val: DataSet | None
    named_classes: int | None
    """How many classes the data set, or the user's file, names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """The splits as a given network needs them."""

    train: LabelledSplit
    val: LabelledSplit | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is trained on what, checked against each other.

    Attributes:
        name: under which the same network loads again, with as many classes.
        checkpoint: its model on `device`, its classes named.
        splits: as the network needs them.
        config: how it is trained; resolved.
        device: of this process.
    """

    name: ModelName
    checkpoint: Checkpoint
    splits: Splits
    config: TrainConfig
    device: torch.device


def open_task(name: ModelName, data: str | Path, config: TrainConfig, device: torch.device, notify: Notify) -> Task:
    """Finds the data, loads the model with as many classes, and checks one against the other.

    Raises:
        CheckpointError: the model cannot be loaded. DataError: the data cannot be trained on.
    """
    found = open_splits(data, config, notify)
    name, checkpoint = _load_for(name, config.num_classes or found.named_classes)
    notify(f"preprocessing: {checkpoint.preprocess}")
    if drawn := checkpoint.newly_initialized:  # all of a few keys, those of a classifier; the first of a decoder's many
        listed = ", ".join(drawn) if len(drawn) <= 6 else f"{len(drawn)} tensors ({', '.join(drawn[:3])} and others)"
        notify(f"drawn anew under seed {name.seed}: {listed}")
    checkpoint.model.to(device)
    checkpoint, splits = check_splits(checkpoint, found, config, device, notify)
    return Task(name=name, checkpoint=checkpoint, splits=splits, config=config, device=device)


def open_splits(data: str | Path, config: TrainConfig, notify: Notify) -> OpenedSplits:
    """Finds the splits; says so where there is none to score.

    Raises:
        DataError: the data set has no such split, or masks are missing.
    """
    scored = open_data(data, labels=True)
    names = read_class_names(config.class_names) if config.class_names else class_names(scored)
    train, val = scored, None
    if scored.split is None:
        notify(f"{scored.root} has no splits: every pair is trained on, none is scored")
    else:
        train = open_data(data, split=config.train_split, labels=True)
        default = TrainConfig().val_split
        if config.val_split != default:
            val = open_data(data, split=config.val_split, labels=True)
        elif scored.split in next((names for names in SPLIT_SYNONYMS if default in names), ()):
            val = scored
        else:
            notify(f"{scored.root} has no validation split: nothing is scored")
    return OpenedSplits(train=train, val=val, named_classes=len(names) if names else None)


def _load_for(name: ModelName, num_classes: int | None) -> tuple[ModelName, Checkpoint]:
    """Loads a model for that many classes, its classifiers drawn anew if it has others; as it is for None.

    Returns:
        The name under which the same model loads again, and the model; `drawn` tells the classifiers' keys.

    Raises:
        CheckpointError: more than the classifiers does not fit, and `init_missing` was not asked for.
    """
    if num_classes is None:
        return name, name.load()
    wanted = replace(name, num_classes=num_classes)
    try:
        return wanted, wanted.load()
    except CheckpointError:
        if name.init_missing:
            raise
    name.load()  # whole under its own number of classes: then only classifiers can differ
    wanted = replace(wanted, init_missing=True)
    return wanted, wanted.load()


def check_splits(
    checkpoint: Checkpoint, found: OpenedSplits, config: TrainConfig, device: torch.device, notify: Notify
) -> tuple[Checkpoint, Splits]:
    """Runs the network on an image, reads a sample of each split, and gives the classes their names.

    Raises:
        InputError: the network does not take images of that size. DataError: a pair cannot be trained on.
    """
    classes = count_classes(checkpoint, found.train, _crop(checkpoint, config), device)
    if found.val is not None:
        count_classes(checkpoint, found.val, config.size, device)
    names = names_of(classes, found.train, checkpoint, config.class_names)

    def check(what: str, dataset: DataSet, reduce_labels: ReduceLabels) -> LabelledSplit:
        return check_split(
            dataset,
            classes,
            names,
            ignore_index=config.ignore_index,
            reduce_labels=reduce_labels,
            notify=lambda line: notify(f"{what}: {line}"),
        )

    train = check("train", found.train, config.reduce_labels)
    val = None if found.val is None else check("val", found.val, "yes" if train.rule.reduce else "no")
    return checkpoint.with_names(names) if names else checkpoint, Splits(train=train, val=val)


def training_pairs(task: Task) -> TrainingPairs:
    """The pairs of the training split, augmented as configured."""
    checkpoint, train, config = task.checkpoint, task.splits.train, task.config
    augment = Augment(
        crop=_crop(checkpoint, config),
        base=config.size or checkpoint.preprocess.size,
        ignore_index=config.ignore_index,
        scale=config.scale,
        cat_max_ratio=config.cat_max_ratio,
        flip=config.flip,
        photometric=config.photometric,
    )
    return TrainingPairs(
        pairs=train.dataset.with_masks(),
        rule=train.rule,
        num_classes=train.num_classes,
        augment=augment,
        preprocess=checkpoint.preprocess,
        seed=config.seed,
    )


def _crop(checkpoint: Checkpoint, config: TrainConfig) -> tuple[int, int]:
    """(H, W) of what training sees."""
    height, width = config.crop or input_shape(checkpoint, config.size)[2:]
    return height, width
