"""`transformers.Trainer` for segmentation: our pairs, our loss, our score; state in OUT/last."""

import math
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerControl, TrainerState
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import WEIGHTS_NAME

from equalize.checkpoint.outputs import logits_of_padded
from equalize.commands.evaluate import score_split
from equalize.commands.finetune.arguments import arguments_of
from equalize.commands.finetune.backbone_cache import CachedPairs, open_cache
from equalize.commands.finetune.callbacks import CheckpointWriter, EvalSaveCallback, lines_of, read_weights
from equalize.commands.finetune.config import TrainConfig
from equalize.commands.finetune.loss import ModelWithLoss, backbone_of
from equalize.commands.finetune.optimizer import freeze, make_optimizer, make_schedule
from equalize.commands.finetune.run_directory import was_stopped
from equalize.commands.finetune.sharding import check_deepspeed
from equalize.commands.finetune.splits import Task, training_pairs
from equalize.commands.labels import LabeledSplit
from equalize.data.loader import worker_deaths
from equalize.data.pairs import EpochOrder, TrainingPairs, collate
from equalize.distributed import broadcast_buffers, is_main, wait
from equalize.errors import InputError, NumericsError, ResourceError
from equalize.eval_mode import eval_mode
from equalize.messages import Notify
from equalize.plan.plain_state import settle
from equalize.quiet import quiet_transformers

_REMEDY = "use a smaller --lr, or --precision fp32"  # where numbers are not finite


def train(task: Task, writer: CheckpointWriter, notify: Notify) -> TrainerState:
    """Trains, scores, saves; goes on from the newest state where the run is resumed.

    The model is left as it was after the last step, the global random numbers as they were before.

    Raises:
        NumericsError: the loss is not finite. EqualizeError: a pair cannot be read.
    """
    newest = writer.run.newest_state() if writer.run.resumed else None
    before = TrainerState.load_from_json(str(newest / "trainer_state.json")) if newest else None
    if before and is_main():
        writer.run.write_metrics(lines_of(before))  # the previous run may have ended after saving this state
        writer.write_best(before)
    with unchanged_globals(), quiet_transformers():
        trainer = SegmentationTrainer(task, writer, notify)
        if newest and before and was_stopped(newest) and _is_complete(before, task.config):
            notify(f"the training was complete after step {before.global_step}")
            task.checkpoint.model.load_state_dict(read_weights(newest))
            state = before
        else:
            notify(f"going on after step {before.global_step}" if before else "starting at step 0")
            with worker_deaths():
                trainer.train(resume_from_checkpoint=str(newest) if newest else None)
            state = trainer.state
    if state is not before and state.global_step < state.max_steps:
        notify(f"stopped early at step {state.global_step}: no better mIoU in {task.config.patience} evaluations")
    if is_main():
        writer.write_last(state)
    wait()
    return state


def _is_complete(state: TrainerState, config: TrainConfig) -> bool:
    """Whether a training that was stopped has the length that is asked for; more may be asked than before."""
    if config.max_steps is not None:
        return bool(state.max_steps >= config.max_steps)
    return bool(state.num_train_epochs >= (config.epochs or 1))


@contextmanager
def unchanged_globals() -> Iterator[None]:
    """Restores the random numbers of Python, NumPy and torch that transformers seeds."""
    python, of_numpy = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(of_numpy)


def check_trackers(names: Sequence[str]) -> None:
    """Refuses trackers that transformers lacks or that are not installed."""
    try:
        for tracker in get_reporting_integration_callbacks(list(names)):
            tracker()
    except ValueError as error:
        raise InputError("--report-to", str(error)) from error
    except (RuntimeError, ImportError) as error:
        raise ResourceError("--report-to", str(error)) from error


class SegmentationTrainer(Trainer):  # type: ignore[misc]
    """Trains a network of any family; resumes bit for bit."""

    optimizer: Optimizer | None
    lr_scheduler: LambdaLR | None
    control: TrainerControl

    def __init__(self, task: Task, writer: CheckpointWriter, notify: Notify) -> None:
        self._task = task
        self._config = config = task.config
        self._writer = writer
        self._backbone = backbone_of(task.checkpoint)
        frozen = freeze(task.checkpoint.model, self._backbone, config)
        self._cache = open_cache(task, writer.run.last, notify, partial(writer.monitor.working, "caching"))
        pairs = self._cache.training() if self._cache else training_pairs(task)
        backbone = self._cache.backbone if self._cache else None
        super().__init__(
            model=ModelWithLoss(task.checkpoint, config, task.trained, frozen, backbone),
            args=arguments_of(task, str(writer.run.last), pairs=len(pairs)),
            data_collator=dict if self._cache else collate,  # `CachedPairs` gives whole batches
            train_dataset=pairs,
            eval_dataset=task.val,
            callbacks=[EvalSaveCallback(config, writer.monitor)],
        )
        if config.patience:
            self.add_callback(EarlyStoppingCallback(config.patience))
        self.model_accepts_loss_kwargs = False
        if self._cache and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise InputError("--cache-backbone", "does not go with FSDP or DeepSpeed", remedy="leave it away")
        if self.is_deepspeed_enabled:
            check_deepspeed(self.accelerator.state.deepspeed_plugin)
        self.remove_callback(PrinterCallback)  # stdout is the command's

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        assert isinstance(self.train_dataset, TrainingPairs | CachedPairs)
        return EpochOrder(len(self.train_dataset), self._config.seed)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._prepare_for_training(*args, **kwargs)
        except (ValueError, KeyError) as error:
            if not self.is_fsdp_enabled:
                raise
            what = f"FSDP does not take this network ({' '.join(str(error).split())[:160]})"
            raise InputError("accelerate", what, remedy="try fsdp_auto_wrap_policy: NO_WRAP") from error

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """See `make_optimizer`."""
        if self.optimizer is None:
            prefix = f"network.{self._backbone}" if self._backbone else None
            fusion = [f"network.{key}" for key in self._task.fusion]
            self.optimizer = make_optimizer(self.model if model is None else model, prefix, self._config, fusion)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        """See `make_schedule`."""
        if self.lr_scheduler is None:
            self.lr_scheduler = make_schedule(optimizer or self.create_optimizer(), num_training_steps, self._config)
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Also sets the rates to those of this schedule: where more steps are asked for, the state has others."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.optimizer is not None and isinstance(self.lr_scheduler, LambdaLR):
            schedule = self.lr_scheduler
            factors = [of_step(schedule.last_epoch) for of_step in schedule.lr_lambdas]
            rates = [peak * factor for peak, factor in zip(schedule.base_lrs, factors, strict=True)]
            schedule.load_state_dict({**schedule.state_dict(), "_last_lr": rates})
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One batch; raises errors that a data worker returned as values."""
        if "failure" in inputs:
            raise inputs["failure"]
        try:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss
        except ValueError as error:
            if not str(error).startswith("Expected more than 1 value per channel"):
                raise
            what, remedy = "is too small for a normalization of this network", "use 2 or more, or --freeze-norms"
            raise InputError("--batch-size", what, remedy=remedy) from error

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Scores the validation split by its confusion matrix; every process scores its share."""
        val: LabeledSplit = self.eval_dataset
        together = self._logits if self.is_fsdp_enabled or self.is_deepspeed_enabled else None
        inputs = self._cache.inputs(val) if self._cache else None
        broadcast_buffers(self.model)
        with eval_mode(self.model):
            try:
                score = score_split(
                    *(self._task.checkpoint, val, self._config.scoring(), self._task.device),
                    progress=partial(self._writer.monitor.working, "scoring"),
                    together=together,
                    inputs=inputs,
                )
            except NumericsError as error:
                error.remedy = _REMEDY
                raise
        found = {"eval_mIoU": score.mIoU, "eval_mAcc": score.mAcc, "eval_aAcc": score.aAcc}
        metrics = {key: math.nan if value is None else value for key, value in found.items()}  # nan is never better
        self.log({**metrics, "score": {"data": val.dataset.name, "split": val.dataset.split, **score.to_json()}})
        before = self.state.best_metric if self.state.best_global_step else None
        self._writer.monitor.scored(*self._at(), miou=score.mIoU, best_before=before)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Also writes metrics.jsonl; a NumericsError if the loss is not finite."""
        if not math.isfinite(logs.get("loss", 0)):
            where = f"step {self.state.global_step}"
            raise NumericsError(where, "the loss is not finite", got=logs["loss"], remedy=_REMEDY)
        score = logs.pop("score", None)  # in the state alone: trackers take numbers
        super().log(logs, start_time)
        if score is not None:
            self.state.log_history[-1]["score"] = score
        if is_main():
            self._writer.run.write_metrics(lines_of(self.state))
        if "loss" in logs:
            self._writer.monitor.logged(*self._at(), loss=logs["loss"], lr=logs["learning_rate"])

    def _at(self) -> tuple[int, int]:
        return self.state.global_step, self.state.max_steps

    def _logits(self, images_NCHW: Tensor) -> Tensor:
        """Logits (N, classes, h, w) of the network, possibly sharded over the processes."""

        def run(padded: Tensor) -> Tensor:
            logits: Tensor = self.model(**self._prepare_inputs({"pixel_values": padded}))["logits"]
            return logits

        return logits_of_padded(run, images_NCHW, self._task.checkpoint.multiple)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
            settle(self._task.checkpoint.model)  # to the bits that --resume starts with
            if is_main():
                self._writer.write_best(self.state)
        except RuntimeError as error:  # torch's error for a full disk
            if "PytorchStreamWriter" not in str(error):
                raise
            what = "the state cannot be written, most often for want of space"
            raise ResourceError(self._writer.run.last, what, remedy="make room, --resume") from error

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Plain weights, unless they lie in parts; not as safetensors, which refuses weights that are shared."""
        if self.args.should_save:
            directory = output_dir or self.args.output_dir
            os.makedirs(directory, exist_ok=True)
            torch.save(self.model.state_dict() if state_dict is None else state_dict, f"{directory}/{WEIGHTS_NAME}")
