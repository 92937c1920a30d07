"""The data and the network of a training, checked before its first step; its training pairs."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from equalize.checkpoint.checkpoint import Checkpoint
from equalize.checkpoint.loading import ModelName
from equalize.checkpoint.outputs import round_up
from equalize.commands.finetune.config import TrainConfig
from equalize.commands.finetune.trained_output import TrainedOutput, trained_output
from equalize.commands.images import fit_images, input_shape, working_size
from equalize.commands.labels import LabeledSplit, check_split, first_image, label_settings, names_of, with_output
from equalize.commands.scan import select_sites
from equalize.data.augment import Augment
from equalize.data.classes import OF_LAYOUTS, class_names, read_class_names
from equalize.data.dataset import DataSet, open_data
from equalize.data.naming import canonical_split
from equalize.data.pairs import TrainingPairs
from equalize.errors import CheckpointError, InputError
from equalize.messages import Notify, first_of, ignore


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A network and its data, checked against each other."""

    name: ModelName
    """The name that loads the same network again, with the same number of classes."""
    checkpoint: Checkpoint
    """Its model on `device`, its classes named."""
    train: LabeledSplit
    val: LabeledSplit | None
    """None where nothing can be scored."""
    config: TrainConfig
    """How it is trained; resolved."""
    trained: TrainedOutput
    """Which of its outputs is trained."""
    device: torch.device
    """Of this process."""
    fusion: tuple[str, ...] = ()
    """State-dict keys of the fusion layers' weights, where those learn at a rate of their own."""


def open_task(
    name: ModelName,
    data: str | Path,
    config: TrainConfig,
    device: torch.device,
    notify: Notify = ignore,
    warn: Notify = ignore,
) -> Task:
    """Finds the data, loads the model with as many classes, and checks one against the other on a sample.

    A CheckpointError, DataError or InputError says what cannot be loaded, trained on, or run at that size.
    """
    train, val = open_splits(data, config, notify, warn)
    given, colors = config.class_names, config.colors
    named = read_class_names(given) if given else class_names(train, config.num_classes, colors)
    name, checkpoint = _load_for(name, config.num_classes, len(named or ()))
    if drawn := checkpoint.newly_initialized:
        notify(f"drawn anew under seed {name.seed}: {first_of(drawn, 6)}")
    checkpoint = fit_images(checkpoint, train.images, config.size, device, notify, warn)
    crop = config.crop or working_size(checkpoint, config.size)
    checkpoint, classes = with_output(checkpoint, train, crop, device, notify)
    trained = trained_output(checkpoint, first_image(checkpoint, train, crop, device).repeat(2, 1, 1, 1))
    if config.aux_weight and (others := first_of(trained.auxiliary)):
        notify(f"the loss is that of {trained.name}, and {config.aux_weight:g} times that of {others}")
    if val is not None:
        with_output(checkpoint, val, config.size, device)  # refuses a size that the network does not take
    names = names_of(classes, train, checkpoint, config, trained_on=True, warn=warn)
    check = partial(check_split, num_classes=classes, names=names, channels=checkpoint.preprocess.bands)
    listed = named is not None and named not in OF_LAYOUTS.values()  # else as the layout has, or as it came with
    asked_for = config.num_classes is not None or listed
    few = ignore if asked_for else warn
    known = label_settings(config, train, checkpoint)
    labeled = check(train, known=known, notify=lambda line: notify(f"train: {line}"), warn=few)
    return Task(
        name=replace(name, output=checkpoint.output),
        checkpoint=checkpoint.with_names(names) if names else checkpoint,
        train=labeled,
        val=None if val is None else check(val, known=labeled.rule, notify=lambda line: notify(f"val: {line}")),
        config=config,
        trained=trained,
        device=device,
        fusion=_fusion_weights(checkpoint, config) if config.fusion_lr_mult != 1 else (),
    )


def _fusion_weights(checkpoint: Checkpoint, config: TrainConfig) -> tuple[str, ...]:
    found = select_sites(checkpoint.model, input_shape(checkpoint, config.crop or config.size)).sites
    if not found:
        raise InputError("--fusion-lr-mult", "the network has no fusion layer of resampled branches")
    return tuple(site.weight for site in found)


def open_splits(data: str | Path, config: TrainConfig, notify: Notify, warn: Notify) -> tuple[DataSet, DataSet | None]:
    """Finds the split to train on and the one to score; says so where there is none to score, or both share images.

    Raises:
        DataError: the data set has no such split, or masks are missing.
    """
    usual = TrainConfig()
    chosen = None if config.val_split == usual.val_split else config.val_split
    scored = open_data(data, split=chosen, labels=True)
    if scored.split is None and config.train_split == usual.train_split:
        notify(f"{scored.root} has no splits: every pair is trained on, none is scored")
        return scored, None
    train = open_data(data, split=config.train_split, labels=True)
    if chosen is None and canonical_split(scored.split or "") != usual.val_split:
        notify(f"{scored.root} has no validation split: nothing is scored")
        return train, None
    if shared := len({*train.images} & {*scored.images}):
        warn(f"{scored.root}: {shared} of {len(scored.images)} images that are scored are trained on as well")
    return train, scored


def _load_for(name: ModelName, given: int | None, named: int) -> tuple[ModelName, Checkpoint]:
    """The model for as many classes as are given, else named, its classifiers drawn anew if it has others; and the
    name that loads it again. For two names one output is enough.

    Raises:
        CheckpointError: more than the classifiers does not fit, and `init_missing` is false.
    """
    wanted, checkpoint = _load_with(name, given or named or None)
    drawn = checkpoint.newly_initialized
    if drawn and given is None and named == 2:
        own = name.load()
        before, after = (each.model.state_dict() for each in (own, checkpoint))
        if {before[key].shape[:1] for key in drawn if before[key].shape != after[key].shape} == {(1,)}:
            return name, own
    return wanted, checkpoint


def _load_with(name: ModelName, num_classes: int | None) -> tuple[ModelName, Checkpoint]:
    if num_classes is None:
        return name, name.load()
    wanted = replace(name, num_classes=num_classes)
    try:
        return wanted, wanted.load()
    except CheckpointError:
        if name.init_missing:
            raise
    name.load()  # complete with its own number of classes: then only classifiers can differ
    wanted = replace(wanted, init_missing=True)
    return wanted, wanted.load()


def training_pairs(task: Task) -> TrainingPairs:
    """The pairs of the training split, augmented as configured."""
    checkpoint, train, config = task.checkpoint, task.train, task.config
    augment = Augment(
        crop=config.crop or working_size(checkpoint, config.size),
        base=config.size or checkpoint.preprocess.size,
        ignore_index=config.ignored,
        scale=config.random_resize,
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
        padded=round_up(augment.crop, checkpoint.multiple),
        channels=checkpoint.preprocess.bands,
    )
