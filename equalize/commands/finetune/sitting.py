"""One sitting of a training: from the first step, or from where the last sitting stopped, to the end."""

import copy
import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import TrainerState

from equalize.checkpoint import Checkpoint
from equalize.commands.evaluate import Evaluating, Logits, confusion
from equalize.commands.finetune.callbacks import Listeners, best_of
from equalize.commands.finetune.config import Recipe
from equalize.commands.finetune.loss import Criterion, Trained, backbone_of
from equalize.commands.finetune.optimizer import freeze
from equalize.commands.finetune.run_directory import RunDirectory
from equalize.commands.finetune.splits import Splits, training_pairs
from equalize.commands.finetune.trainer import SegmentationTrainer, arguments
from equalize.commands.images import Progress
from equalize.commands.labels import Labelled
from equalize.distributed import is_main, wait
from equalize.eval_mode import eval_mode
from equalize.metrics import Score
from equalize.plan.attach import fold
from equalize.plan.plan import Plan

__all__ = ["Keeper", "train", "unchanged_globals"]

State = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeper:
    """Saves the network that is being trained, in the format it came in.

    Attributes:
        checkpoint: with a copy of the network on the CPU, whole and as it was before the first step, perhaps
            parametrized by `attach`: the one that is trained may lie in parts in several processes.
        run: where it goes.
        plan: of its equalization.
        facts: of the training, for the receipt.
        scored_on: "data" and "split", by their names, where something is scored.
        reduced_labels: whether it was trained on labels moved down by one; its image processor shall say so.
    """

    checkpoint: Checkpoint
    run: RunDirectory
    plan: Plan | None
    facts: Mapping[str, Any]
    scored_on: Mapping[str, str | None]
    reduced_labels: bool

    def keep(self, step: int, score: Score | None, state: State) -> None:
        """Makes the network with that state dict the model of OUT."""
        self.run.put_model(partial(self._save, step=step, score=score, state=state))

    def keep_last(self, step: int, score: Score | None, state: State) -> None:
        """Puts the network of the last step beside the best one."""
        self._save(self.run.last / "model", step=step, score=score, state=state, overwrite=True)

    def _save(self, directory: Path, *, step: int, score: Score | None, state: State, overwrite: bool = False) -> None:
        model = copy.deepcopy(self.checkpoint.model)
        model.load_state_dict(state)
        fold(model)
        trained = {**self.facts, "step": step, "score": self._told(score)}
        plan = self.plan and replace(self.plan, facts={**self.plan.facts, "finetuned": trained})
        replace(self.checkpoint, model=model).save(directory, plan, overwrite=overwrite)
        self._tell_processor(directory / "preprocessor_config.json")

    def _tell_processor(self, path: Path) -> None:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        stale = [
            key
            for key in ("do_reduce_labels", "reduce_labels")
            if content.get(key, None) not in (None, self.reduced_labels)
        ]
        if stale:
            content |= dict.fromkeys(stale, self.reduced_labels)
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _told(self, score: Score | None) -> dict[str, Any] | None:
        return {**self.scored_on, **score.to_json()} if score else None


def train(
    checkpoint: Checkpoint,
    splits: Splits,
    recipe: Recipe,
    keeper: Keeper,
    device: torch.device,
    progress: Progress,
    say: Callable[[str], None],
) -> TrainerState:
    """Trains, scores, saves; the model is left as it was after the last step.

    Returns:
        What transformers knows of the run.

    Raises:
        NumericsError: the loss is not finite. EqualizeError: a pair cannot be read.
    """
    run = keeper.run
    backbone = backbone_of(checkpoint)
    criterion = Criterion(
        ignore_index=recipe.ignore_index,
        class_weights=recipe.class_weights,
        label_smoothing=recipe.label_smoothing,
        aux_weight=recipe.aux_weight,
    )
    trained = Trained(checkpoint, criterion, freeze(checkpoint.model, backbone, recipe))
    pairs = training_pairs(checkpoint, splits.train, recipe)
    scores: list[Score] = []

    def score(labelled: Labelled, together: Logits | None) -> Score:
        how = Evaluating(
            size=recipe.size, batch_size=recipe.batch_size, precision=recipe.precision or "fp32", workers=recipe.workers
        )
        with eval_mode(trained):
            counted = confusion(checkpoint, labelled, how, device, together=together)
            scores.append(counted.score(labelled.names))
        return scores[-1]

    listeners = Listeners(
        score=partial(score, splits.val) if splits.val else None,
        scored_on=keeper.scored_on,
        improved=keeper.keep,
        progress=progress,
        say=say,
    )
    args = arguments(recipe, run, device=device, pairs=len(pairs))
    trainer = SegmentationTrainer(trained, backbone, pairs, recipe, args, run, listeners)
    begun = run.checkpoint() if run.resumed else None
    state = TrainerState.load_from_json(str(begun / "trainer_state.json")) if begun else None
    if begun and state and _is_over(state, recipe):
        say(f"the training was complete after step {state.global_step}")
        weights = trainer.weights_in(begun)
        checkpoint.model.load_state_dict(weights)
    else:
        say(f"going on after step {state.global_step}" if state else "starting at step 0")
        trainer.train(resume_from_checkpoint=str(begun) if begun else None)
        state = trainer.state
        weights = trainer.weights()
    if is_main():
        _finish(keeper, state, scores[-1] if scores else None, weights)
    wait()
    return state


def _is_over(state: TrainerState, recipe: Recipe) -> bool:
    stopped = recipe.patience is not None and best_of(state.log_history)[0] >= recipe.patience
    return stopped or state.global_step >= state.max_steps


def _finish(keeper: Keeper, state: TrainerState, score: Score | None, weights: State) -> None:
    """Without scores the last model is the one of OUT; else it lies beside the best where it is another."""
    since_best, best = best_of(state.log_history)
    if best is None:
        keeper.keep(state.global_step, score, weights)
    elif since_best:
        keeper.keep_last(state.global_step, score, weights)


@contextmanager
def unchanged_globals() -> Iterator[None]:
    """Restores the random numbers of Python, NumPy and torch that transformers seeds."""
    python, of_numpy = random.getstate(), numpy.random.get_state()
    devices = range(torch.cuda.device_count())
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(of_numpy)
