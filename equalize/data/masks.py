"""Reads a mask as one class index a pixel.

There are three numberings. *Stored* values are those in the file, or the cell of a table; palette and grayscale images
keep theirs, also where gray is stored in three equal channels; colors become the classes that a `ColorMap` names. A
`LabelRule` turns them into *classes* 0 .. num_classes - 1 and one *ignored* value, in this order: Cityscapes ids to
train ids, the data set's own void value to the ignored one, label 0 to the ignored one with the rest moved down by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from equalize.data.colors import COLOR_FILES, ColorMap
from equalize.data.images import (
    ORIENTATION,
    QUARTER_TURNS,
    TURNS,
    Item,
    load_array,
    open_picture,
    orientation,
    upright_size,
)
from equalize.errors import DataError

_VOID = 255
"""What Pascal VOC stores on the borders of objects, and Cityscapes' train ids where a pixel is not scored."""

_CITYSCAPES_CLASS_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Train id t is stored as the t-th of these in `_labelIds.png` (cityscapesScripts, helpers/labels.py)."""

_CITYSCAPES_IDS = 34

DrawnOn = Literal["auto", "upright", "stored"]

_EDGE_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelRule:
    """How stored values become classes.

    Attributes:
        ignore_index: the value of pixels that are neither trained on nor scored, before and after.
        reduce: whether 0 means ignored and class c is stored as c + 1, as in ADE20K.
        has_void: whether 255 (and what is below 0) is ignored too, as in Pascal VOC and Cityscapes.
        foreground: the value, 255 or 65535, that is class 1 where only 0 is stored beside it; 0 if none is.
        colors: the classes of colors, where masks have colors.
        drawn_on: where an image has an EXIF orientation and its mask none: whether the mask shows the ``upright`` image
            or its pixels as ``stored``; ``auto`` goes by their sides, and refuses where these say nothing.
    """

    ignore_index: int = 255
    reduce: bool = False
    has_void: bool = False
    foreground: int = 0
    colors: ColorMap | None = None
    drawn_on: DrawnOn = "auto"

    def __call__(self, stored_HW: Tensor) -> Tensor:
        """Stored values (H, W) int64 -> classes or `ignore_index`, (H, W) int64."""
        if self.foreground:
            return (stored_HW == self.foreground).long()
        ignored_HW = stored_HW == self.ignore_index
        if self.has_void:
            ignored_HW |= (stored_HW == _VOID) | (stored_HW < 0)
        if self.reduce:
            ignored_HW |= stored_HW == 0
            stored_HW = stored_HW - 1
        return stored_HW.masked_fill(ignored_HW, self.ignore_index)


def read_mask(item: Item, rule: LabelRule, image: Item | None = None) -> Tensor:
    """Read a mask as classes, (H, W) int64, upright as its image; raises what the steps raise that it takes."""
    stored_HW = read_stored(item, rule)
    if image is not None:
        stored_HW = make_upright(stored_HW, item, image, rule.drawn_on)
    return to_classes(stored_HW, rule, item)


def make_upright(stored_HW: Tensor, item: Item, image: Item, drawn_on: DrawnOn) -> Tensor:
    """Turn a mask without an EXIF orientation as its image if it shows the stored pixels; a DataError if unclear."""
    turned = orientation(image)
    if turned == 1 or orientation(item) != 1 or drawn_on == "upright":
        return stored_HW
    if drawn_on == "auto":
        drawn_on = drawn_on_by_sides(stored_HW.shape, image)
    if drawn_on == "auto":
        what = f"has no EXIF orientation, and its image {image.name} has {turned}: which way up it is cannot be told"
        remedy = "set --masks-drawn-on upright if it fits the image as viewers show it, else stored"
        raise DataError(item, what, remedy=remedy)
    return TURNS[turned](stored_HW) if drawn_on == "stored" else stored_HW


def drawn_on_by_sides(shape: Sequence[int], image: Item) -> DrawnOn:
    """Whether a mask of that (H, W) fits the upright image or the stored one; ``auto`` if both."""
    upright = upright_size(image) or (0, 0)
    stored = upright[::-1] if orientation(image) in QUARTER_TURNS else upright
    if tuple(shape) == stored:
        return "auto" if stored == upright else "stored"
    return "upright"


def demand_same_size(labels_HW: Tensor, item: Item, size: Sequence[int], image: Item) -> None:
    """Refuses a mask (H, W) of another size than its upright image, by a DataError."""
    if tuple(labels_HW.shape) != tuple(size):
        what = f"has another size than its image {image.name} (height x width, after EXIF rotation)"
        got, expected = ("x".join(map(str, each)) for each in (labels_HW.shape, size))
        raise DataError(item, what, got=got, expected=expected)


def read_stored(item: Item, rule: LabelRule) -> Tensor:
    """Read the stored values of a mask, (H, W) int64, those of Cityscapes as train ids and colors as classes.

    A DataError for what is damaged, a JPEG (whose compression invents labels), or has colors that no file names.
    """
    if item.name.lower().endswith(".npy"):
        return torch.from_numpy(_read_array(item))
    with open_picture(item) as image:
        stored_HW = torch.from_numpy(_stored(image, item, rule))
        stored_HW = TURNS.get(image.getexif().get(ORIENTATION, 1), torch.clone)(stored_HW)
    return _to_train_ids(stored_HW) if item.name.endswith("_gtFine_labelIds.png") else stored_HW


def to_classes(stored: Tensor, rule: LabelRule, item: Item) -> Tensor:
    """The classes of stored values of a mask; a DataError for a third value beside 0 and the foreground."""
    others = stored[(stored != 0) & (stored != rule.foreground)] if rule.foreground else stored[:0]
    if others.numel():
        what = f"has label {int(others.flatten()[0])} where others have 0 and {rule.foreground} alone"
        raise DataError(item, what, remedy=f"set --ignore-index {rule.foreground} if that is not class 1")
    return rule(stored)


def check_labels(labels_HW: Tensor, num_classes: int, rule: LabelRule, path: Item) -> None:
    """Refuse classes (H, W), made by `rule` from the mask `path`, that are neither of `num_classes` nor ignored.

    The DataError has the first value that is out of range, as stored in the file.
    """
    outside = labels_HW[((labels_HW < 0) | (labels_HW >= num_classes)) & (labels_HW != rule.ignore_index)]
    if outside.numel():
        first = int(rule.reduce)
        many = len({*outside.tolist()}) > max(2, num_classes)  # few may be classes of another network
        is_resampled = many and outside.numel() < _EDGE_SHARE * labels_HW.numel()
        hint = "; it looks resized with interpolation, which invents labels: resize masks with nearest"
        ignored = 0 if rule.reduce else rule.ignore_index
        expected = f"{first} to {num_classes - 1 + first} for {num_classes} classes, or the ignored {ignored}"
        remedy = f"see --num-classes, --ignore-index and --reduce-labels{hint * is_resampled}"
        raise DataError(path, f"has label {int(outside.min()) + first}", expected=expected, remedy=remedy)


def _read_array(item: Item) -> NDArray[np.int64]:
    """A mask stored by NumPy, (H, W), with an axis of one channel or without."""
    values = load_array(item)
    single = [axis for axis in (0, 2) if values.ndim == len("HWC") and values.shape[axis] == 1]
    values = np.squeeze(values, axis=tuple(single[:1]))
    numbers = values if values.dtype.kind in "buif" else np.array(np.nan)
    if values.ndim != len("HW") or not (np.isfinite(numbers) & (numbers == np.round(numbers))).all():
        raise DataError(item, "is no mask", got=f"{values.dtype} {values.shape}", expected="integers of shape (H, W)")
    return np.array(values, np.int64)


def _stored(image: Image.Image, item: Item, rule: LabelRule) -> NDArray[np.int64]:
    """The values of a decoded mask, (H, W)."""
    if image.format in {"JPEG", "MPO"} or "jpeg" in str(image.info.get("compression")):  # the second is of TIFF
        what = "is a JPEG, whose compression changes labels"
        raise DataError(item, what, remedy="export the masks as PNG from their source")
    bands = image.getbands()
    if image.mode == "F" or "".join(bands) not in ("P", "PA", "1", "L", "LA", "I", "RGB", "RGBA"):
        what = "has floating-point pixels" if image.mode == "F" else f"has {len(bands)} channels ({image.mode})"
        raise DataError(item, what, expected="one label or color a pixel", remedy="save it as PNG")
    if bands[-1] == "A" and image.getextrema()[-1] != (255, 255):
        raise DataError(item, "has transparent pixels, which are no labels", remedy="save it without alpha")
    colors = rule.colors
    if colors is not None and colors.reads(bands):
        return colors(np.asarray(image.convert("RGB")), rule.ignore_index, item)
    if len(bands) < len("RGB"):
        return np.array(image if len(bands) == 1 else image.getchannel(0), np.int64)
    values_HW3 = np.array(image, np.int64)[..., :3]
    if (values_HW3 != values_HW3[..., :1]).any():
        remedy = f"name the classes of its colors with --colors FILE, or in {COLOR_FILES[0]} beside them"
        raise DataError(item, "has colors, of which no file says the classes", remedy=remedy)
    return values_HW3[..., 0]


def _to_train_ids(ids_HW: Tensor) -> Tensor:
    """Cityscapes ids -> train ids, 255 for what is not scored; other values stay and are refused later."""
    train_ids = torch.full((_CITYSCAPES_IDS,), _VOID)
    train_ids[list(_CITYSCAPES_CLASS_IDS)] = torch.arange(len(_CITYSCAPES_CLASS_IDS))
    is_id_HW = (ids_HW >= 0) & (ids_HW < _CITYSCAPES_IDS)
    return torch.where(is_id_HW, train_ids[ids_HW.clamp(0, _CITYSCAPES_IDS - 1)], ids_HW)
