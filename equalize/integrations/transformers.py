"""transformers' `Trainer`: `Trainer(..., callbacks=[EqualizeTrainerCallback()])`."""

from functools import partial
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from equalize.in_memory import PlanLike
from equalize.integrations.training import EqualizedTraining
from equalize.plan.plain_state import settle

_OWN_KEYS = {"save_original_format": False}


class EqualizeTrainerCallback(TrainerCallback):  # type: ignore[misc]
    """Trains through the equalizers of a plan; what the trainer saves and the trained model are plain.

    The optimizer and its state are those of the plain network, parameter by parameter: the callback attaches after they
    were built, and the parameters stay the objects that they are. A callback that averages parameters of its own copy
    of the network makes that copy after this one: list it later.

    `Trainer` puts a checkpoint that it resumes, and the best one, into a model without the renaming of keys that
    `save_pretrained` does (huggingface/transformers#43701, #48805): of SegFormer and Swin nothing would be loaded. So
    checkpoints are saved under the keys of the model, which `from_pretrained` takes as well.

    Args:
        plan: a plan, or where it lies; without, that of the directory or Hub id which `from_pretrained` was given.
    """

    def __init__(self, plan: PlanLike | None = None) -> None:
        self._training = EqualizedTraining(type(self).__name__, plan)

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Attaches; a checkpoint that is resumed was loaded before."""
        model = others["model"]
        self._training.begin(model, [], getattr(getattr(model, "config", None), "_name_or_path", None))
        if isinstance(model, PreTrainedModel) and "save_pretrained" not in vars(model):
            model.save_pretrained = partial(model.save_pretrained, **_OWN_KEYS)

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Goes on from the bits that a resumed training starts with: optimizers without an epsilon see each."""
        settle(others["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Folds; the best model was loaded before."""
        self._training.end()
        saves = vars(others["model"]).get("save_pretrained")
        if isinstance(saves, partial) and saves.keywords == _OWN_KEYS:  # not one that the user put there
            del others["model"].save_pretrained
