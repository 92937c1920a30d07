"""Checks a sample of pairs before training or scoring: how labels are stored, and errors that would occur later."""

from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from equalize.data.bands import picture_size, read_picture
from equalize.data.dataset import DataSet, require_masks, sample
from equalize.data.images import Item
from equalize.data.masks import LabelRule, check_labels, read_mask
from equalize.errors import DataError, InputError

ReduceLabels = Literal["auto", "yes", "no"]

_ADE20K_CLASSES = 150


def preflight(
    dataset: DataSet,
    num_classes: int,
    *,
    ignore_index: int = 255,
    reduce_labels: ReduceLabels = "auto",
    samples: int = 64,
    seed: int = 0,
    channels: int = 3,
) -> tuple[LabelRule, str]:
    """Read a sample of pairs and check what training and scoring assume.

    Args:
        dataset: opened with labels.
        num_classes: how many classes the network has.
        ignore_index: the label that is neither trained on nor scored.
        reduce_labels: whether 0 means ignored and class c is stored as c + 1. ``auto`` says yes for ADE20K with its
            150 classes, and where the labels seen are 1 .. num_classes without a 0.
        samples, seed: how many pairs to read, at most, and which.
        channels: that the network takes.

    Returns:
        How stored values become classes, for `read_mask`; and what was found, one line for people.

    Raises:
        DataError: masks are missing; a mask is damaged, a JPEG, in colors, of another size than its image, or has a
            label out of range; every pixel of all masks is ignored.
        InputError: labels cannot be reduced with this `ignore_index`.
    """
    require_masks(dataset)
    rule = LabelRule(ignore_index=ignore_index, has_void=dataset.layout in ("voc", "cityscapes"))
    labels = {
        mask: _read_pair(image, mask, rule, channels) for image, mask in sample(dataset.with_masks(), samples, seed)
    }
    reduce, reason = _decide(reduce_labels, dataset.layout, num_classes, set().union(*labels.values()), ignore_index)
    if reduce and 0 <= ignore_index < num_classes:
        what = f"would be class {ignore_index} once labels are reduced"
        raise InputError("ignore_index", what, remedy="leave it at 255, or set --reduce-labels no")
    rule = replace(rule, reduce=reduce)
    seen: set[int] = set()
    for mask, values in labels.items():
        classes = rule(torch.tensor(sorted(values)))
        check_labels(classes, num_classes, rule, mask)
        seen.update(classes.tolist())
    seen.discard(ignore_index)
    if not seen:
        raise DataError(
            dataset.root,
            f"has no label that counts, every pixel of {len(labels)} masks is ignored",
            remedy="see --ignore-index and --reduce-labels",
        )
    meaning = "0 ignored, the rest moved down by one" if reduce else "labels as stored"
    return rule, f"{len(labels)} pairs checked, {len(seen)} classes seen, {meaning} ({reason})"


def _read_pair(image_path: Item, mask_path: Item, rule: LabelRule, channels: int) -> set[int]:
    """The labels of a mask that has the size of its image."""
    mask_HW = read_mask(mask_path, rule)
    size = picture_size(read_picture(image_path, channels))
    if size != tuple(mask_HW.shape):
        raise DataError(
            mask_path,
            f"has another size than its image {image_path.name} (height x width, after EXIF rotation)",
            got=f"{mask_HW.shape[0]}x{mask_HW.shape[1]}",
            expected=f"{size[0]}x{size[1]}",
        )
    return set(np.unique(mask_HW.numpy()).tolist())


def _decide(
    wanted: ReduceLabels, layout: str, num_classes: int, stored: set[int], ignore_index: int
) -> tuple[bool, str]:
    """Whether to reduce, and why."""
    if wanted != "auto":
        return wanted == "yes", f"--reduce-labels {wanted}"
    labels = stored - {ignore_index}
    if layout == "ade20k" and num_classes == _ADE20K_CLASSES and ignore_index not in stored:
        return True, "ADE20K stores class c as c + 1"
    if labels and min(labels) == 1 and max(labels) == num_classes:
        return True, f"labels are 1 to {num_classes}"
    # 0 .. num_classes is left to the user: the odd one may be the first (ADE20K) or the last (CamVid's "unlabelled").
    return False, f"labels are {min(labels)} to {max(labels)}" if labels else "every pixel seen is ignored"
