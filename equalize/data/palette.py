"""The color that each class is shown in: that of the masks where they have colors."""

import colorsys

import numpy as np
from numpy.typing import NDArray

from equalize.data.images import Item, opened
from equalize.data.masks import LabelRule
from equalize.errors import DataError

_GOLDEN = 0.618034  # of a turn of the hue: neighbors differ, and any number of classes is spread
_VALUES = (0.92, 0.62, 0.78)


def class_colors(num_classes: int, rule: LabelRule, mask: Item | None = None) -> NDArray[np.uint8]:
    """Colors of the classes, (K, 3), red first.

    Args:
        num_classes: K.
        rule: its color map comes first.
        mask: a mask of the data set, whose palette comes second if it tells the classes apart.
    """
    colors = np.array([_spread(k) for k in range(num_classes)], np.uint8)
    if rule.colors is not None:
        for color, k in zip(rule.colors.colors, rule.colors.classes, strict=True):
            if color != rule.colors.void and 0 <= k < num_classes:
                colors[k] = tuple(color.to_bytes(3, "big"))
        return colors
    found = None if mask is None else _palette(mask, num_classes, rule)
    return colors if found is None else found


def _spread(k: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb((0.58 + k * _GOLDEN) % 1, 0.45 + 0.4 * (k % 2), _VALUES[k % 3])
    return round(255 * red), round(255 * green), round(255 * blue)


def _palette(mask: Item, num_classes: int, rule: LabelRule) -> NDArray[np.uint8] | None:
    """The colors of a palette picture, (K, 3); None where it is none, or two classes share a color or all are gray."""
    try:
        with opened(mask) as image:
            palette = image.getpalette("RGB") if image.mode == "P" else None
    except (OSError, DataError):  # such as an array of NumPy
        return None
    stored = [0, rule.foreground] if rule.foreground else [k + rule.reduce for k in range(num_classes)]
    if palette is None or len(palette) <= 3 * max(stored):
        return None
    colors = np.array(palette, np.uint8).reshape(-1, 3)[stored]
    is_gray = bool((colors == colors[:, :1]).all())
    return None if is_gray or len(np.unique(colors, axis=0)) < num_classes else colors
