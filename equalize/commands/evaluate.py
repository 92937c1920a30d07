"""How well a network segments: one streaming confusion matrix at the masks' own resolution."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from equalize.checkpoint import Checkpoint, ModelName
from equalize.commands.images import input_shape
from equalize.commands.labels import LabelledSplit, as_classes, check_split, count_classes, names_of
from equalize.data import Batches, Item, ReduceLabels, check_labels, open_data, read_mask
from equalize.data.loader import Preprocessor
from equalize.device import device_of, precision_of
from equalize.distributed import in_step, is_main, join, my_share, summed
from equalize.errors import InputError, NumericsError
from equalize.eval_mode import eval_mode
from equalize.messages import Notify, Progress, ignore, ignore_progress
from equalize.metrics import ConfusionMatrix, Score

__all__ = ["EvalConfig", "Logits", "confusion", "evaluate", "image_confusions", "sliding"]

Logits = Callable[[Tensor], Tensor]
"""(N, 3, H, W) -> (N, classes, h, w)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """How a network is scored.

    Attributes:
        split: of the data set; the validation split, else the test split, if None.
        size: (H, W) that images are brought to; the checkpoint's, else their own, if None.
        sliding_window: leave images at their own size and let a window of `size` slide over them.
        ignore_index: the label that is not scored.
        class_names: a file with names of the classes.
    """

    split: str | None = None
    size: tuple[int, int] | None = None
    sliding_window: bool = False
    ignore_index: int = 255
    reduce_labels: ReduceLabels = "auto"
    class_names: str | Path | None = None
    batch_size: int = 8
    device: str = "auto"
    precision: str = "fp32"
    workers: int = 0


def evaluate(
    name: ModelName,
    data: str | Path,
    config: EvalConfig | None = None,
    *,
    progress: Progress = ignore_progress,
    notify: Notify = ignore,
) -> Score:
    """`equalize evaluate`. Under `torchrun` every process scores its share and all return the same.

    Args:
        name: the model.
        data: a data set with masks.
        config: the split, the size and so on.
        progress: called with the images done and to do, of this process.
        notify: called with what a user should know, a line at a time.

    Raises:
        CheckpointError: the model cannot be loaded. DataError: the data cannot be scored.
        NumericsError: the network gives NaN or Inf.
    """
    config = config or EvalConfig()
    device = join(device_of(config.device))
    notify = notify if is_main() else ignore
    precision_of(config.precision, device)
    dataset = open_data(data, split=config.split, labels=True)
    checkpoint = name.load()
    checkpoint.model.to(device)
    notify(f"preprocessing: {checkpoint.preprocess}")
    size = _window(checkpoint, config) if config.sliding_window else config.size
    classes = count_classes(checkpoint, dataset, size, device)
    names = names_of(classes, dataset, checkpoint, config.class_names)
    labelled = check_split(
        dataset, classes, names, ignore_index=config.ignore_index, reduce_labels=config.reduce_labels, notify=notify
    )
    with eval_mode(checkpoint.model):
        matrix = confusion(checkpoint, labelled, config, device, progress=progress)
    return matrix.score(names)


def confusion(
    checkpoint: Checkpoint,
    labelled: LabelledSplit,
    config: EvalConfig,
    device: torch.device,
    *,
    progress: Progress = ignore_progress,
    together: Logits | None = None,
) -> ConfusionMatrix:
    """Counts every pixel of a split, summed over processes; see `image_confusions`."""
    total = ConfusionMatrix(labelled.num_classes, ignore_index=labelled.rule.ignore_index)
    mine = len(my_share(labelled.dataset.images))
    for _, counted in image_confusions(checkpoint, labelled, config, device, together=together):
        total += counted
        progress(total.images, mine)
    counts = torch.cat([total.counts_KK.flatten(), torch.tensor([total.images])])
    *pixels, images = summed(counts, device).tolist()
    total.counts_KK = torch.tensor(pixels).view_as(total.counts_KK)
    total.images = images
    return total


def image_confusions(
    checkpoint: Checkpoint,
    labelled: LabelledSplit,
    config: EvalConfig,
    device: torch.device,
    *,
    together: Logits | None = None,
) -> Iterator[tuple[Item, ConfusionMatrix]]:
    """Each image of this process's share of a split, and its own matrix.

    Args:
        checkpoint: whose model the caller has put into eval mode on `device`.
        labelled, config: what is scored, and how.
        device: where the model lies.
        together: gives the logits in place of the checkpoint where each process holds but a part of the network, so
            that all must call it equally often.
    """
    preprocess: Preprocessor = checkpoint.preprocess
    logits: Logits = together or checkpoint.logits
    size = config.size or checkpoint.preprocess.size
    if config.sliding_window:
        logits = partial(sliding, logits, _window(checkpoint, config))
        preprocess, size = replace(checkpoint.preprocess, size=None), None
    masks = dict(zip(labelled.dataset.images, labelled.dataset.masks, strict=True))
    mine = my_share(labelled.dataset.images)
    read = mine or labelled.dataset.images[:1]  # with fewer images than processes some have none to count
    found = Batches(read, preprocess, size=size, batch_size=config.batch_size, workers=config.workers)
    for batch, fresh in in_step(found, device) if together else ((batch, True) for batch in found if mine):
        with torch.no_grad(), precision_of(config.precision, device):
            scores_NKhw = as_classes(logits(batch.images.to(device))).float()
        for path, scores_Khw in zip(batch.paths, scores_NKhw, strict=True) if fresh and mine else ():
            mask = masks[path]
            assert mask is not None
            yield path, _count(scores_Khw, path, mask, labelled)


def _window(checkpoint: Checkpoint, config: EvalConfig) -> tuple[int, int]:
    height, width = input_shape(checkpoint, config.size)[2:]
    return height, width


def _count(scores_Khw: Tensor, image: Item, mask: Item, labelled: LabelledSplit) -> ConfusionMatrix:
    """One image: logits bilinearly to the mask's size, the largest wins."""
    if not scores_Khw.isfinite().all():
        raise NumericsError(image, "makes the network give NaN or Inf", remedy="use --precision fp32")
    label_HW = read_mask(mask, labelled.rule)
    check_labels(label_HW, labelled.num_classes, labelled.rule, mask)
    height, width = label_HW.shape
    scores = F.interpolate(scores_Khw[None], size=(height, width), mode="bilinear", align_corners=False)
    counted = ConfusionMatrix(labelled.num_classes, ignore_index=labelled.rule.ignore_index)
    counted.update(scores[0].argmax(dim=0), label_HW.to(scores.device))
    return counted


def sliding(logits: Logits, window: tuple[int, int], images_NCHW: Tensor) -> Tensor:
    """Logits of windows that overlap by a third, averaged where they do (mmsegmentation's `slide` mode).

    Raises:
        InputError: an image is smaller than the window.
    """
    height, width = images_NCHW.shape[2:]
    if height < window[0] or width < window[1]:
        raise InputError(
            "--sliding-window",
            "an image is smaller than the window",
            got=f"{height}x{width}",
            expected=f"at least {window[0]}x{window[1]}",
            remedy="use a smaller --size, or leave --sliding-window away",
        )
    total: Tensor | None = None
    counts = images_NCHW.new_zeros(1, 1, height, width)
    for top in _starts(height, window[0]):
        for left in _starts(width, window[1]):
            place = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            seen = logits(images_NCHW[place]).float()
            scores = F.interpolate(seen, size=window, mode="bilinear", align_corners=False)
            if total is None:
                total = scores.new_zeros(*scores.shape[:2], height, width)
            total[place] += scores
            counts[place] += 1
    assert total is not None
    return total / counts


def _starts(length: int, window: int) -> list[int]:
    """Where windows start: evenly, at most two thirds of a window apart, the last flush with the end."""
    gaps = math.ceil((length - window) / (window * 2 / 3))
    return [round(step * (length - window) / gaps) for step in range(gaps + 1)] if gaps else [0]
