"""Tables of Hugging Face `datasets` as a layout: which columns hold pictures and labels, which splits there are.

    org/name[@revision]      on the Hub, where no folder of that name exists; for its end see `hf_datasets`
    FOLDER                   written by `save_to_disk`, or with .parquet or .arrow files in it or one level below
    FILE.parquet, .arrow     one split

A column holds pictures if its declared feature is `datasets.Image`, or what that is made of, a struct of "bytes" and
"path". Which of them are images and which are labels is told by usual names, or by the user; columns of plain bytes
are used where the user names them.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from equalize.data.folders import IMAGE_SUFFIXES, walk_files
from equalize.data.hf_datasets import Choice, Tables, classes_file, load_files, load_from_hub, load_saved
from equalize.data.images import Cell
from equalize.data.layouts import SPLIT_SYNONYMS, Layout, Pairs
from equalize.errors import DataError
from equalize.hub import HUB_ID

_SUFFIXES = (".parquet", ".arrow")
_PATTERNS = tuple(f"{depth}*{suffix}" for suffix in _SUFFIXES for depth in ("", "*/"))
_SAVED = ("dataset_dict.json", "state.json")
_SHARD = re.compile(r"(?P<split>\w+)-\d{5}-of-\d{5}")

_IMAGES = re.compile(r"images?|img|pixel_values|picture|photo", re.IGNORECASE)
_LABELS = re.compile(
    r"(semantic_)?(labels?|masks?|annotations?|segmentation|seg)(_map|_mask)?|gt",
    re.IGNORECASE,
)


def find_table(choice: Choice, *, labels: bool) -> Layout | None:
    """The layout of a single file or of a data set on the Hub; None where the place is neither.

    Raises:
        DataError: no column holds images, or with `labels`, labels; or several do. ResourceError: see `open_data`.
    """
    name = choice.place
    path = Path(name)
    if os.path.isfile(path) and path.suffix.lower() in _SUFFIXES:
        return _layout(choice, load_files(path, {None: [path]}), labels)
    if os.path.lexists(path) or not HUB_ID.fullmatch(name) or path.suffix.lower() in _SUFFIXES:
        return None
    return _layout(choice, load_from_hub(choice), labels, hub=True)


def find_tables_in(choice: Choice, *, labels: bool) -> Layout | None:
    """The layout of a folder with tables in it; None where there are none.

    Raises:
        DataError: as `find_table`; or there are images as well, so that nobody knows which are meant.
    """
    folder = Path(choice.place)
    if any((folder / name).is_file() for name in _SAVED):
        return _layout(choice, load_saved(folder), labels)
    found = [path for pattern in _PATTERNS for path in sorted(folder.glob(pattern)) if _is_table(path)]
    if not found:
        return None
    image = next((path for path in walk_files(folder) if path.suffix.lower() in IMAGE_SUFFIXES), None)
    if image is not None:
        raise DataError(
            folder,
            f"holds both images ({image.relative_to(folder)}) and tables ({found[0].relative_to(folder)})",
            remedy="name the folder, or the file, of the ones that are meant",
        )
    files = _split_files(folder, [path for path in found if path.suffix == found[0].suffix])
    return _layout(choice, load_files(folder, files), labels)


def _is_table(path: Path) -> bool:
    """`metadata.parquet` describes the images that lie beside it."""
    return path.stem != "metadata" and not any(part.startswith(".") for part in path.parts[-2:])


def _split_files(folder: Path, files: Sequence[Path]) -> dict[str | None, list[Path]]:
    """Files by split, as `datasets` tells it from names; all together where one of them does not say."""
    by_split: dict[str | None, list[Path]] = {}
    for path in files:
        by_split.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    return {None: [*files]} if None in by_split else by_split


def _split_of(path: Path) -> str | None:
    """`train-00000-of-00002.parquet`, `val.parquet`, `images_test.parquet`, `validation/0.parquet`."""
    if shard := _SHARD.match(path.name):
        return shard["split"]
    words = re.split(r"[^A-Za-z]+", path.with_suffix("").as_posix().lower())
    return next((word for word in words if any(word in names for names in SPLIT_SYNONYMS)), None)


def _layout(choice: Choice, tables: Tables, labels: bool, *, hub: bool = False) -> Layout:
    name = choice.place
    if choice.config and not hub:
        raise DataError(name, "has no configurations: it is not on the Hub", got=choice.config)
    features: Mapping[str, Any] = next(iter(tables.values())).features
    image, label = _columns(choice, features, labels)

    def read(split: str | None) -> Pairs:
        return _pairs(tables[split], f"{name} {split}" if split else name, image, label)

    def identity(split: str | None) -> str:
        return "\0".join([tables[split]._fingerprint, str(len(tables[split])), image, label or ""])

    return Layout(
        name="table",
        splits=tuple(split for split in tables if split is not None),
        has_masks=label is not None,
        read=read,
        identity=identity,
        classes=_classes(features) or (classes_file(name) if hub else None),
    )


def _columns(choice: Choice, features: Mapping[str, Any], labels: bool) -> tuple[str, str | None]:
    """The column of images and that of labels: as chosen, by name, else what is left when the other is known."""
    _check_choice(choice, features)
    pictures = [column for column, feature in features.items() if _is_picture(feature)]
    masks = [column for column in pictures if _LABELS.fullmatch(column) and column != choice.image]
    others = [column for column in pictures if column not in (*masks, choice.label)]
    named = [column for column in others if _IMAGES.fullmatch(column)]
    image = choice.image or _only(choice.place, "image", named or others, features)
    rest = [choice.label] if choice.label else masks or [column for column in pictures if column != image]
    if labels:
        return image, _only(choice.place, "label", rest, features)
    return image, rest[0] if len(rest) == 1 else None


def _check_choice(choice: Choice, features: Mapping[str, Any]) -> None:
    usable = [column for column, feature in features.items() if _is_picture(feature) or _is_bytes(feature)]
    for column in (choice.image, choice.label):
        if column is not None and column not in usable:
            there = ", ".join(usable) or f"pictures, not {_listed(features)}"
            raise DataError(choice.place, "has no such column of pictures", got=column, expected=there)


def _only(name: str, what: str, columns: list[str], features: Mapping[str, Any]) -> str:
    if len(columns) == 1:
        return columns[0]
    if columns:
        raise DataError(
            name,
            f"has several columns that may hold {what}s: {', '.join(columns)}",
            remedy=f"choose one: {name}:{what}={columns[0]}",
        )
    raise DataError(
        name,
        f"has no column of {what}s",
        got=_listed(features),
        expected="pictures, and labels as one-channel pictures, in columns declared as Image",
        remedy=f"name a column of encoded pictures: {name}:{what}=COLUMN",
    )


def _is_picture(feature: Any) -> bool:
    """Whether a column is declared to hold encoded pictures."""
    return _is_bytes(feature.get("bytes")) if isinstance(feature, dict) else _kind(feature) == "Image"


def _is_bytes(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _listed(features: Mapping[str, Any]) -> str:
    return ", ".join(f"{column} ({_kind(feature)})" for column, feature in features.items())


def _kind(feature: Any) -> str:
    kind = getattr(feature, "_type", None) or type(feature).__name__
    return str(feature.dtype if kind == "Value" else kind)


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


def _classes(features: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names of a column that lists a picture's classes; a single class is that of the whole picture."""
    lists: list[Any] = [getattr(feature, "feature", None) for feature in features.values()]
    named = {tuple(each.names) for each in lists if _kind(each) == "ClassLabel"}
    return next(iter(named)) if len(named) == 1 else None
