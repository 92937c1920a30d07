"""Class names from a file, a table, or a well-known data set."""

import json
import os
from contextlib import suppress
from pathlib import Path

from equalize.data.colors import ColorMap, colors_of, unwrapped
from equalize.data.dataset import DataSet
from equalize.data.folders import first_file, read_text
from equalize.data.hf_datasets import hub_class_names
from equalize.data.images import opened
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

OF_LAYOUTS = {"cityscapes": CITYSCAPES_CLASSES, "voc": VOC_CLASSES}
"""What a layout is known for, though others may have it as well: annotation tools export that of Pascal VOC."""

_FILES = ("classes.txt", "class_names.txt", "classes.json", "id2label.json", "_classes.csv")
_ADE20K_FILE = "objectInfo150.txt"


def class_names(
    dataset: DataSet, num_classes: int | None = None, colors: str | Path | None = None
) -> tuple[str, ...] | None:
    """The names that the data set brings along, by class; None where it brings none, a DataError where they are broken.

    A file `classes.txt`, labelme's `class_names.txt`, `classes.json`, `id2label.json` (on the Hub, too) or Roboflow's
    `_classes.csv` comes first, then one with their colors, then what the layout is known for: Cityscapes' 19, Pascal
    VOC's 21, ADE20K's own `objectInfo150.txt`. The caller compares their number to the network's.

    Args:
        dataset: the data.
        num_classes: of the network, where it is known; a color called void or so is a class only if it counts it, or
            if masks show no colors.
        colors: a file with the colors of classes, or ``none``; see `colors_of`.
    """
    if dataset.is_on_hub:
        file = hub_class_names(str(dataset.place))
        return read_class_names(file) if file else None
    if file := first_file(folder / name for folder in dataset.folders for name in _FILES):
        return read_class_names(file)
    if found := colors_of(dataset, colors):
        if num_classes is None:
            num_classes = len(found.colors) - _shows_colors(dataset, found)
        if names := found.for_classes(num_classes).by_class:
            return names
    if dataset.layout == "ade20k":
        table = ade20k_table(dataset)
        return _read_ade20k_table(table) if table else None
    return OF_LAYOUTS.get(dataset.layout)


def _shows_colors(dataset: DataSet, colors: ColorMap) -> bool:
    """Whether the first mask does, not classes."""
    mask = next((mask for mask in dataset.masks if mask is not None), None)
    if mask is not None:
        with suppress(Exception), opened(mask) as image:  # what cannot be read is named when it is
            return colors.reads(image.getbands())
    return False


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """Names from a text file with one a line, from Roboflow's `Pixel Value, Class`, or from JSON: a list, or an object
    {index: name} (or {"id2label": …}). A DataError where it is something else, or leaves a class without a name.
    """
    path = Path(os.path.expanduser(path))
    text = read_text(path).rstrip()
    names = _from_json(path, text) if path.suffix.lower() == ".json" else tuple(map(str.strip, text.splitlines()))
    if names[:1] and names[0].lower().startswith("pixel value"):
        names = tuple(line.partition(",")[2].strip() for line in names[1:])
    if not names or not all(names):
        raise DataError(path, "leaves a class without a name", expected="one name a line, for class 0, 1, ...")
    return names


def _from_json(path: Path, text: str) -> tuple[str, ...]:
    try:
        content = unwrapped(json.loads(text))
        if isinstance(content, dict):
            content = content.get("id2label", content)
        if isinstance(content, list):
            named = [each if isinstance(each, dict) else {"name": each} for each in content]
            content = [next((each[key] for key in ("name", "title", "label") if key in each), None) for each in named]
        names = [content[str(index)] for index in range(len(content))] if isinstance(content, dict) else content
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError("not a list of names")
    except (ValueError, KeyError, TypeError) as error:
        expected = '["road", ...] or {"0": "road", ...} without gaps'
        raise DataError(path, "cannot be read as class names", expected=expected, remedy="see --class-names") from error
    return tuple(names)


def ade20k_table(dataset: DataSet) -> Path | None:
    """ADE20K's own list of its classes, if the data set has it."""
    return first_file(dataset.place / folder / _ADE20K_FILE for folder in ("", "ADEChallengeData2016"))


def _read_ade20k_table(path: Path) -> tuple[str, ...]:
    """The last column, behind a heading; of several synonyms the first, as is usual."""
    rows = read_text(path).splitlines()[1:]
    return tuple(row.split("\t")[-1].split(",")[0].strip() for row in rows if row.strip())
