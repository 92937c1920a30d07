"""A checkpoint for another number of classes: its classifiers are drawn anew, and nothing else may differ."""

from collections.abc import Sequence
from dataclasses import replace

from equalize.checkpoint import Checkpoint
from equalize.checkpoint.mmseg_facts import meta_with_classes
from equalize.errors import CheckpointError
from equalize.naming import ModelName

__all__ = ["load_for", "with_names"]


def load_for(name: ModelName, num_classes: int | None) -> tuple[ModelName, Checkpoint]:
    """Loads a model for that many classes, or as it is for None.

    Returns:
        The name under which the same model loads again, and the model; `drawn` tells the classifiers' keys.

    Raises:
        CheckpointError: more than the classifiers does not fit, and `init_missing` was not asked for.
    """
    if num_classes is None:
        return name, name.load()
    wanted = replace(name, num_classes=num_classes)
    try:
        return wanted, wanted.load()
    except CheckpointError:
        if name.init_missing:
            raise
    name.load()  # whole under its own number of classes: then only classifiers can differ
    wanted = replace(wanted, init_missing=True)
    return wanted, wanted.load()


def with_names(checkpoint: Checkpoint, names: Sequence[str]) -> Checkpoint:
    """The checkpoint with names for its classes; where its format has a place for them, they take that of the old."""
    if checkpoint.classes == tuple(names):
        return checkpoint
    origin = checkpoint.origin
    if checkpoint.family == "transformers" and origin is not None:
        id2label = {str(number): name for number, name in enumerate(names)}
        label2id = {name: number for number, name in enumerate(names)}
        fields = {**(origin.config or {}), "id2label": id2label, "label2id": label2id}
        origin = replace(origin, config=fields)
    if checkpoint.family == "mmsegmentation" and origin is not None:
        origin = replace(origin, meta={**origin.meta, **meta_with_classes(names)})
    return replace(checkpoint, classes=tuple(names), origin=origin)
