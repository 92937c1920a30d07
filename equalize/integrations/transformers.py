"""transformers' `Trainer`: `Trainer(..., callbacks=[EqualizeTrainerCallback()])`."""

from typing import Any

from transformers import TrainerCallback

from equalize.in_memory import PlanLike
from equalize.integrations.training import EqualizedTraining


class EqualizeTrainerCallback(TrainerCallback):  # type: ignore[misc]
    """Trains through the equalizers of a plan; what the trainer saves and the trained model are plain.

    The optimizer and its state are those of the plain network, parameter by parameter: the callback attaches after they
    were built, and the parameters stay the objects that they are. A callback that averages parameters of its own copy
    of the network makes that copy after this one: list it later.

    Args:
        plan: a plan, or where it lies; without, that of the directory or Hub id which `from_pretrained` was given.
    """

    def __init__(self, plan: PlanLike | None = None) -> None:
        self._training = EqualizedTraining(type(self).__name__, plan)

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Attaches; a checkpoint that is resumed was loaded before."""
        model = others["model"]
        source = getattr(getattr(model, "config", None), "_name_or_path", None)
        self._training.begin(model, [], source)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Folds; the best model was loaded before."""
        self._training.end()
