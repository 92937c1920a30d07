"""Names of classes: where a checkpoint's format has no place for them, in a file beside its weights."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from equalize.checkpoint.checkpoint import Checkpoint, Origin
from equalize.checkpoint.families.mmsegmentation.facts import meta_with_classes
from equalize.checkpoint.files.atomic import CLASS_NAMES_FILE
from equalize.checkpoint.files.weights import read_json
from equalize.errors import CheckpointError

__all__ = ["with_names", "with_recorded"]


def with_names(checkpoint: Checkpoint, names: Sequence[str]) -> Checkpoint:
    """The checkpoint with names for its classes, which it then saves: in place of the old ones, or in a file."""
    names, origin = tuple(names), checkpoint.origin
    if origin is not None:
        origin = _record(checkpoint, origin, names)
    return replace(checkpoint, classes=names, origin=origin)


def _record(checkpoint: Checkpoint, origin: Origin, names: tuple[str, ...]) -> Origin:
    id2label = {str(number): name for number, name in enumerate(names)}
    has_meta = origin.weights.meta or origin.nest
    told = checkpoint.family == "transformers" or (checkpoint.family == "mmsegmentation" and has_meta)
    if told and checkpoint.classes == names:
        return origin
    if checkpoint.family == "transformers":
        label2id = {name: number for number, name in enumerate(names)}
        return replace(origin, config={**(origin.config or {}), "id2label": id2label, "label2id": label2id})
    if told:
        return replace(origin, meta={**origin.meta, **meta_with_classes(names)})
    text = json.dumps(id2label, indent=2, ensure_ascii=False) + "\n"
    return replace(origin, texts={**origin.texts, CLASS_NAMES_FILE: text})


def with_recorded(checkpoint: Checkpoint, directory: Path, num_classes: int | None) -> Checkpoint:
    """The checkpoint with the names that `with_names` left beside it, if its format told none.

    Args:
        checkpoint: as loaded.
        directory: where it lies.
        num_classes: that were asked for: names of another number no longer hold.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = directory / CLASS_NAMES_FILE
    if checkpoint.classes is not None or not path.is_file():
        return checkpoint
    content = read_json(path)
    names = [name for number in range(len(content)) if isinstance(name := content.get(str(number)), str) and name]
    if not names or len(names) != len(content):
        raise CheckpointError(path, "is no record of class names", expected='{"0": "road", ...} without gaps')
    return checkpoint if num_classes not in (None, len(names)) else with_names(checkpoint, names)
