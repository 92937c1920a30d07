"""Training a checkpoint, with its equalization in effect, and writing it back in its own format."""

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

from equalize.checkpoint.checkpoint import Checkpoint
from equalize.checkpoint.loading import ModelName
from equalize.checkpoint.preprocess import Override
from equalize.commands.calibrate import calibrate_checkpoint
from equalize.commands.finetune.callbacks import CheckpointWriter, lines_of
from equalize.commands.finetune.config import TrainAs, TrainConfig
from equalize.commands.finetune.config_file import Subject, resolved_settings, to_yaml
from equalize.commands.finetune.loss import backbone_of
from equalize.commands.finetune.optimizer import make_optimizer
from equalize.commands.finetune.report import write_report
from equalize.commands.finetune.run_directory import RunDirectory, write_whole
from equalize.commands.finetune.sharding import check_launch
from equalize.commands.finetune.splits import Task, open_task
from equalize.commands.finetune.trainer import check_trackers, train
from equalize.data.hf_datasets import Choice
from equalize.device import device_of
from equalize.distributed import fail_together, from_main, gather, is_main, join, wait
from equalize.errors import InputError, ResourceError
from equalize.messages import SILENT, Notify, TrainingMonitor, counted, ignore
from equalize.plan.apply import apply
from equalize.plan.attach import attach, demand_trainable
from equalize.plan.plan import Plan

_ANY_VALUE_RESUMES = {"cache_dir", "workers", "device", "report_to"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finetuned:
    """The result of a training."""

    output: str
    """Holds the best model, or the last where nothing was scored."""
    steps: int
    epochs: float
    """In all, including the runs that were resumed, as `steps`."""
    strategy: str | None
    """The strategy of the equalization, if there is one."""
    train_as: TrainAs | None
    newly_initialized: tuple[str, ...]
    """State-dict keys that the checkpoint lacked."""
    best: dict[str, Any] | None
    """The line of metrics.jsonl with the highest mIoU."""
    last: dict[str, Any] | None
    """That of the last evaluation."""
    losses: tuple[tuple[int, float], ...]
    """(step, loss) as logged."""
    left_out: int | None
    """A class that is not scored."""
    seconds: float
    """Of this run alone."""

    def to_json(self) -> dict[str, Any]:
        """The object that `equalize finetune --json` prints."""
        content = asdict(self)
        del content["losses"], content["left_out"]
        return content | {"loss": self.losses[-1][1] if self.losses else None, "drawn": list(self.newly_initialized)}


def finetune(
    name: ModelName,
    data: str | Path,
    out: str | Path,
    config: TrainConfig | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    prepare: Callable[[Task], Plan | None] | None = None,
    models: bool = True,
    command: str = "",
    monitor: TrainingMonitor = SILENT,
    notify: Notify = ignore,
    warn: Notify = ignore,
) -> Finetuned:
    """`equalize finetune`. Leaves the global random numbers as they were; under `torchrun` every process calls it.

    Args:
        out, overwrite: see `run_directory`. resume: go on where a run with the same arguments stopped.
        prepare: changes the loaded model and gives the plan that is then in effect, instead of `config.calibrate`.
        models: whether to write models and the report; without, OUT holds what `resume` needs.
        command: the command line, for the record. monitor: is told of steps, losses, evaluations and models.

    Raises:
        InputError: something cannot be trained with; before the first step. NumericsError: the loss is not finite.
    """
    started, config = time.monotonic(), (config or TrainConfig()).resolved()
    run = open_run(name, data, out, config, resume=resume, overwrite=overwrite)
    device = join(training_device(config))
    notify, warn, monitor = (notify, warn, monitor) if is_main() else (ignore, ignore, SILENT)
    check_launch(device, ignore if prepare else notify)  # a comparison has its own way to take all GPUs
    task = open_task(name, data, config, device, notify, warn)
    refuse_early(task, will_have_plan=prepare is not None or config.calibrate is not None)
    subject = Subject.of(name, data)
    identity = identity_of(task, subject)
    if is_main():
        run.prepare(identity, to_yaml(subject, resolved_settings(task)), notify)
        run.record(command)
    wait()
    monitor.began()
    plan = prepare(task) if prepare else plan_in_effect(task, run, monitor, notify, warn)
    train_as = attach_plan(plan, config.train_as, task.checkpoint, notify)
    stored = task.checkpoint.with_reduced_labels(task.train.rule.reduce)
    writer = CheckpointWriter(
        checkpoint=replace(stored, model=copy.deepcopy(stored.model).cpu()),
        run=run,
        plan=plan,
        facts={"train_as": train_as, "data": str(data), **identity},
        monitor=monitor,
        models=models,
    )
    state = train(task, writer, notify)
    if models and is_main():
        write_report(task, writer, state, notify)
    return _result(str(out), task, state, writer, seconds=time.monotonic() - started)


def open_run(
    name: ModelName, data: str | Path, out: str | Path, config: TrainConfig, *, resume: bool, overwrite: bool
) -> RunDirectory:
    """OUT, which may neither be nor hold what is read."""
    read = (Choice.of(data).place, config.colors, config.class_names)
    return RunDirectory(out, name.source, read=read, resume=resume, overwrite=overwrite)


def _result(output: str, task: Task, state: TrainerState, writer: CheckpointWriter, *, seconds: float) -> Finetuned:
    lines = lines_of(state)
    scored = [line for line in lines if "mIoU" in line]
    return Finetuned(
        output=output,
        steps=state.global_step,
        epochs=float(state.epoch or 0),
        strategy=writer.plan.strategy if writer.plan else None,
        train_as=writer.facts["train_as"],
        newly_initialized=writer.checkpoint.newly_initialized,
        best=max((line for line in scored if line["mIoU"] is not None), key=lambda line: line["mIoU"], default=None),
        last=scored[-1] if scored else None,
        losses=tuple((line["step"], line["loss"]) for line in lines if "loss" in line),
        left_out=task.train.left_out,
        seconds=seconds,
    )


def training_device(config: TrainConfig) -> torch.device:
    """Where to train: one device for each process, which Accelerate numbers."""
    device = device_of(config.device)
    if device.index:
        raise InputError("--device", "has a number", got=config.device, remedy="set CUDA_VISIBLE_DEVICES instead")
    if config.precision == "fp16" and device.type == "cpu":
        raise ResourceError("--precision", "fp16 cannot be trained on a CPU", remedy="use fp32 or bf16")
    return device


def refuse_early(task: Task, *, will_have_plan: bool) -> None:
    """Refuses settings that would fail only after the training has begun."""
    config, weights, classes = task.config, task.config.class_weights, task.train.num_classes
    if weights is not None and len(weights) != classes:
        raise InputError("--class-weights", "is not one a class", got=len(weights), expected=classes)
    if config.patience is not None and task.val is None:
        raise InputError("--patience", "needs a validation split", remedy="leave it away, or name one with --val-split")
    if config.train_as == "explicit" and not will_have_plan and task.checkpoint.plan_json is None:
        raise InputError(
            "--train-as", "there is no equalization to train through", remedy="calibrate first, or --calibrate"
        )
    if task.checkpoint.plan_json is not None and not will_have_plan and config.train_as != "folded":
        demand_trainable(Plan.from_json(task.checkpoint.plan_json, task.name.source))
    check_trackers(config.report_to)
    make_optimizer(task.checkpoint.model, backbone_of(task.checkpoint), config)


def identity_of(task: Task, subject: Subject) -> dict[str, Any]:
    """The facts that a resumed run must share with this one."""
    recipe = asdict(resolved_settings(task))
    return {
        "source": subject.model,
        "revision": task.checkpoint.revision,
        "sha256": task.checkpoint.sha256,
        "key": task.name.key,
        "logits": task.checkpoint.output,
        "preprocess": asdict(Override.of(task.checkpoint.preprocess)),
        "seed of drawn weights": task.name.seed,
        "train": task.train.dataset.fingerprint(),
        "val": task.val.dataset.fingerprint() if task.val else None,
        "recipe": {key: value for key, value in recipe.items() if key not in _ANY_VALUE_RESUMES},
    }


def plan_in_effect(
    task: Task, run: RunDirectory, monitor: TrainingMonitor, notify: Notify, warn: Notify
) -> Plan | None:
    """The plan in effect, applied to the model; measured by all processes together, and read again when resuming."""
    config, source = task.config, task.name.source
    if config.calibrate is None:
        if task.checkpoint.plan_json is None:
            return None
        plan = Plan.from_json(task.checkpoint.plan_json, source)
        if "finetuned" in plan.facts:
            warn(f"{source} was trained since its scales were measured")
        return plan
    kept = run.last / "equalize.json"
    if not from_main(kept.is_file()):
        dataset = task.train.dataset
        with fail_together(_exit_code):
            plan = calibrate_checkpoint(
                task.name,
                dataset.root,
                run.path,
                strategy=config.calibrate,
                scale=config.scale or "step",
                force_preprocessing=True,  # a wrong input was warned of
                config=config.calibration(dataset.split),
                dry_run=True,
                demand_sites=False,
                progress=partial(monitor.working, "measuring"),
                notify=ignore,
                warn=warn,
            )
            if not plan.sites:
                warn(f"{source} has no fusion layer that can be equalized")
            if is_main():
                write_whole(kept, json.dumps(plan.to_json()))
            gather(None)  # all wait until it is written; if that fails, all fail
    plan = Plan.read(kept)
    apply(plan, task.checkpoint.model)
    return plan


def _exit_code(error: BaseException) -> int:
    """The exit code of the other processes where one fails; what is interrupted ends as Ctrl-C ends it."""
    if isinstance(error, OSError | MemoryError):  # such as a full disk
        return ResourceError.exit_code
    return int(getattr(error, "exit_code", 1 if isinstance(error, Exception) else 130))


def attach_plan(plan: Plan | None, train_as: TrainAs | None, checkpoint: Checkpoint, notify: Notify) -> TrainAs | None:
    """Attaches V unless `train_as` says otherwise: behind folded weights the gradients of weak branches stay weak."""
    if plan is not None and plan.strategy == "none":
        asked = plan.facts.get("optimizer", "adamw")
        notify(f"nothing is to be gained from equalizing (--optimizer {asked}): the network trains as it is")
    if plan is None or not plan.equalized:
        return None
    if train_as == "folded":
        notify("equalization: the optimizer trains the weights as they are stored (--train-as folded)")
        return "folded"
    attach(plan, checkpoint.model)
    layers = counted(len(plan.equalized), "fusion layer")
    notify(f"equalization: the optimizer trains the equalized weights of {layers}")
    return "explicit"
