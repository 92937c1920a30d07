"""The splits that a training reads, checked before its first step, and the pairs it makes of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from equalize.checkpoint import Checkpoint
from equalize.commands.finetune.config import Recipe
from equalize.commands.images import input_shape
from equalize.commands.labels import Labelled, check_split, count_classes, names_of
from equalize.data import DataSet, class_names, open_data, read_class_names
from equalize.data.augment import Augment
from equalize.data.layouts import SPLIT_SYNONYMS
from equalize.data.pairs import TrainingPairs

__all__ = ["Found", "Splits", "check_splits", "crop_of", "open_splits", "training_pairs"]

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The splits as they lie on disk; `val` is None where nothing can be scored."""

    train: DataSet
    val: DataSet | None
    named_classes: int | None
    """How many classes the data set, or the user's file, names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """The splits as a given network needs them."""

    train: Labelled
    val: Labelled | None


def open_splits(data: str | Path, recipe: Recipe, say: Say) -> Found:
    """Finds the splits; says so where there is none to score.

    Raises:
        DataError: the data set has no such split, or masks are missing.
    """
    scored = open_data(data, labels=True)
    names = read_class_names(recipe.class_names) if recipe.class_names else class_names(scored)
    count = len(names) if names else None
    if scored.split is None:
        say(f"{scored.root} has no splits: every pair is trained on, none is scored")
        return Found(train=scored, val=None, named_classes=count)
    train = open_data(data, split=recipe.train_split, labels=True)
    default = Recipe().val_split
    synonyms = next((found for found in SPLIT_SYNONYMS if default in found), ())
    if recipe.val_split != default:
        return Found(train=train, val=open_data(data, split=recipe.val_split, labels=True), named_classes=count)
    if scored.split in synonyms:
        return Found(train=train, val=scored, named_classes=count)
    say(f"{scored.root} has no validation split: nothing is scored")
    return Found(train=train, val=None, named_classes=count)


def check_splits(
    checkpoint: Checkpoint, found: Found, recipe: Recipe, device: torch.device, say: Say
) -> tuple[Checkpoint, Splits]:
    """Runs the network on an image, reads a sample of each split, and gives the classes their names.

    Raises:
        InputError: the network does not take images of that size. DataError: a pair cannot be trained on.
    """
    classes = count_classes(checkpoint, found.train, crop_of(checkpoint, recipe), device)
    if found.val is not None:
        count_classes(checkpoint, found.val, recipe.size, device)
    names = names_of(classes, found.train, checkpoint, recipe.class_names)
    train = check_split(
        found.train,
        classes,
        names,
        ignore_index=recipe.ignore_index,
        reduce_labels=recipe.reduce_labels,
        say=lambda line: say(f"train: {line}"),
    )
    val = None
    if found.val is not None:
        val = check_split(
            found.val,
            classes,
            names,
            ignore_index=recipe.ignore_index,
            reduce_labels="yes" if train.rule.reduce else "no",
            say=lambda line: say(f"val: {line}"),
        )
    return checkpoint.with_names(names) if names else checkpoint, Splits(train=train, val=val)


def crop_of(checkpoint: Checkpoint, recipe: Recipe) -> tuple[int, int]:
    """(H, W) of what training sees."""
    height, width = recipe.crop or input_shape(checkpoint, recipe.size)[2:]
    return height, width


def training_pairs(checkpoint: Checkpoint, train: Labelled, recipe: Recipe) -> TrainingPairs:
    """The pairs of the training split, augmented as the recipe says."""
    augment = Augment(
        crop=crop_of(checkpoint, recipe),
        base=recipe.size or checkpoint.preprocess.size,
        ignore_index=recipe.ignore_index,
        scale=recipe.scale,
        cat_max_ratio=recipe.cat_max_ratio,
        flip=recipe.flip,
        photometric=recipe.photometric,
    )
    return TrainingPairs(train.dataset, train.rule, train.num_classes, augment, checkpoint.preprocess, seed=recipe.seed)
