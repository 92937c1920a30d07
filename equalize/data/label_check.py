"""Before any training: read a sample of pairs, settle how labels are stored, and refuse what would fail later."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from equalize.data.dataset import DataSet, draw, require_masks
from equalize.data.images import Item, read_image
from equalize.data.masks import LabelRule, check_labels, read_mask
from equalize.errors import DataError, InputError

ReduceLabels = Literal["auto", "yes", "no"]

_ADE20K_CLASSES = 150


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """What a sample of the labels says.

    Attributes:
        rule: how stored values become classes; for `read_mask`.
        reason: why labels are reduced or not, for people.
        checked: how many pairs were read.
        classes: the classes seen, sorted.
    """

    rule: LabelRule
    reason: str
    checked: int
    classes: tuple[int, ...]

    def describe(self) -> str:
        """One line for people."""
        reduced = "0 ignored, the rest moved down by one" if self.rule.reduce else "labels as stored"
        return f"{self.checked} pairs checked, {len(self.classes)} classes seen, {reduced} ({self.reason})"


def preflight(
    dataset: DataSet,
    num_classes: int,
    *,
    ignore_index: int = 255,
    reduce_labels: ReduceLabels = "auto",
    samples: int = 64,
    seed: int = 0,
) -> Preflight:
    """Read `samples` pairs and check what training and scoring take for granted.

    Args:
        dataset: opened with labels.
        num_classes: how many classes the network has.
        ignore_index: the label that is neither trained on nor scored.
        reduce_labels: whether 0 means ignored and class c is stored as c + 1. ``auto`` says yes for ADE20K with its
            150 classes, and where the labels seen are 1 .. num_classes without a 0.
        samples: how many pairs to read.
        seed: of the sample.

    Raises:
        DataError: masks are missing; a mask is damaged, a JPEG, in colors, of another size than its image, ignored
            throughout, or has a label out of range.
        InputError: `reduce_labels` is not one of the three, or cannot be had with this `ignore_index`.
    """
    if reduce_labels not in ("auto", "yes", "no"):
        raise InputError("reduce_labels", "unknown choice", got=reduce_labels, expected="auto, yes or no")
    require_masks(dataset)
    as_stored = LabelRule(ignore_index=ignore_index, has_void=dataset.layout in ("voc", "cityscapes"))
    labels = {mask: _read_pair(image, mask, as_stored) for image, mask in draw(dataset.with_masks(), samples, seed)}

    reduce, reason = _decide(reduce_labels, dataset.layout, num_classes, set().union(*labels.values()), as_stored)
    if reduce and 0 <= ignore_index < num_classes:
        raise InputError(
            "ignore_index",
            f"would be class {ignore_index} once labels are reduced",
            remedy="leave it at 255, or set --reduce-labels no",
        )
    rule = LabelRule(ignore_index=ignore_index, has_void=as_stored.has_void, reduce=reduce)
    classes = {mask: _classes(values, rule) for mask, values in labels.items()}
    for mask, found in classes.items():
        check_labels(found, num_classes, rule, mask)
        if not found.numel():
            raise DataError(
                mask,
                "has no label that counts, every pixel is ignored",
                remedy="remove the pair, or see --ignore-index and --reduce-labels",
            )
    seen = sorted({int(value) for found in classes.values() for value in found})
    return Preflight(rule=rule, reason=reason, checked=len(labels), classes=tuple(seen))


def _read_pair(image_path: Item, mask_path: Item, rule: LabelRule) -> set[int]:
    """The labels of a mask that has the size of its image."""
    mask_HW = read_mask(mask_path, rule)
    image = read_image(image_path)
    if (image.height, image.width) != tuple(mask_HW.shape):
        raise DataError(
            mask_path,
            f"has another size than its image {image_path.name} (height x width, after EXIF rotation)",
            got=f"{mask_HW.shape[0]}x{mask_HW.shape[1]}",
            expected=f"{image.height}x{image.width}",
        )
    return set(np.unique(mask_HW.numpy()).tolist())


def _classes(values: set[int], rule: LabelRule) -> Tensor:
    """The classes that stored labels stand for, without the ignored one; (C,) int64."""
    classes = rule(torch.tensor(sorted(values), dtype=torch.int64))
    return classes[classes != rule.ignore_index]


def _decide(wanted: ReduceLabels, layout: str, num_classes: int, seen: set[int], rule: LabelRule) -> tuple[bool, str]:
    """Whether to reduce, and why."""
    if wanted != "auto":
        return wanted == "yes", f"--reduce-labels {wanted}"
    labels = seen - {rule.ignore_index}
    if layout == "ade20k" and num_classes == _ADE20K_CLASSES and rule.ignore_index not in seen:
        return True, "ADE20K stores class c as c + 1"
    if labels and min(labels) == 1 and max(labels) == num_classes:
        return True, f"labels are 1 to {num_classes}"
    # 0 .. num_classes is left to the user: the odd one may be the first (ADE20K) or the last (CamVid's "unlabelled").
    return False, f"labels are {min(labels)} to {max(labels)}" if labels else "every pixel seen is ignored"
