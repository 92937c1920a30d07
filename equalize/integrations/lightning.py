"""Lightning: `Trainer(..., callbacks=[EqualizeCallback("OUT")])`."""

from typing import Any

from torch import nn

from equalize.in_memory import PlanLike
from equalize.integrations.training import EqualizedTraining

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback


class EqualizeCallback(Callback):  # type: ignore[misc]
    """Trains through the equalizers of a plan; what the trainer saves and the trained module are plain.

    Args:
        plan: a plan, or where it lies. Without, that of the directory or Hub id which `from_pretrained` of transformers
            was given; other libraries do not keep it.
    """

    def __init__(self, plan: PlanLike | None = None) -> None:
        self._training = EqualizedTraining(type(self).__name__, plan)

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Attaches to each network of the module that the plan fits: weights were loaded, the optimizer was built."""
        configs = (getattr(module, "config", None) for module in pl_module.modules())
        sources = [source for config in configs if (source := getattr(config, "_name_or_path", None))]
        self._training.begin(pl_module, trainer.callbacks, sources[0] if sources else None)

    def on_fit_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Folds."""
        self._training.end()
