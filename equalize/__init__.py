"""Scale equalization for the fusion layers of pretrained segmentation checkpoints.

    checkpoint → graph → sites → moments → plan → checkpoint

Names are imported when they are first used, so that `import equalize` and the command line's help cost nothing.
"""

from typing import TYPE_CHECKING, Any

from equalize.version import __version__

if TYPE_CHECKING:
    from equalize.checkpoint.checkpoint import Checkpoint
    from equalize.checkpoint.loading import load
    from equalize.errors import EqualizeError
    from equalize.in_memory import apply, attach
    from equalize.moments.measure import measure
    from equalize.moments.moments import Moments
    from equalize.plan.attach import fold
    from equalize.plan.calibrate import calibrate
    from equalize.plan.edits import Edit
    from equalize.plan.plan import Plan
    from equalize.plan.strategies import make_plan
    from equalize.sites.branches import Branch
    from equalize.sites.refusals import Refusal
    from equalize.sites.scan import Scan, scan
    from equalize.sites.sites import Site

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

_MODULE_OF = {
    "Branch": "sites.branches",
    "Checkpoint": "checkpoint.checkpoint",
    "Edit": "plan.edits",
    "EqualizeError": "errors",
    "Moments": "moments.moments",
    "Plan": "plan.plan",
    "Refusal": "sites.refusals",
    "Scan": "sites.scan",
    "Site": "sites.sites",
    "apply": "in_memory",
    "attach": "in_memory",
    "calibrate": "plan.calibrate",
    "fold": "plan.attach",
    "load": "checkpoint.loading",
    "make_plan": "plan.strategies",
    "measure": "moments.measure",
    "scan": "sites.scan",
}


def __getattr__(name: str) -> Any:
    """Finds a public name in its module (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'equalize' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"equalize.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
