"""Scores a segmentation network: counts pixels by label and prediction, at the masks' resolution."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from equalize.checkpoint import Checkpoint, ModelName
from equalize.commands.images import spread_images, working_size
from equalize.commands.input_check import check_input
from equalize.commands.labels import LabeledSplit, as_classes, check_split, count_classes, names_of
from equalize.commands.network_input import fit_input
from equalize.data import Batches, Item, ReduceLabels, check_labels, open_data, read_mask
from equalize.data.loader import Batch
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
    ignore_index: int = 255
    reduce_labels: ReduceLabels = "auto"
    class_names: str | Path | None = None
    """A file with names of the classes."""
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
    checkpoint.model.to(device)
    size = working_size(checkpoint, config.size) if config.sliding_window else config.size
    checkpoint = fit_input(checkpoint, dataset.images, size, notify)
    notify(f"preprocessing: {checkpoint.preprocess}")
    check_input(checkpoint, spread_images(dataset.images, checkpoint, size)).report(notify, warn)
    classes = count_classes(checkpoint, dataset, size, device)
    names = names_of(classes, dataset, checkpoint, config.class_names)
    labeled = check_split(
        *(dataset, classes, names),
        ignore_index=config.ignore_index,
        reduce_labels=config.reduce_labels,
        channels=checkpoint.preprocess.bands,
        notify=notify,
    )
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
) -> Score:
    """Scores a split, counted by all processes together; see `count_images`."""
    total = torch.zeros(labeled.num_classes, labeled.num_classes, dtype=torch.int64)
    mine = len(my_share(labeled.dataset.images))
    for done, counts_KK in enumerate(count_images(checkpoint, labeled, config, device, together=together), 1):
        total += counts_KK
        progress(done, mine)
    return score_of(summed(total, device), len(labeled.dataset.images), labeled.names)


def count_images(
    checkpoint: Checkpoint,
    labeled: LabeledSplit,
    config: EvalConfig,
    device: torch.device,
    *,
    together: Logits | None = None,
) -> Iterator[Tensor]:
    """For each image of this process's share its pixels by label and prediction, (K, K); see `count_pixels`.

    Args:
        checkpoint: whose model the caller has put into eval mode on `device`.
        labeled, config, device: the split, the settings and the device.
        together: as the checkpoint's logits, where each process holds a part of the network, so that all must call
            it equally often.
    """
    preprocess, size = checkpoint.preprocess, config.size or checkpoint.preprocess.size
    logits: Logits = together or checkpoint.logits
    if config.sliding_window:
        logits = partial(sliding, logits, working_size(checkpoint, config.size))
        preprocess, size = replace(preprocess, size=None), None
    masks = dict(labeled.dataset.with_masks())
    mine = my_share(labeled.dataset.images)
    read = mine or labeled.dataset.images[:1]  # with fewer images than processes some have none to score
    found: Iterable[Batch] = Batches(
        *(read, preprocess),
        size=size,
        channels=preprocess.bands,
        batch_size=config.batch_size,
        workers=config.workers,
    )
    for batch, fresh in in_step(found, device) if together else ((batch, True) for batch in found if mine):
        with torch.no_grad(), precision_of(config.precision, device), _refusing(batch):
            scores_NKhw = as_classes(logits(batch.images.to(device))).float()
        for path, scores_Khw in zip(batch.paths, scores_NKhw, strict=True) if fresh and mine else ():
            yield _count(scores_Khw, path, masks[path], labeled)


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


def _count(scores_Khw: Tensor, image: Item, mask: Item, labeled: LabeledSplit) -> Tensor:
    """One image, (K, K) counts: logits resized bilinearly to the mask's size, then argmax."""
    if not scores_Khw.isfinite().all():
        raise NumericsError(image, "makes the network give NaN or Inf", remedy="use --precision fp32")
    rule, classes = labeled.rule, labeled.num_classes
    label_HW = read_mask(mask, rule)
    check_labels(label_HW, classes, rule, mask)
    height, width = label_HW.shape
    scores = F.interpolate(scores_Khw[None], size=(height, width), mode="bilinear", align_corners=False)
    label_HW = label_HW.to(scores.device)
    return count_pixels(scores[0].argmax(dim=0), label_HW, classes, ignore_index=rule.ignore_index)


def sliding(logits: Logits, window: tuple[int, int], images_NCHW: Tensor) -> Tensor:
    """Logits of windows that overlap by a third, averaged where they do (mmsegmentation's `slide` mode).

    images_NCHW (N, C, H, W) -> (N, classes, H, W).

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
