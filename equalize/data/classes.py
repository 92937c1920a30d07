"""Names of classes, from a file, from a table, or from a data set that is known by its layout."""

import json
from pathlib import Path
from typing import Any

from equalize.data.dataset import DataSet
from equalize.data.folders import read_text
from equalize.errors import DataError

CITYSCAPES_CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
"""By train id."""

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)

_FILES = ("classes.txt", "classes.json", "id2label.json")
_ADE20K_FILE = "objectInfo150.txt"


def class_names(dataset: DataSet) -> tuple[str, ...] | None:
    """The names that the data set brings along, by class; None where it brings none.

    A file `classes.txt`, `classes.json` or `id2label.json` in its root comes first, then what a table says of itself,
    then what the layout is known for: Cityscapes' 19, Pascal VOC's 21, ADE20K's own `objectInfo150.txt`. The caller
    compares their number to the network's.

    Raises:
        DataError: such a file is there but cannot be read.
    """
    for name in _FILES:
        if (dataset.root / name).is_file():
            return read_class_names(dataset.root / name)
    if dataset.classes is not None:
        return read_class_names(dataset.classes) if isinstance(dataset.classes, Path) else dataset.classes
    if dataset.layout == "ade20k":
        folders = (dataset.root, dataset.root / "ADEChallengeData2016")
        table = next((folder / _ADE20K_FILE for folder in folders if (folder / _ADE20K_FILE).is_file()), None)
        return _read_ade20k_table(table) if table else None
    return {"cityscapes": CITYSCAPES_CLASSES, "voc": VOC_CLASSES}.get(dataset.layout)


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """Names from a text file with one a line, or from JSON: a list, or an object {index: name} (or {"id2label": …}).

    Raises:
        DataError: the file cannot be read so, or leaves a class without a name.
    """
    path = Path(path)
    text = read_text(path).rstrip()
    names = _from_json(path, text) if path.suffix.lower() == ".json" else tuple(map(str.strip, text.splitlines()))
    if not names or not all(names):
        raise DataError(path, "leaves a class without a name", expected="one name a line, for class 0, 1, ...")
    return names


def _from_json(path: Path, text: str) -> tuple[str, ...]:
    try:
        content: Any = json.loads(text)
        if isinstance(content, dict):
            content = content.get("id2label", content)
        if isinstance(content, dict):
            by_index = {int(index): name for index, name in content.items()}
            content = [by_index[index] for index in range(len(by_index))]
        if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
            raise TypeError("not a list of names")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            path, "cannot be read as class names", expected='["road", ...] or {"0": "road", ...} without gaps'
        ) from error
    return tuple(content)


def _read_ade20k_table(path: Path) -> tuple[str, ...]:
    """The last column, behind a heading; of several synonyms the first, as everybody prints them."""
    rows = read_text(path).splitlines()[1:]
    return tuple(row.split("\t")[-1].split(",")[0].strip() for row in rows if row.strip())
