"""Scale equalization for the fusion layers of pretrained segmentation checkpoints."""

from equalize.version import __version__

__all__ = ["__version__"]
