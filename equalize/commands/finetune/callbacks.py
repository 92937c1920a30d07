"""What happens at a training's logs and saves: lines of metrics.jsonl, the best model into OUT, progress."""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState
from transformers.utils import WEIGHTS_NAME

from equalize.checkpoint import Checkpoint
from equalize.commands.finetune.config import TrainConfig
from equalize.commands.finetune.run_directory import RunDirectory
from equalize.distributed import is_main
from equalize.errors import NumericsError
from equalize.messages import Progress
from equalize.plan.attach import fold
from equalize.plan.plan import Plan

__all__ = ["CheckpointWriter", "EvalSaveCallback", "read_weights"]


def read_weights(state_directory: Path) -> dict[str, Tensor]:
    """The network's state dict in a state that was saved for resuming, on the CPU."""
    state = torch.load(state_directory / WEIGHTS_NAME, map_location="cpu", weights_only=True)
    return {key.removeprefix("network."): tensor for key, tensor in state.items()}  # as `ModelWithLoss` calls it


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointWriter:
    """Writes what was trained, from a state in OUT/last, in the format that the model came in."""

    checkpoint: Checkpoint
    """With a copy of the network on the CPU, whole and as it was before the first step, perhaps parametrized by
    `attach`: the one that is trained may lie in parts in several processes."""
    run: RunDirectory
    plan: Plan | None
    facts: Mapping[str, Any]
    """Of the training, for the receipt."""
    reduced_labels: bool
    """Whether it was trained on labels moved down by one; its image processor shall say so."""

    def write_best(self, state: TrainerState) -> None:
        """Makes the state of this step the model of OUT if it is the best so far, or the last where none is scored."""
        if state.best_global_step == state.global_step:
            self.run.put_model(lambda directory: self._write(directory, state.global_step))

    def write_last(self, state: TrainerState) -> None:
        """Puts the model of the last step where it belongs: beside the best, or in OUT where nothing was scored."""
        if not state.best_global_step:
            self.run.put_model(lambda directory: self._write(directory, state.global_step))
        elif state.best_global_step != state.global_step:
            self._write(self.run.last / "model", state.global_step)

    def _write(self, directory: Path, step: int) -> None:
        model = copy.deepcopy(self.checkpoint.model)
        model.load_state_dict(read_weights(self.run.state_of(step)))
        fold(model)
        finetuned = {**self.facts, "step": step, "score": self.run.score_of(step)}
        plan = self.plan and replace(self.plan, facts={**self.plan.facts, "finetuned": finetuned})
        replace(self.checkpoint, model=model).save(directory, plan, overwrite=True)
        self._correct_processor(directory / "preprocessor_config.json")

    def _correct_processor(self, path: Path) -> None:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        wrong = [
            key for key in ("do_reduce_labels", "reduce_labels") if content.get(key) not in (None, self.reduced_labels)
        ]
        if wrong:
            content |= dict.fromkeys(wrong, self.reduced_labels)
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class EvalSaveCallback(TrainerCallback):  # type: ignore[misc]
    """What transformers' own callbacks leave to do when a step ends, and after each log and save."""

    def __init__(self, config: TrainConfig, writer: CheckpointWriter, progress: Progress) -> None:
        self._config = config
        self._writer = writer
        self._progress = progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Reports where the training stands."""
        self._report(args, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Logs the last step too, and scores and saves after `eval_first`."""
        control.should_log |= state.global_step == state.max_steps
        if state.global_step == self._config.eval_first:
            control.should_evaluate = args.eval_strategy != "no"
            control.should_save = True
        self._report(args, state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        """Adds a line to metrics.jsonl.

        Raises:
            NumericsError: the loss is not finite.
        """
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            where, remedy = f"step {state.global_step}", "use a smaller --lr, or --precision fp32"
            raise NumericsError(where, "the loss is not finite", got=logs["loss"], remedy=remedy)
        if is_main():
            line = {"step": state.global_step, "epoch": state.epoch, "loss": logs["loss"], "lr": logs["learning_rate"]}
            self._writer.run.record(line)

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Writes the model of OUT if it is the best so far."""
        if is_main():
            self._writer.write_best(state)

    def _report(self, args: Any, state: Any) -> None:
        pairs = self._config.batch_size * self._config.accumulate * args.world_size
        self._progress(pairs * state.global_step, pairs * state.max_steps)
