"""A name on the command line -> a `Checkpoint`, and back to disk in the format it came in."""

from equalize.checkpoint.base import Checkpoint
from equalize.checkpoint.loading import load, reload
from equalize.checkpoint.preprocess import Preprocess
from equalize.checkpoint.reading import state_on_disk, twin_on_disk
from equalize.checkpoint.writing import atomic_directory

__all__ = ["Checkpoint", "Preprocess", "atomic_directory", "load", "reload", "state_on_disk", "twin_on_disk"]
