"""Classes as colors: a color for each, pictures with the classes laid over them, and a legend.

K classes, H x W pixels; colors (K, 3) are uint8, red first.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from equalize.data.bands import Picture
from equalize.data.colors import ColorMap
from equalize.data.images import Item, opened
from equalize.data.masks import LabelRule
from equalize.errors import DataError

Colors = NDArray[np.uint8]

_GRID = 16  # levels of each of red, green and blue among which colors are chosen
_LIGHTNESS = (0.45, 0.92)  # of OKLab: neither black nor white, which pictures are full of
_CHROMA = (0.08, 0.17)  # nor gray, nor garish
_OPACITY = 0.55
_ROWS, _LINE, _SWATCH = 40, 24, 36  # of a legend: rows a column; pixels of a row, and of a color
_LETTERS = 60  # of a name


def class_colors(num_classes: int, given: ColorMap | None = None, own: Sequence[Sequence[int]] | None = None) -> Colors:
    """The colors (K, 3) of classes: the user's, else the checkpoint's own, else `distinct_colors`.

    A DataError if the user's are those of other classes.
    """
    if given is None:
        return np.array(own, np.uint8) if own is not None else distinct_colors(num_classes)
    fitting = given.for_classes(num_classes)
    table = {k: color for k, color in zip(fitting.classes, fitting.colors, strict=True) if color != fitting.void}
    if table.keys() != {*range(num_classes)}:
        what = "has the colors of other classes than the network's"
        raise DataError(given.origin, what, got=f"{len(table)} classes", expected=f"classes 0 to {num_classes - 1}")
    return np.array([[*table[k].to_bytes(3, "big")] for k in range(num_classes)], np.uint8)


def colors_of_masks(
    num_classes: int, rule: LabelRule, mask: Item, own: Sequence[Sequence[int]] | None = None
) -> Colors:
    """The colors (K, 3) that classes have in masks, else the checkpoint's own, else `distinct_colors`.

    A color map in the rule comes first; classes that it leaves out get distinct colors. The palette of `mask`, one of
    the masks, comes second, if it tells the classes apart.
    """
    if rule.colors is None:
        return class_colors(num_classes, own=_palette(mask, num_classes, rule) or own)
    colors = distinct_colors(num_classes).copy()
    for color, k in zip(rule.colors.colors, rule.colors.classes, strict=True):
        if color != rule.colors.void and 0 <= k < num_classes:
            colors[k] = [*color.to_bytes(3, "big")]
    return colors


def _palette(mask: Item, num_classes: int, rule: LabelRule) -> list[list[int]] | None:
    """The colors of a palette picture; None where it is none, or two classes share a color or all are gray."""
    try:
        with opened(mask) as image:
            palette = image.getpalette("RGB") if image.mode == "P" else None
    except (OSError, DataError):  # such as an array of NumPy
        return None
    stored = [0, rule.foreground] if rule.foreground else [k + rule.reduce for k in range(num_classes)]
    if palette is None or len(palette) <= 3 * max(stored):
        return None
    colors = [palette[3 * value : 3 * value + 3] for value in stored]
    is_gray = all(len({*color}) == 1 for color in colors)
    return None if is_gray or len({*map(tuple, colors)}) < num_classes else colors


@cache
def distinct_colors(count: int) -> Colors:
    """So many colors (count, 3), of which the first k are the same for any count.

    Each is the one of a grid that is farthest from all before it in OKLab (Ottosson 2020); they repeat after 1,481.
    """
    levels = np.linspace(0, 255, _GRID).round()
    rgb_G3 = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lab_G3 = _oklab(rgb_G3)
    light, chroma = lab_G3[:, 0], np.hypot(lab_G3[:, 1], lab_G3[:, 2])
    fit = (light >= _LIGHTNESS[0]) & (light <= _LIGHTNESS[1]) & (chroma >= _CHROMA[0]) & (chroma <= _CHROMA[1])
    rgb_G3, lab_G3 = rgb_G3[fit], lab_G3[fit]
    chosen = [int(chroma[fit].argmax())]
    distance_G = np.full(len(rgb_G3), np.inf)
    while len(chosen) < min(count, len(rgb_G3)):
        distance_G = np.minimum(distance_G, ((lab_G3 - lab_G3[chosen[-1]]) ** 2).sum(axis=1))
        chosen.append(int(distance_G.argmax()))
    colors: Colors = rgb_G3[np.resize(chosen, count)].astype(np.uint8)
    return colors


def _oklab(rgb_G3: NDArray[np.float64]) -> NDArray[np.float64]:
    """sRGB of 0 to 255 in OKLab: lightness, green to red, blue to yellow."""
    share = rgb_G3 / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    opponents = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    found: NDArray[np.float64] = np.cbrt(linear @ cones.T) @ opponents.T
    return found


def draw_overlay(picture: Picture, classes_HW: NDArray[np.integer], colors_K3: Colors) -> Image.Image:
    """The picture with the colors of its classes over it, half transparent."""
    return Image.blend(as_rgb(picture), Image.fromarray(colors_K3[classes_HW]), _OPACITY)


def as_rgb(picture: Picture) -> Image.Image:
    """A picture as RGB; of bands the first three, or the first, each from its smallest to its largest value."""
    if isinstance(picture, Tensor):
        bands_CHW = picture[: 3 if len(picture) >= len("RGB") else 1].float()
        least, most = (each[:, None, None] for each in (bands_CHW.amin((1, 2)), bands_CHW.amax((1, 2))))
        levels = (255 * (bands_CHW - least) / (most - least).clamp(min=1e-12)).round().byte()
        picture = Image.fromarray(levels.permute(1, 2, 0).expand(-1, -1, 3).contiguous().numpy())
    return picture.convert("RGB")


def draw_legend(rows: Sequence[tuple[str, Sequence[int]]]) -> Image.Image:
    """Texts beside their colors, in columns, on white."""
    rows = [(" ".join(text.split())[:_LETTERS], color) for text, color in rows]
    font = ImageFont.load_default(size=15)
    width = _SWATCH + 24 + round(max(font.getlength(text) for text, _ in rows))
    columns = -(-len(rows) // _ROWS)
    image = Image.new("RGB", (columns * width + 12, min(len(rows), _ROWS) * _LINE + 12), "white")
    draw = ImageDraw.Draw(image)
    for place, (text, color) in enumerate(rows):
        left, top = 8 + place // _ROWS * width, 8 + place % _ROWS * _LINE
        draw.rectangle((left, top, left + _SWATCH, top + _LINE - 6), fill=(color[0], color[1], color[2]))
        draw.text((left + _SWATCH + 8, top + (_LINE - 6) / 2), text, fill="black", font=font, anchor="lm")
    return image
