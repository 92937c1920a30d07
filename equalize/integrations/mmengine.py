"""mmengine's `Runner`: `Runner(..., custom_hooks=[EqualizeHook()])`; in a config file

custom_imports = dict(imports="equalize.integrations.mmengine")
custom_hooks = [dict(type="EqualizeHook")]
"""

from typing import Any

from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS

from equalize.errors import InputError
from equalize.in_memory import PlanLike
from equalize.integrations.training import EqualizedTraining


@HOOKS.register_module()
class EqualizeHook(Hook):  # type: ignore[misc]
    """Trains through the equalizers of a plan; what the runner saves and the trained model are plain.

    mmengine 0.10.7 reads checkpoints of its own, to resume, only where TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 is set.

    Args:
        plan: a plan, or where it lies; without, that beside the checkpoint of `load_from`.
    """

    priority = "VERY_HIGH"

    def __init__(self, plan: PlanLike | None = None) -> None:
        self._training = EqualizedTraining(type(self).__name__, plan)

    def before_train(self, runner: Any) -> None:
        """Attaches: weights were initialized and loaded, the optimizer was built, averages were copied."""
        for hook in _averages(runner):
            if hook.ema_model.update_buffers or hook.begin_iter or hook.begin_epoch:
                got = "update_buffers=True" if hook.ema_model.update_buffers else "begin_iter or begin_epoch"
                what, remedy = "writes averages past the equalized weights", "leave these arguments of EMAHook away"
                raise InputError("EMAHook", what, got=got, remedy=remedy)
        self._training.begin(runner.model, runner.hooks, runner._load_from)
        _rename(runner)

    def after_train(self, runner: Any) -> None:
        """Folds."""
        self._training.end()
        _rename(runner)


def _averages(runner: Any) -> list[Any]:
    return [hook for hook in runner.hooks if isinstance(hook, EMAHook)]


def _rename(runner: Any) -> None:
    """Has averages find their parameters by the names of now."""
    for hook in _averages(runner):
        hook.ema_model.avg_parameters = dict(hook.ema_model.module.named_parameters())
