"""Scale equalization for the fusion layers of pretrained segmentation checkpoints.

    checkpoint → graph → sites → moments → plan → checkpoint

Names are imported when they are first used, so that `import equalize` and the command line's help cost nothing.
"""

from typing import TYPE_CHECKING, Any

from equalize.version import __version__

if TYPE_CHECKING:
    from equalize.branches import Branch
    from equalize.calibration import calibrate
    from equalize.checkpoint import Checkpoint, load
    from equalize.errors import EqualizeError
    from equalize.measurement import measure
    from equalize.moments import Moments
    from equalize.plan import Edit, Plan
    from equalize.scanning import Scan, scan
    from equalize.sites import Refusal, Site
    from equalize.strategies import make_plan
    from equalize.surgery import apply
    from equalize.training import attach, fold

__all__ = [
    "Branch",
    "Checkpoint",
    "Edit",
    "EqualizeError",
    "Moments",
    "Plan",
    "Refusal",
    "Scan",
    "Site",
    "__version__",
    "apply",
    "attach",
    "calibrate",
    "fold",
    "load",
    "make_plan",
    "measure",
    "scan",
]

_HOMES = {
    "Branch": "branches",
    "Checkpoint": "checkpoint",
    "Edit": "plan",
    "EqualizeError": "errors",
    "Moments": "moments",
    "Plan": "plan",
    "Refusal": "sites",
    "Scan": "scanning",
    "Site": "sites",
    "apply": "surgery",
    "attach": "training",
    "calibrate": "calibration",
    "fold": "training",
    "load": "checkpoint",
    "make_plan": "strategies",
    "measure": "measurement",
    "scan": "scanning",
}


def __getattr__(name: str) -> Any:
    """Finds a public name in its module (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'equalize' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"equalize.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
