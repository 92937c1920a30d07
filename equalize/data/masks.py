"""Reads a mask as one class index a pixel.

There are three numberings. *Stored* values are those in the file, or the cell of a table; palette and grayscale images
keep theirs, colors are never interpreted. A `LabelRule` turns them into *classes* 0 .. num_classes - 1 and
one *ignored* value, in this order: Cityscapes ids to train ids, the data set's own void value to the ignored one,
label 0 to the ignored one with the rest moved down by one.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from equalize.data.images import Item, open_picture
from equalize.errors import DataError

_VOID = 255
"""What Pascal VOC stores on the borders of objects, and Cityscapes' train ids where a pixel is not scored."""

_CITYSCAPES_CLASS_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Train id t is stored as the t-th of these in `_labelIds.png` (cityscapesScripts, helpers/labels.py)."""

_CITYSCAPES_IDS = 34


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelRule:
    """How stored values become classes.

    Attributes:
        ignore_index: the value of pixels that are neither trained on nor scored, before and after.
        reduce: whether 0 means ignored and class c is stored as c + 1, as in ADE20K.
        has_void: whether 255 is ignored whatever `ignore_index` is, as in Pascal VOC and Cityscapes.
    """

    ignore_index: int = 255
    reduce: bool = False
    has_void: bool = False

    def __call__(self, stored_HW: Tensor) -> Tensor:
        """Stored values (H, W) int64 -> classes or `ignore_index`, (H, W) int64."""
        ignored_HW = stored_HW == self.ignore_index
        if self.has_void:
            ignored_HW |= stored_HW == _VOID
        if self.reduce:
            ignored_HW |= stored_HW == 0
            stored_HW = stored_HW - 1
        return stored_HW.masked_fill(ignored_HW, self.ignore_index)


def read_mask(item: Item, rule: LabelRule) -> Tensor:
    """Read a mask as classes, (H, W) int64.

    Raises:
        DataError: it is missing, damaged, a JPEG (whose compression invents labels), or has colors instead of labels.
    """
    with open_picture(item) as image:
        _check_format(image, item)
        stored_HW = torch.from_numpy(np.asarray(image).astype(np.int64))
    if item.name.endswith("_gtFine_labelIds.png"):
        stored_HW = _to_train_ids(stored_HW)
    return rule(stored_HW)


def check_labels(labels_HW: Tensor, num_classes: int, rule: LabelRule, path: Item) -> None:
    """Refuse classes (H, W), made by `rule` from the mask `path`, that are neither of `num_classes` nor ignored.

    Raises:
        DataError: with the first value that is out of range, as stored in the file.
    """
    outside = labels_HW[((labels_HW < 0) | (labels_HW >= num_classes)) & (labels_HW != rule.ignore_index)]
    if outside.numel():
        first = int(rule.reduce)
        raise DataError(
            path,
            f"has label {int(outside.min()) + first}",
            expected=f"{first} to {num_classes - 1 + first} for {num_classes} classes, or the ignored"
            f" {0 if rule.reduce else rule.ignore_index}",
            remedy="see --num-classes, --ignore-index and --reduce-labels",
        )


def _check_format(image: Image.Image, item: Item) -> None:
    if image.format in {"JPEG", "MPO"}:
        raise DataError(
            item, "is a JPEG, whose compression changes labels", remedy="export the masks as PNG from their source"
        )
    if image.mode not in {"1", "L", "P"} and not image.mode.startswith("I"):
        channels = len(image.getbands())
        raise DataError(
            item,
            f"has {channels} channels ({image.mode})" if channels > 1 else "has floating-point pixels",
            expected="one label a pixel: a grayscale or palette PNG",
            remedy="convert its colors to class indices",
        )


def _to_train_ids(ids_HW: Tensor) -> Tensor:
    """Cityscapes ids -> train ids, 255 for what is not scored; other values stay and are refused later."""
    train_ids = torch.full((_CITYSCAPES_IDS,), _VOID)
    train_ids[list(_CITYSCAPES_CLASS_IDS)] = torch.arange(len(_CITYSCAPES_CLASS_IDS))
    is_id_HW = (ids_HW >= 0) & (ids_HW < _CITYSCAPES_IDS)
    return torch.where(is_id_HW, train_ids[ids_HW.clamp(0, _CITYSCAPES_IDS - 1)], ids_HW)
