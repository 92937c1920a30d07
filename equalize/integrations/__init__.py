"""Scale equalization in other trainers: one callback a library, each in a module named after it.

    from equalize.integrations import EqualizeTrainerCallback   # transformers
    from equalize.integrations import EqualizeCallback          # Lightning
    from equalize.integrations import EqualizeHook              # mmengine

Each attaches a plan as the training starts and folds it as it ends. In between the optimizer trains the equalized
weights, and every checkpoint holds plain ones, which the network's own library loads (`equalize.plan.plain_state`).
Libraries are imported when their callback is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from equalize.integrations.lightning import EqualizeCallback
    from equalize.integrations.mmengine import EqualizeHook
    from equalize.integrations.transformers import EqualizeTrainerCallback

__all__ = ["EqualizeCallback", "EqualizeHook", "EqualizeTrainerCallback"]

_MODULE_OF = {"EqualizeCallback": "lightning", "EqualizeHook": "mmengine", "EqualizeTrainerCallback": "transformers"}


def __getattr__(name: str) -> Any:
    """Finds a callback in its module (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'equalize.integrations' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"equalize.integrations.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
