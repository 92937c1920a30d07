"""Logits of images that are too large to be computed, or resized to their masks, at once."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from equalize.data.bands import Picture, picture_size
from equalize.data.images import Item, upright_size
from equalize.data.loader import Preprocessor

_LARGE = 2**24  # pixels; a UPerNet of 150 classes keeps 10 GB of logits of as many
_AT_ONCE = 2**27  # numbers: 0.5 GB of float32
_MANY = 8  # classes from which on a CPU interpolates twice as fast pixel by pixel

Strips = Iterator[tuple[int, Tensor]]
"""Logits (K, h, W) of an image, each with its first row, from the top."""


def is_large(image: Item) -> bool:
    """Whether an image has more pixels than a network is given at once."""
    return math.prod(upright_size(image) or (0,)) > _LARGE


def upsampled(scores_Khw: Tensor, size: Sequence[int], at_once: int = _AT_ONCE) -> Strips:
    """Logits brought to `size` (H, W) bilinearly, as `interpolate` does it with `align_corners=False`; in strips.

    Rows are interpolated before columns, so that a strip needs no other one; one strip if that has `at_once` numbers.
    """
    height, width = size
    rows = max(1, at_once // (scores_Khw.shape[0] * width))
    if rows >= height:
        scores_1Khw = scores_Khw[None]
        if len(scores_Khw) >= _MANY and not scores_Khw.is_cuda:
            scores_1Khw = scores_1Khw.contiguous(memory_format=torch.channels_last)
        yield 0, F.interpolate(scores_1Khw, size=(height, width), mode="bilinear", align_corners=False)[0]
        return
    known = scores_Khw.shape[1]
    for top in range(0, height, rows):
        place_h = (torch.arange(top, min(top + rows, height), device=scores_Khw.device) + 0.5) * known / height - 0.5
        above_h = place_h.clamp(min=0).long()
        share_h = (place_h.clamp(min=0) - above_h)[:, None]
        strip = torch.lerp(scores_Khw[:, above_h], scores_Khw[:, (above_h + 1).clamp(max=known - 1)], share_h)
        yield top, F.interpolate(strip[None], size=(len(place_h), width), mode="bilinear", align_corners=False)[0]


def slide_window(
    logits: Callable[[Tensor], Tensor],
    picture: Picture,
    size: tuple[int, int],
    *,
    stride: tuple[int, int] | None = None,
    batch_size: int,
    preprocess: Preprocessor,
) -> Strips:
    """Logits of a window that slides over a picture (mmsegmentation's `slide` mode).

    They are averaged where windows overlap; memory is that of one row of windows.

    Args:
        logits: (N, C, h, w) -> (N, K, any size).
        size: (H, W) of the window; the picture's own side where that is smaller, as there.
        stride: how far apart windows start, no further than `size`; two thirds of it if None.
        batch_size: windows a forward pass.
        preprocess: without a size of its own.
    """
    height, width = picture_size(picture)
    rows, columns = min(size[0], height), min(size[1], width)
    down, right = stride or (max(1, 2 * side // 3) for side in size)
    tops, starts = [*_starts(height, rows, down), height], _starts(width, columns, right)
    kept: Tensor | None = None  # of rows that further windows will see: sums of logits, and how many they are
    for top, below in pairwise(tops):
        band: Tensor | None = None
        for first in range(0, len(starts), batch_size):
            lefts = starts[first : first + batch_size]
            crops = [_cropped(picture, left, top, left + columns, top + rows) for left in lefts]
            windows_NChw = torch.stack([preprocess(crop, None) for crop in crops])
            scores = F.interpolate(logits(windows_NChw), size=(rows, columns), mode="bilinear", align_corners=False)
            if band is None:
                band = scores.new_zeros(scores.shape[1] + 1, rows, width)
            for left, scores_Khw in zip(lefts, scores, strict=True):
                band[:-1, :, left : left + columns] += scores_Khw
                band[-1, :, left : left + columns] += 1
        assert band is not None
        if kept is not None:
            band[:, : kept.shape[1]] += kept
        done = band[:, : below - top]
        kept = band[:, below - top :]
        yield top, done[:-1] / done[-1]


def _cropped(picture: Picture, left: int, top: int, right: int, bottom: int) -> Picture:
    if isinstance(picture, Tensor):
        return picture[:, top:bottom, left:right]
    return picture.crop((left, top, right, bottom))


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows start: every ``stride`` pixels, the last flush with the end, as mmsegmentation places them."""
    return [*range(0, length - window, stride), length - window]
