"""Colors of classes, as data sets write them down: `labelmap.txt`, `class_dict.csv`, `label_colors.txt`, JSON."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from equalize.data.color_tables import HEX, read_table
from equalize.data.dataset import DataSet
from equalize.data.folders import read_text
from equalize.errors import DataError

COLOR_FILES = (
    *("labelmap.txt", "label_map.txt", "label_colors.txt", "class_dict.csv", "colors.txt", "colors.csv"),
    *("colors.json", "color_map.json", "colormap.json", "palette.json"),
)
"""Names under which data sets keep them."""

_RGB = re.compile(r"(\d{1,3})\s*[,;\s]\s*(\d{1,3})\s*[,;\s]\s*(\d{1,3})")
_VOID = re.compile(r"_*(void|ignored?|unlabell?ed|unknown|undefined|outlier)_*", re.IGNORECASE)
_EDGE_SHARE = 0.1
_EXPECTED = "a line for each class: its name and red, green and blue, or JSON"


@dataclass(frozen=True, slots=True, kw_only=True)
class ColorMap:
    """The color of each class.

    Attributes:
        origin: the file.
        colors, classes: (K,) 24 bits, red first; and the class of each.
        names: of the K colors, in their order; empty where a color has none.
        void: the color that means no class.
    """

    origin: Path
    colors: tuple[int, ...]
    classes: tuple[int, ...]
    names: tuple[str, ...] = field(compare=False)
    void: int | None = None

    @property
    def by_class(self) -> tuple[str, ...]:
        """The names of classes 0, 1, ..., not of `void`; empty where the classes leave one out or have no names."""
        entries = zip(self.colors, self.classes, self.names, strict=True)
        named = {number: name for color, number, name in entries if color != self.void}
        return tuple(named[k] for k in range(len(named))) if all(named.get(k) for k in range(len(named))) else ()

    @property
    def void_name(self) -> str | None:
        """That of the color that means no class, None if each means one."""
        return None if self.void is None else self.names[self.colors.index(self.void)]

    @property
    def is_gray(self) -> bool:
        """Whether all colors are gray, so that masks of one channel may be meant."""
        return all(color in (level * 0x010101 for level in range(256)) for color in self.colors)

    def for_classes(self, num_classes: int) -> Self:
        """The same for a network of so many classes: with one color more, the one called `void` or so is ignored.

        None is ignored of two colors.
        """
        voids = [place for place, name in enumerate(self.names) if _VOID.fullmatch(name)]
        if num_classes < 2 or len(self.colors) != num_classes + 1 or len(voids) != 1:
            return self
        last = self.classes[voids[0]]
        return replace(self, void=self.colors[voids[0]], classes=tuple(k - (k > last) for k in self.classes))

    def reads(self, bands: Sequence[str]) -> bool:
        """Whether a mask of these bands shows colors, not classes."""
        return len(bands) > 2 or bands[0] == "P" or self.is_gray

    def __call__(self, rgb_HW3: NDArray[np.uint8], void: int, where: object) -> NDArray[np.int64]:
        """Colors (H, W, 3) -> classes (H, W), `void` for the color of none; a DataError for a color without a class."""
        packed_HW = rgb_HW3.astype(np.int64) @ np.array([0x10000, 0x100, 1])
        table = dict(zip(self.colors, self.classes, strict=True)) | ({} if self.void is None else {self.void: void})
        found, place_P, counts = np.unique(packed_HW, return_inverse=True, return_counts=True)
        if unknown := [color for color in found.tolist() if color not in table]:
            share = counts[np.isin(found, unknown)].sum() / packed_HW.size
            what = f"has a color that {self.origin.name} does not name ({len(unknown)} such, {share:.2g} of the pixels)"
            seems = len(unknown) > 2 and share < _EDGE_SHARE
            hint = "it looks resized with interpolation: resize with nearest" if seems else "add it, or see --colors"
            raise DataError(where, what, got=" ".join(map(str, unknown[0].to_bytes(3, "big"))), remedy=hint)
        return np.array([table[color] for color in found.tolist()])[place_P].reshape(packed_HW.shape)


_Row = tuple[int, int | None, str]
"""Color, index and name."""


def read_colors(path: str | Path) -> ColorMap:
    """Read colors: lines with red, green and blue (or #rrggbb), a name and maybe an index; or JSON.

    JSON may be {name: color}, {index: color}, {color: name or index}, or a list of colors or of {"name", "color"}.
    Without an index the order counts. A DataError for anything else, and for a color or a class that comes twice.
    """
    path = Path(os.path.expanduser(path))
    found = _rows(path)
    if not found:
        raise DataError(path, "names no colors", expected=_EXPECTED)
    return _color_map(path, found)


def _rows(path: Path) -> list[_Row]:
    text = read_text(path)
    if path.suffix.lower() == ".json":
        return list(_json_rows(path, text))
    return [(_packed(rgb), index, name) for rgb, index, name in read_table(text)]


def _color_map(path: Path, found: Sequence[_Row]) -> ColorMap:
    classes = [index for _, index, _ in found]
    order = [*range(len(found))] if None in classes else [index for index in classes if index is not None]
    colors = [color for color, _, _ in found]
    if len({*colors}) < len(colors) or len({*order}) < len(order):
        raise DataError(path, "names a color or a class twice", expected=_EXPECTED)
    return ColorMap(origin=path, colors=tuple(colors), classes=tuple(order), names=tuple(name for _, _, name in found))


def colors_of(dataset: DataSet, file: str | Path | None) -> ColorMap | None:
    """The colors of classes in a file, or in one that the data set brings along if None; None for ``none``."""
    if file is not None:
        return None if file == "none" else read_colors(file)
    places = (folder / name for folder in dataset.folders for name in COLOR_FILES)
    tables = ((path, _rows(path)) for path in places if path.is_file())
    return next((_color_map(path, found) for path, found in tables if found), None)  # others may name classes alone


def _json_rows(path: Path, text: str) -> Iterator[_Row]:
    try:
        content: Any = json.loads(text)
    except ValueError as error:
        raise DataError(path, f"is no JSON ({error})") from error
    content = unwrapped(content)
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        parts = [key] if isinstance(content, dict) else []
        color: int | None = None
        index: int | None = None
        name = ""
        for part in parts + ([*value.values()] if isinstance(value, dict) else [value]):
            line = " ".join(map(str, part)) if isinstance(part, list) else str(part)
            if found := HEX.fullmatch(line) or _RGB.fullmatch(line.strip("()[] ")):
                color = _packed([int(level, 16 if line.startswith("#") else 10) for level in found.groups()])
            elif line.isdigit():
                index = int(line)
            else:
                name = name or line
        if color is not None:
            yield color, index, name


def unwrapped(content: Any) -> Any:
    """The list in `{"classes": [{"title": "Water", "color": "#50E3C2"}, …]}`; other JSON as it is."""
    lists = [*content.values()] if isinstance(content, dict) else []
    is_wrapped = len(lists) == 1 and isinstance(lists[0], list) and all(isinstance(each, dict) for each in lists[0])
    return lists[0] if is_wrapped else content


def _packed(rgb: Sequence[int]) -> int:
    red, green, blue = (min(level, 255) for level in rgb)
    return red << 16 | green << 8 | blue
