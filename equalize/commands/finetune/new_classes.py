"""A checkpoint for another number of classes: its classifiers are drawn anew, and nothing else may differ."""

from dataclasses import replace

from equalize.checkpoint import Checkpoint
from equalize.checkpoint.load import ModelName
from equalize.errors import CheckpointError

__all__ = ["load_for"]


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
