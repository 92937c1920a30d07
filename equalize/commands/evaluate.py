"""Scores a segmentation network: counts pixels by label and prediction, at the masks' resolution."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from equalize.checkpoint import Checkpoint, ModelName
from equalize.commands.images import fit_images, working_size
from equalize.commands.labels import (
    LabeledSplit,
    as_classes,
    check_split,
    count_classes,
    names_of,
    with_output,
)
from equalize.commands.windows import Windows, is_large, upsampled
from equalize.data import (
    Batches,
    Item,
    ReduceLabels,
    check_labels,
    demand_same_size,
    open_data,
    picture_size,
    read_mask,
    read_picture,
)
from equalize.data.images import upright_size
from equalize.data.loader import Batch
from equalize.data.masks import DrawnOn
from equalize.device import device_of, precision_of
from equalize.distributed import in_step, is_main, join, my_share, summed
from equalize.errors import EqualizeError, InputError, NumericsError
from equalize.eval_mode import eval_mode
from equalize.messages import Notify, Progress, ignore, ignore_progress
from equalize.metrics import Score, count_pixels, score_of

Logits = Callable[[Tensor], Tensor]
"""(N, C, H, W) -> (N, classes, h, w)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """How a network is scored."""

    split: str | None = None
    """The validation split, else the test split, if None."""
    size: tuple[int, int] | None = None
    """(H, W) that images are brought to; the checkpoint's, else their own, if None."""
    sliding_window: bool = False
    """Leave images at their own size and let a window of `size` slide over them."""
    ignore_index: int | None = None
    """255 if None, unless labels are 0 and 255 alone and the network has two classes."""
    reduce_labels: ReduceLabels = "auto"
    colors: str | Path | None = None
    """A file with the colors of classes, or ``none``; one in the data if None."""
    masks_drawn_on: DrawnOn = "auto"
    """Which way up masks are whose images alone have an EXIF orientation."""
    class_names: str | Path | None = None
    """A file with names of the classes."""
    batch_size: int = 8
    device: str = "auto"
    precision: str = "fp32"
    workers: int = 0


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
    size = working_size(checkpoint, config.size) if config.sliding_window else config.size
    checkpoint = fit_images(checkpoint, dataset.images, size, device, notify, warn)
    checkpoint = with_output(checkpoint, dataset, size, device, notify)
    classes = count_classes(checkpoint, dataset, size, device)
    names = names_of(classes, dataset, checkpoint, config.class_names)
    labeled = check_split(
        *(dataset, classes, names),
        ignore_index=config.ignore_index,
        reduce_labels=config.reduce_labels,
        reduced_before=checkpoint.reduced_before,
        colors=config.colors,
        drawn_on=config.masks_drawn_on,
        channels=checkpoint.preprocess.bands,
        notify=notify,
    )
    if not (config.sliding_window or size or checkpoint.preprocess.size):
        large = sum(map(is_large, dataset.images))
        window = working_size(checkpoint, None)
        notify(f"{large} large images are scored in windows of {window[0]}x{window[1]}, see --size") if large else None
    with eval_mode(checkpoint.model):
        return score_split(checkpoint, labeled, config, device, progress=progress)


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
        labeled, config, device: the split, the settings and the device.
        together: as the checkpoint's logits, where each process holds a part of the network, so that all must call
            it equally often.
        inputs: replaces the images and masks of the split.
    """
    preprocess, size = checkpoint.preprocess, config.size or checkpoint.preprocess.size
    logits: Logits = together or checkpoint.logits
    masks = dict(labeled.dataset.with_masks())
    mine = my_share(labeled.dataset.images)
    may_be_large = size is None and together is None and inputs is None
    in_windows = [image for image in mine if config.sliding_window or (may_be_large and is_large(image))]
    if in_windows:
        window = working_size(checkpoint, config.size)
        windows = Windows(size=window, batch_size=config.batch_size, preprocess=replace(preprocess, size=None))
        with torch.no_grad(), precision_of(config.precision, device):
            yield from (
                _count_windows(windows, preprocess.bands, logits, image, masks[image], labeled, device)
                for image in in_windows
            )
        mine = [image for image in mine if image not in {*in_windows}]
    read = mine or labeled.dataset.images[:1]  # with fewer images than processes some have none to score
    found: Iterable[Batch] = Batches(
        *(read, preprocess),
        size=size,
        channels=preprocess.bands,
        batch_size=config.batch_size,
        workers=config.workers,
    )
    inputs = inputs or Inputs(batches=found, label=partial(_read_label, masks, labeled, preprocess.bands))
    for batch, fresh in (
        in_step(inputs.batches, device) if together else ((batch, True) for batch in inputs.batches if mine)
    ):
        with torch.no_grad(), precision_of(config.precision, device), _refusing(batch):
            scores_NKhw = as_classes(logits(batch.images.to(device))).float()
        for path, scores_Khw in zip(batch.paths, scores_NKhw, strict=True) if fresh and mine else ():
            label_HW = inputs.label(path)
            yield _count(upsampled(scores_Khw, label_HW.shape), label_HW, path, labeled)


@contextlib.contextmanager
def _refusing(batch: Batch) -> Iterator[None]:
    """Whatever a network raises on a size is an InputError that names an image of it; lack of memory stays as it is."""
    try:
        yield
    except (EqualizeError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        line = " ".join(str(error).split())[:160]
        if "allocate" in line:
            raise
        height, width = batch.images.shape[2:]
        what = f"has a size that the network does not take, {height}x{width} ({type(error).__name__}: {line})"
        raise InputError(batch.paths[0], what, remedy="bring all images to a size that it takes (--size)") from error


def _count_windows(
    windows: Windows,
    channels: int,
    logits: Logits,
    image: Item,
    mask: Item,
    labeled: LabeledSplit,
    device: torch.device,
) -> Tensor:
    """One image as `_count`, seen through windows."""
    picture, label_HW = read_picture(image, channels), _read_label({image: mask}, labeled, channels, image)
    strips = windows(lambda images_NCHW: as_classes(logits(images_NCHW.to(device))).float(), picture)
    return _count(strips, label_HW, image, labeled)


def _read_label(masks: Mapping[Item, Item], labeled: LabeledSplit, channels: int, image: Item) -> Tensor:
    label_HW = read_mask(masks[image], labeled.rule, image)
    size = upright_size(image) or picture_size(read_picture(image, channels))
    demand_same_size(label_HW, masks[image], size, image)
    check_labels(label_HW, labeled.num_classes, labeled.rule, masks[image])
    return label_HW


def _count(strips: Iterable[tuple[int, Tensor]], label_HW: Tensor, image: Item, labeled: LabeledSplit) -> Tensor:
    """One image, (K, K) counts: strips (K, h, W) of logits from their first row on, argmax."""
    counts_KK = torch.zeros(labeled.num_classes, labeled.num_classes, dtype=torch.int64)
    for top, scores_KhW in strips:
        if not scores_KhW.isfinite().all():
            raise NumericsError(image, "makes the network give NaN or Inf", remedy="use --precision fp32")
        label_hW = label_HW[top : top + scores_KhW.shape[1]].to(scores_KhW.device)
        ignored = labeled.rule.ignore_index
        counts_KK += count_pixels(scores_KhW.argmax(dim=0), label_hW, labeled.num_classes, ignore_index=ignored)
    return counts_KK
