"""Scores a segmentation network: counts pixels by label and prediction, at the masks' resolution."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from equalize.checkpoint.checkpoint import Checkpoint
from equalize.checkpoint.loading import ModelName
from equalize.commands.forward import Forward, ForwardConfig, Logits, predicted, trial_size
from equalize.commands.images import fit_images
from equalize.commands.labels import LabeledSplit, check_split, label_settings, names_of, with_output
from equalize.commands.training_record import TrainingRecord, settings_taken
from equalize.commands.windows import Strips, upsampled
from equalize.data.bands import picture_size, read_picture
from equalize.data.dataset import open_data
from equalize.data.images import Item, upright_size
from equalize.data.label_check import ReduceLabels
from equalize.data.loader import Batch
from equalize.data.masks import DrawnOn, check_labels, demand_same_size, read_mask
from equalize.device import device_of, precision_of
from equalize.distributed import in_step, is_main, join, my_share, summed
from equalize.eval_mode import eval_mode
from equalize.messages import Notify, Progress, ignore, ignore_progress
from equalize.metrics import Score, count_pixels, score_of


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig(ForwardConfig):
    """How a network is scored."""

    split: str | None = None
    """The validation split, else the test split, if None."""
    ignore_index: int | None = None
    """255 if None, unless labels are 0 and 255 alone and the network has two classes."""
    reduce_labels: ReduceLabels = "auto"
    colors: str | Path | None = None
    """A file with the colors of classes, or ``none``; one in the data if None."""
    masks_drawn_on: DrawnOn = "auto"
    """Which way up masks are whose images alone have an EXIF orientation."""
    class_names: str | Path | None = None
    """A file with names of the classes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a network is scored on, in place of files: this process's images in batches, and the label of an image."""

    batches: Iterable[Batch]
    label: Callable[[Item], Tensor]
    """Classes or the ignored value, (H, W) int64, at the mask's own size."""


def evaluate(
    name: ModelName,
    data: str | Path,
    config: EvalConfig | None = None,
    *,
    progress: Progress = ignore_progress,
    notify: Notify = ignore,
    warn: Notify = ignore,
) -> Score:
    """`equalize evaluate`. Under `torchrun` every process scores its share and all return the same.

    Raises:
        CheckpointError: the model cannot be loaded. DataError: the data cannot be scored.
        NumericsError: the network gives NaN or Inf.
    """
    config = config or EvalConfig()
    device = join(device_of(config.device))
    notify, warn = (notify, warn) if is_main() else (ignore, ignore)
    precision_of(config.precision, device)
    dataset = open_data(data, split=config.split, labels=True)
    checkpoint = name.load()
    config = _as_trained(config, TrainingRecord.of(checkpoint, notify), checkpoint, notify)
    size = trial_size(checkpoint, config, dataset.images)
    checkpoint = fit_images(checkpoint, dataset.images, size, device, notify, warn)
    checkpoint, classes = with_output(checkpoint, dataset, size, device, notify)
    names = names_of(classes, dataset, checkpoint, config, warn=warn)
    known, bands = label_settings(config, dataset, checkpoint), checkpoint.preprocess.bands
    labeled = check_split(dataset, classes, names, known, channels=bands, notify=notify, warn=warn)
    Forward(checkpoint=checkpoint, config=config, device=device).tell_windows(dataset.images, notify)
    with eval_mode(checkpoint.model):
        return score_split(checkpoint, labeled, config, device, progress=progress)


def _as_trained(config: EvalConfig, record: TrainingRecord, checkpoint: Checkpoint, notify: Notify) -> EvalConfig:
    """The settings with those of the training where none are given; says what it takes, and what contradicts it."""
    reduced = {True: "yes", False: "no", None: "auto"}[record.reduce_labels]
    trained = {"size": record.size, "ignore_index": record.ignore_index, "colors": record.colors}
    trained |= {"masks_drawn_on": record.masks_drawn_on, "reduce_labels": reduced}
    taken = settings_taken(config, trained, {"size": checkpoint.preprocess.size, "ignore_index": 255}, notify)
    return replace(config, **taken)


def score_split(
    checkpoint: Checkpoint,
    labeled: LabeledSplit,
    config: EvalConfig,
    device: torch.device,
    *,
    progress: Progress = ignore_progress,
    together: Logits | None = None,
    inputs: Inputs | None = None,
) -> Score:
    """Scores a split, counted by all processes together; see `count_images`."""
    total = torch.zeros(labeled.num_classes, labeled.num_classes, dtype=torch.int64)
    mine = len(my_share(labeled.dataset.images))
    found = count_images(checkpoint, labeled, config, device, together=together, inputs=inputs)
    for done, counts_KK in enumerate(found, 1):
        total += counts_KK
        progress(done, mine)
    return score_of(summed(total, device), len(labeled.dataset.images), labeled.names, labeled.left_out)


def count_images(
    checkpoint: Checkpoint,
    labeled: LabeledSplit,
    config: EvalConfig,
    device: torch.device,
    *,
    together: Logits | None = None,
    inputs: Inputs | None = None,
) -> Iterator[Tensor]:
    """For each image of this process's share its pixels by label and prediction, (K, K); see `count_pixels`.

    Args:
        checkpoint: whose model the caller has put into eval mode on `device`.
        together: as the checkpoint's logits, where each process holds a part of the network, so that all must call
            it equally often.
        inputs: replaces the images and masks of the split.
    """
    forward = Forward(checkpoint=checkpoint, config=config, device=device)
    channels = checkpoint.preprocess.bands
    masks = dict(labeled.dataset.with_masks())
    mine = my_share(labeled.dataset.images)
    for_windows = [] if together or inputs else forward.for_windows(mine)
    for image in for_windows:
        label_HW = _read_label(masks, labeled, channels, image)
        yield _count(forward.in_windows(image, read_picture(image, channels)), label_HW, image, labeled)
    if for_windows:
        mine = [image for image in mine if image not in {*for_windows}]
    if not (mine or together):
        return
    read = mine or labeled.dataset.images[:1]  # with fewer images than processes some have none to score
    inputs = inputs or Inputs(batches=forward.batches(read), label=partial(_read_label, masks, labeled, channels))
    for batch, fresh in in_step(inputs.batches, device) if together else ((batch, True) for batch in inputs.batches):
        scores_NKhw = forward.of_batch(batch, together)
        for path, scores_Khw in zip(batch.paths, scores_NKhw, strict=True) if fresh and mine else ():
            label_HW = inputs.label(path)
            yield _count(upsampled(scores_Khw, label_HW.shape), label_HW, path, labeled)


def _read_label(masks: Mapping[Item, Item], labeled: LabeledSplit, channels: int, image: Item) -> Tensor:
    label_HW = read_mask(masks[image], labeled.rule, image)
    size = upright_size(image) or picture_size(read_picture(image, channels))
    demand_same_size(label_HW, masks[image], size, image)
    check_labels(label_HW, labeled.num_classes, labeled.rule, masks[image])
    return label_HW


def _count(strips: Strips, label_HW: Tensor, image: Item, labeled: LabeledSplit) -> Tensor:
    """One image, (K, K) counts, by strips of its logits."""
    counts_KK = torch.zeros(labeled.num_classes, labeled.num_classes, dtype=torch.int64)
    for top, classes_hW in predicted(strips, image):
        label_hW = label_HW[top : top + len(classes_hW)].to(classes_hW.device)
        ignored = labeled.rule.ignore_index
        counts_KK += count_pixels(classes_hW, label_hW, labeled.num_classes, ignore_index=ignored)
    return counts_KK
