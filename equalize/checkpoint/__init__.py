"""A name on the command line -> a `Checkpoint`, and back to disk in the format it came in."""

from equalize.checkpoint.checkpoint import Checkpoint
from equalize.checkpoint.files.atomic import atomic_directory
from equalize.checkpoint.files.weights import safetensors_copy, state_on_disk
from equalize.checkpoint.load import ModelName, load, reload
from equalize.checkpoint.preprocess import Override, Preprocess

__all__ = [
    "Checkpoint",
    "ModelName",
    "Override",
    "Preprocess",
    "atomic_directory",
    "load",
    "reload",
    "safetensors_copy",
    "state_on_disk",
]
