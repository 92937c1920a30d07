"""When a training logs, scores, saves and stops, and who is told."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from equalize.commands.evaluate import Logits
from equalize.commands.finetune.config import Recipe
from equalize.commands.images import Progress
from equalize.metrics import Score

__all__ = ["Listeners", "Rhythm", "best_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listeners:
    """Who is told what while training runs.

    Attributes:
        score: gives the network's score on the validation split; None where there is none. Takes what gives the logits
            where each process holds but a part of the network, else None.
        scored_on: "data" and "split", for the record.
        improved: called in the main process with the step, the score and the network's state dict when that score is
            the best so far.
        progress: called with the pairs done and in all, repetitions included.
        say: called with a line for the user.
    """

    score: Callable[[Logits | None], Score] | None
    scored_on: Mapping[str, str | None]
    improved: Callable[[int, Score, Mapping[str, Tensor]], None]
    progress: Progress
    say: Callable[[str], None]


def best_of(history: list[dict[str, Any]]) -> tuple[int, float | None]:
    """The number of evaluations since the best, and its mIoU."""
    scores = [line["eval_mIoU"] for line in history if line.get("eval_mIoU") is not None]
    if not scores:
        return 0, None
    best = max(scores)
    return len(scores) - 1 - scores.index(best), best


class Rhythm(TrainerCallback):  # type: ignore[misc]
    """When to log, score, save and stop."""

    def __init__(self, recipe: Recipe, listeners: Listeners) -> None:
        self._recipe = recipe
        self._listeners = listeners

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Tells where the training stands."""
        self._tell(args, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Logs, and scores and saves every so many steps and at the last."""
        step, every = state.global_step, self._recipe.eval_every
        log_every = self._recipe.log_every or max(1, state.max_steps // 100)
        control.should_log = step % log_every == 0 or step in (1, state.max_steps)
        if step in (state.max_steps, self._recipe.eval_first) or (every and step % every == 0):
            self._score_and_save(control)
        self._tell(args, state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Scores and saves, unless steps are counted."""
        if self._recipe.eval_every is None and state.global_step < state.max_steps:
            self._score_and_save(control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Stops early."""
        patience = self._recipe.patience
        if patience is not None and best_of(state.log_history)[0] >= patience:
            self._listeners.say(f"stopped early at step {state.global_step}: no better mIoU in {patience} evaluations")
            control.should_training_stop = True

    def _tell(self, args: Any, state: Any) -> None:
        pairs = self._recipe.batch_size * self._recipe.accumulate * args.world_size
        self._listeners.progress(pairs * state.global_step, pairs * state.max_steps)

    def _score_and_save(self, control: Any) -> None:
        control.should_evaluate = self._listeners.score is not None
        control.should_save = True
