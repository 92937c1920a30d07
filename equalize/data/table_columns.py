"""Tables of Hugging Face `datasets` as a layout: which columns hold pictures and labels.

Only columns declared as `datasets.Image` are considered; usual names, or the user, decide which are images and which
labels. Columns of plain bytes, or of structs with "bytes" and "path", are used if the user names them.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from equalize.data.hf_datasets import Choice, load_tables
from equalize.data.images import Cell
from equalize.data.layouts import Layout, Pairs
from equalize.errors import DataError

_IMAGES = re.compile(r"images?|img|pixel_values|picture|photo", re.IGNORECASE)
_LABELS = re.compile(r"(semantic_)?(labels?|masks?|annotations?|segmentation|seg)(_map|_mask)?|gt", re.IGNORECASE)


def find_table(choice: Choice, *, labels: bool) -> Layout | None:
    """The layout of tables, None where the place holds none; a DataError if it is unclear which columns are meant."""
    tables = load_tables(choice)
    if tables is None:
        return None
    name = choice.place
    image, label = _columns(choice, next(iter(tables.values())).features, labels)
    readers = {
        split: partial(_pairs, table, f"{name} {split}" if split else name, image, label)
        for split, table in tables.items()
    }
    return Layout(name="table", has_masks=label is not None, readers=readers)


def _columns(choice: Choice, features: Mapping[str, Any], labels: bool) -> tuple[str, str | None]:
    """The column of images and that of labels: as chosen, by name, else what is left when the other is known."""
    kinds = {column: _kind(feature) for column, feature in features.items()}
    for column in (choice.image, choice.label):
        if column and kinds.get(column) not in ("Image", "dict", "binary", "large_binary"):
            raise DataError(choice.place, "has no such column of pictures", got=column, expected=_listed(kinds))
    pictures = [column for column, kind in kinds.items() if kind == "Image"]
    masks = [column for column in pictures if _LABELS.fullmatch(column) and column != choice.image]
    others = [column for column in pictures if column not in (*masks, choice.label)]
    named = [column for column in others if _IMAGES.fullmatch(column)]
    image = choice.image or _only(choice.place, "image", named or others, kinds)
    rest = [choice.label] if choice.label else masks or [column for column in pictures if column != image]
    if labels:
        return image, _only(choice.place, "label", rest, kinds)
    return image, rest[0] if len(rest) == 1 else None


def _only(name: str, what: str, columns: list[str], kinds: Mapping[str, str]) -> str:
    if len(columns) == 1:
        return columns[0]
    if columns:
        several = f"has several columns that may hold {what}s: {', '.join(columns)}"
        raise DataError(name, several, remedy=f"choose one: {name}:{what}={columns[0]}")
    expected = "pictures, and labels as one-channel pictures, in columns declared as Image"
    remedy = f"name a column of encoded pictures: {name}:{what}=COLUMN"
    raise DataError(name, f"has no column of {what}s", got=_listed(kinds), expected=expected, remedy=remedy)


def _listed(kinds: Mapping[str, str]) -> str:
    return ", ".join(f"{column} ({kind})" for column, kind in kinds.items())


def _kind(feature: Any) -> str:
    """`Image`, `List`, ...; of plain values `int64`, `binary`, ...; `dict` of structs."""
    kind = type(feature).__name__
    return str(feature.dtype) if kind == "Value" else kind


def _pairs(table: Any, origin: str, image: str, label: str | None) -> Pairs:
    images = _cells(table, origin, image)
    if label is None:
        return [(cell, None) for cell in images]
    absent = table.data.column(label).is_null().to_pylist()  # without reading a picture
    masks = [None if gone else mask for mask, gone in zip(_cells(table, origin, label), absent, strict=True)]
    return list(zip(images, masks, strict=True))


def _cells(table: Any, origin: str, column: str) -> list[Cell]:
    encoded = table.select_columns([column]).with_format("arrow")
    return [Cell(table=encoded, origin=origin, row=row, column=column) for row in range(len(table))]
