"""Writes a training's state: lines of metrics.jsonl and the model in OUT; tells the monitor of its steps."""

import copy
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState
from transformers.utils import WEIGHTS_NAME

from equalize.checkpoint.checkpoint import Checkpoint
from equalize.commands.finetune.config import TrainConfig
from equalize.commands.finetune.run_directory import RunDirectory
from equalize.commands.training_record import SETTINGS_FILE
from equalize.messages import TrainingMonitor
from equalize.plan.attach import fold
from equalize.plan.plan import Plan


def read_weights(state_directory: Path) -> dict[str, Tensor]:
    """The network's state dict in a state that was saved for resuming, on the CPU."""
    state = torch.load(state_directory / WEIGHTS_NAME, map_location="cpu", weights_only=True)
    return {key.removeprefix("network."): tensor for key, tensor in state.items()}  # as `ModelWithLoss` calls it


def lines_of(state: TrainerState) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl: losses as logged, and evaluations."""
    lines = []
    for entry in state.log_history:
        at = {"step": entry["step"], "epoch": entry["epoch"]}
        if "loss" in entry:
            lines.append({**at, "loss": entry["loss"], "lr": entry["learning_rate"]})
        elif "score" in entry:
            lines.append({**at, **entry["score"]})
    return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointWriter:
    """Writes what was trained, from a state in OUT/last, in the format that the model came in."""

    checkpoint: Checkpoint
    """With a copy of the network on the CPU, whole and as it was before the first step, perhaps parametrized by
    `attach`: the one that is trained may lie in parts in several processes."""
    run: RunDirectory
    plan: Plan | None
    facts: Mapping[str, Any]
    """Facts about the training, for equalize.json."""
    monitor: TrainingMonitor
    models: bool = True
    """Whether models are written at all, not only the trainer's own states."""

    def write_best(self, state: TrainerState) -> None:
        """Makes the state of this step the model of OUT if it is the best so far."""
        if self.models and state.best_global_step == state.global_step:
            self._put(state)

    def write_last(self, state: TrainerState) -> None:
        """Writes the model of the last step: to OUT/last/model beside the best, or to OUT where nothing was scored."""
        if not self.models:
            return
        shutil.rmtree(self.run.last / "model", ignore_errors=True)  # of a training that was complete before this one
        if not state.best_global_step:
            self._put(state)
        elif state.best_global_step != state.global_step:
            self._write(self.run.last / "model", state)
            shutil.copy(self.run.path / SETTINGS_FILE, self.run.last / "model")

    def _put(self, state: TrainerState) -> None:
        self.run.put_model(lambda directory: self._write(directory, state))
        self.monitor.wrote()

    def read_model(self, step: int) -> nn.Module:
        """The network after a step of which the state is kept, with plain weights, on the CPU."""
        model = copy.deepcopy(self.checkpoint.model)
        model.load_state_dict(read_weights(self.run.state_of(step)))
        fold(model)
        return model

    def _write(self, directory: Path, state: TrainerState) -> None:
        step = state.global_step
        scores = {entry["step"]: entry["score"] for entry in state.log_history if "score" in entry}
        finetuned = {**self.facts, "step": step, "score": scores.get(step)}
        plan = self.plan and replace(self.plan, facts={**self.plan.facts, "finetuned": finetuned})
        replace(self.checkpoint, model=self.read_model(step)).save(directory, plan, overwrite=True)


class EvalSaveCallback(TrainerCallback):  # type: ignore[misc]
    """Evaluates, saves and logs at steps that transformers' own callbacks do not cover."""

    def __init__(self, config: TrainConfig, monitor: TrainingMonitor) -> None:
        self._config = config
        self._monitor = monitor

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Tells where the training begins."""
        self._monitor.stepped(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Logs the last step too, and scores and saves after `eval_first`."""
        control.should_log |= state.global_step == state.max_steps
        if state.global_step == self._config.eval_first:
            control.should_evaluate = args.eval_strategy != "no"
            control.should_save = True
        self._monitor.stepped(state.global_step, state.max_steps)
