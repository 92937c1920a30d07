"""A name on the command line -> a `Checkpoint`, and back to disk in the format it came in.

Names are imported when they are first used: what only reads the facts of a directory needs no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from equalize.checkpoint.checkpoint import Checkpoint
    from equalize.checkpoint.files.atomic import atomic_directory
    from equalize.checkpoint.files.weights import safetensors_copy, state_on_disk
    from equalize.checkpoint.loading import ModelName, load, reload
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

_MODULE_OF = {
    "Checkpoint": "checkpoint",
    "ModelName": "loading",
    "Override": "preprocess",
    "Preprocess": "preprocess",
    "atomic_directory": "files.atomic",
    "load": "loading",
    "reload": "loading",
    "safetensors_copy": "files.weights",
    "state_on_disk": "files.weights",
}


def __getattr__(name: str) -> Any:
    """Finds a public name in its module (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'equalize.checkpoint' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"equalize.checkpoint.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value
