"""`transformers.Trainer` for segmentation: our pairs, our loss, our score; state in OUT/last."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerControl, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import WEIGHTS_NAME

from equalize.commands.finetune.callbacks import Listeners, Rhythm, best_of
from equalize.commands.finetune.config import Recipe
from equalize.commands.finetune.loss import Trained
from equalize.commands.finetune.optimizer import make_optimiser, make_schedule
from equalize.commands.finetune.run_directory import RunDirectory
from equalize.commands.finetune.sharding import settle
from equalize.data.pairs import EpochOrder, TrainingPairs, collate
from equalize.distributed import broadcast_buffers, is_main, wait
from equalize.errors import InputError, NumericsError, ResourceError

__all__ = ["SegmentationTrainer", "arguments", "check_trackers"]


def arguments(recipe: Recipe, run: RunDirectory, *, device: torch.device, pairs: int) -> TrainingArguments:
    """The resolved recipe as transformers spells it; when to log, score and save is decided by `Rhythm`."""
    args = TrainingArguments(
        output_dir=str(run.last),
        num_train_epochs=recipe.epochs or 1,
        max_steps=recipe.max_steps or -1,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        max_grad_norm=recipe.clip,
        bf16=recipe.precision == "bf16",
        fp16=recipe.precision == "fp16",
        seed=recipe.seed,
        use_cpu=device.type == "cpu",
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=device.type == "cuda",
        dataloader_drop_last=pairs >= recipe.batch_size,  # a batch of one is too small for some BatchNorms
        ddp_find_unused_parameters=True,
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        save_total_limit=1,
        report_to=list(recipe.report_to),
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    if recipe.precision == "fp32":
        args.mixed_precision = "no"  # also where Accelerate's configuration has another
    return args


def check_trackers(names: Sequence[str]) -> None:
    """Demands that transformers can report to each.

    Raises:
        InputError: it knows no such tracker. ResourceError: the tracker is not installed.
    """
    for name in names:
        try:
            for tracker in get_reporting_integration_callbacks([name]):
                tracker()
        except ValueError as error:
            raise InputError("--report-to", "is unknown", got=name, expected="tensorboard, trackio") from error
        except (RuntimeError, ImportError) as error:
            raise ResourceError("--report-to", f"{name} is not installed", remedy=f"pip install {name}") from error


class SegmentationTrainer(Trainer):  # type: ignore[misc]
    """Trains a network of any family; resumes bit for bit.

    Args:
        trained: the network with its loss.
        backbone: its module path.
        pairs: what it is trained on.
        recipe: how.
        args: from `arguments`.
        run: where the state goes.
        listeners: who is told.
    """

    def __init__(
        self,
        trained: Trained,
        backbone: str | None,
        pairs: TrainingPairs,
        recipe: Recipe,
        args: TrainingArguments,
        run: RunDirectory,
        listeners: Listeners,
    ) -> None:
        self.optimizer: Optimizer | None
        self.lr_scheduler: LambdaLR | None
        self.control: TrainerControl
        self._recipe = recipe
        self._run = run
        self._listeners = listeners
        self._backbone = backbone
        super().__init__(
            model=trained,
            args=args,
            data_collator=collate,
            train_dataset=pairs,
            callbacks=[Rhythm(recipe, listeners)],
        )
        self.model_accepts_loss_kwargs = False
        settle(self.accelerator.state)
        self.remove_callback(PrinterCallback)  # stdout is the command's

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        assert isinstance(self.train_dataset, TrainingPairs)
        return EpochOrder(len(self.train_dataset), self._recipe.seed)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Spreads the network over the processes.

        Raises:
            InputError: FSDP does not take it as it was told to cut it.
        """
        try:
            return super()._prepare_for_training(*args, **kwargs)
        except (ValueError, KeyError) as error:
            if not self.is_fsdp_enabled:
                raise
            raise InputError(
                "accelerate",
                f"FSDP does not take this network ({' '.join(str(error).split())[:160]})",
                remedy="try fsdp_auto_wrap_policy: NO_WRAP",
            ) from error

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """See `make_optimiser`."""
        if self.optimizer is None:
            prefix = f"network.{self._backbone}" if self._backbone else None
            self.optimizer = make_optimiser(self.model if model is None else model, prefix, self._recipe)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        """See `make_schedule`."""
        if self.lr_scheduler is None:
            self.lr_scheduler = make_schedule(self.create_optimizer(), num_training_steps, self._recipe)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One batch.

        Raises:
            EqualizeError: a pair could not be read.
            InputError: the batch is too small for the network.
        """
        if "failure" in inputs:
            raise inputs["failure"]
        try:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss
        except ValueError as error:
            if not str(error).startswith("Expected more than 1 value per channel"):
                raise
            raise InputError(
                "--batch-size",
                "is too small for a normalisation of this network",
                remedy="use 2 or more, or --freeze-norms",
            ) from error

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Scores the validation split; a better mIoU than ever before is reported to `improved`."""
        assert self._listeners.score is not None
        broadcast_buffers(self.model)
        score = self._listeners.score(self._logits if self.is_fsdp_enabled or self.is_deepspeed_enabled else None)
        best = best_of(self.state.log_history)[1]
        better = score.mIoU is not None and (best is None or score.mIoU > best)
        weights = self.weights() if better else {}
        metrics = {f"eval_{key}": getattr(score, key) for key in ("mIoU", "mAcc", "aAcc")}
        self.log(dict(metrics))
        line = {"step": self.state.global_step, "epoch": self.state.epoch, **self._listeners.scored_on}
        if is_main():
            self._run.record({**line, **score.to_json()})
            if better:
                self._listeners.improved(self.state.global_step, score, weights)
        wait()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A line of metrics.jsonl for every training log.

        Raises:
            NumericsError: the loss is not finite.
        """
        super().log(logs, start_time)
        if "loss" not in logs:
            return
        step = self.state.global_step
        if not math.isfinite(logs["loss"]):
            raise NumericsError(
                f"step {step}",
                "the loss is not finite",
                got=logs["loss"],
                remedy="use a smaller --lr, or --precision fp32",
            )
        if is_main():
            self._run.record(
                {"step": step, "epoch": self.state.epoch, "loss": logs["loss"], "lr": logs["learning_rate"]}
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except RuntimeError as error:  # what torch makes of a full disk
            if "PytorchStreamWriter" not in str(error):
                raise
            raise ResourceError(
                self._run.last,
                "the state cannot be written, most often for want of space",
                remedy="make room, --resume",
            ) from error

    def weights(self) -> dict[str, Tensor]:
        """The network's state dict, put together in the main process where all hold parts; every process must ask."""
        return _of_network(self.accelerator.get_state_dict(self.model_wrapped) or {})

    def weights_in(self, checkpoint: Path) -> dict[str, Tensor]:
        """The network's state dict in a saved state."""
        return _of_network(torch.load(checkpoint / WEIGHTS_NAME, map_location="cpu", weights_only=True))

    def _logits(self, images_NCHW: Tensor) -> Tensor:
        """Of the network as it is spread over the processes."""
        logits: Tensor = self.model(**self._prepare_inputs({"pixel_values": images_NCHW}))["logits"]
        return logits

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The weights as the optimizer sees them; not as safetensors, which refuses weights that are shared."""
        if self.args.should_save:
            directory = output_dir or self.args.output_dir
            os.makedirs(directory, exist_ok=True)
            torch.save(self.model.state_dict() if state_dict is None else state_dict, f"{directory}/{WEIGHTS_NAME}")


def _of_network(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the name that `Trained` has for it."""
    return {key.removeprefix("network."): tensor for key, tensor in state.items()}
