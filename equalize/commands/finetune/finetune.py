"""Training a checkpoint, with its equalization in effect, and writing it back in its own format."""

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from equalize.checkpoint import Checkpoint
from equalize.checkpoint.families.transformers.config import quiet
from equalize.checkpoint.load import ModelName
from equalize.commands.calibrate import embed
from equalize.commands.finetune.config import Recipe, TrainAs
from equalize.commands.finetune.loss import Criterion, Trained, backbone_of
from equalize.commands.finetune.new_classes import load_for
from equalize.commands.finetune.optimizer import make_optimiser
from equalize.commands.finetune.run_directory import RunDirectory, write_whole
from equalize.commands.finetune.sharding import check_launch
from equalize.commands.finetune.sitting import Keeper, train, unchanged_globals
from equalize.commands.finetune.splits import Splits, check_splits, open_splits
from equalize.commands.finetune.trainer import check_trackers
from equalize.commands.images import Measuring, Progress, device_of
from equalize.distributed import is_main, join, wait
from equalize.errors import InputError, ResourceError
from equalize.plan.apply import apply
from equalize.plan.attach import attach
from equalize.plan.plan import Plan

__all__ = ["Finetuned", "finetune"]

_ANY_VALUE_RESUMES = {"workers", "device", "report_to"}

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finetuned:
    """What a training came to.

    Attributes:
        output: holds the best model, or the last where nothing was scored.
        steps, epochs: done in all, earlier sittings included.
        strategy: of the equalization, if there is one.
        train_as: what the optimiser saw of it.
        drawn: state-dict keys that were drawn before the training.
        best, last: lines of metrics.jsonl: the evaluations with the highest mIoU and of the last step.
        losses: (step, loss) as logged.
        seconds: of this sitting.
    """

    output: str
    steps: int
    epochs: float
    strategy: str | None
    train_as: TrainAs | None
    drawn: tuple[str, ...]
    best: dict[str, Any] | None
    last: dict[str, Any] | None
    losses: tuple[tuple[int, float], ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The object that `equalize finetune --json` prints."""
        content = asdict(self)
        del content["losses"]
        return content | {"loss": self.losses[-1][1] if self.losses else None, "drawn": list(self.drawn)}


def finetune(
    name: ModelName,
    data: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    prepare: Callable[[Checkpoint], Plan | None] | None = None,
    progress: Progress = lambda done, of: None,
    say: Say = lambda line: None,
    warn: Say = lambda line: None,
) -> Finetuned:
    """`equalize finetune`. Leaves the global random numbers as they were; under `torchrun` every process calls it.

    Args:
        name: the model.
        data: a data set with masks.
        out: the directory to write; see `run_directory`.
        recipe: how to train.
        resume: go on where an interrupted run with the same arguments stopped: same weights, same optimizer state.
        overwrite: whether `out` may exist.
        prepare: changes the loaded model and gives the plan that is then in effect, instead of `recipe.calibrate`.
        progress: called with the pairs trained on and to be trained on.
        say: called with what a user should know, a line at a time.
        warn: called with what a user may want to act on.

    Raises:
        InputError: the data, the model or a setting cannot be trained with; before the first step.
        NumericsError: the loss is not finite.
    """
    started = time.monotonic()
    recipe = (recipe or Recipe()).resolved()
    source = Path(name.source)
    run = RunDirectory(out, source if source.exists() else None, resume=resume, overwrite=overwrite)
    device = join(_device(recipe))
    if not is_main():
        say = warn = lambda line: None
    check_launch(device, warn)
    found = open_splits(data, recipe, say)
    name, checkpoint = load_for(name, recipe.num_classes or found.named_classes)
    say(f"preprocessing: {checkpoint.preprocess}")
    if checkpoint.newly_initialized:
        say(f"drawn anew under seed {name.seed}: {_listed(checkpoint.newly_initialized)}")
    checkpoint.model.to(device)
    checkpoint, splits = check_splits(checkpoint, found, recipe, device, say)
    _refuse_early(checkpoint, splits, recipe, will_have_plan=prepare is not None or recipe.calibrate is not None)
    identity = _identity(name, checkpoint, splits, recipe)
    if is_main():
        run.begin(identity, recipe.to_yaml())
    wait()
    plan = prepare(checkpoint) if prepare else _equalize(name, checkpoint, splits, recipe, run, say, warn)
    seen = _seen_by_optimiser(plan, recipe.train_as)
    train_as: TrainAs | None = ("explicit" if seen else "folded") if plan and plan.sites else None
    if seen:
        attach(seen, checkpoint.model)
        say(f"explicit equalization: the optimiser sees V of {len(seen.sites)} fusion layers")
    elif train_as:
        say("folded equalization: the optimiser sees the weights as they are stored")
    keeper = Keeper(
        checkpoint=replace(checkpoint, model=copy.deepcopy(checkpoint.model).cpu()),
        run=run,
        plan=plan,
        facts={"train_as": train_as, "data": str(data), **identity},
        scored_on={"data": splits.val.dataset.name, "split": splits.val.dataset.split} if splits.val else {},
        reduced_labels=splits.train.rule.reduce,
    )
    with unchanged_globals(), quiet():
        state = train(checkpoint, splits, recipe, keeper, device, progress, say)
    lines = run.lines()
    scored = [line for line in lines if "mIoU" in line]
    return Finetuned(
        output=str(out),
        steps=state.global_step,
        epochs=float(state.epoch or 0),
        strategy=plan.strategy if plan else None,
        train_as=train_as,
        drawn=checkpoint.newly_initialized,
        best=max((line for line in scored if line["mIoU"] is not None), key=lambda line: line["mIoU"], default=None),
        last=scored[-1] if scored else None,
        losses=tuple((line["step"], line["loss"]) for line in lines if "loss" in line),
        seconds=time.monotonic() - started,
    )


def _listed(keys: tuple[str, ...]) -> str:
    """All of a few keys: those of a classifier; of a decoder's many the first."""
    return ", ".join(keys) if len(keys) <= 6 else f"{len(keys)} tensors ({', '.join(keys[:3])} and others)"


def _device(recipe: Recipe) -> torch.device:
    """Where to train: one device for each process, which Accelerate numbers.

    Raises:
        InputError: a numbered device. ResourceError: it is not there, or not able to.
    """
    device = device_of(recipe.device)
    if device.index:
        raise InputError("--device", "has a number", got=recipe.device, remedy="set CUDA_VISIBLE_DEVICES instead")
    if recipe.precision == "fp16" and device.type == "cpu":
        raise ResourceError("--precision", "fp16 cannot be trained on a CPU", remedy="use fp32 or bf16")
    return device


def _identity(name: ModelName, checkpoint: Checkpoint, splits: Splits, recipe: Recipe) -> dict[str, Any]:
    """What a run that is resumed must have in common with this one."""
    settings = {key: value for key, value in asdict(recipe).items() if key not in _ANY_VALUE_RESUMES}
    return {
        "source": name.source,
        "revision": checkpoint.revision,
        "sha256": checkpoint.sha256,
        "seed of drawn weights": name.seed,
        "train": splits.train.dataset.fingerprint(),
        "val": splits.val.dataset.fingerprint() if splits.val else None,
        "recipe": settings,
    }


def _refuse_early(checkpoint: Checkpoint, splits: Splits, recipe: Recipe, *, will_have_plan: bool) -> None:
    """What would fail only once the training has begun.

    Raises:
        InputError: names the setting.
    """
    weights = recipe.class_weights
    if weights is not None and len(weights) != splits.train.num_classes:
        raise InputError("--class-weights", "is not one a class", got=len(weights), expected=splits.train.num_classes)
    if recipe.patience is not None and splits.val is None:
        raise InputError("--patience", "needs a validation split", remedy="leave it away, or name one with --val-split")
    if recipe.train_as == "explicit" and not will_have_plan and checkpoint.plan_json is None:
        raise InputError(
            "--train-as", "there is no equalization to train through", remedy="calibrate first, or --calibrate"
        )
    check_trackers(recipe.report_to)
    backbone = backbone_of(checkpoint)
    Trained(checkpoint, Criterion())
    make_optimiser(checkpoint.model, backbone, recipe)


def _equalize(
    name: ModelName, checkpoint: Checkpoint, splits: Splits, recipe: Recipe, run: RunDirectory, say: Say, warn: Say
) -> Plan | None:
    """The plan in effect, carried out on the model; measured once, by the main process, whoever resumes."""
    if recipe.calibrate is None:
        if checkpoint.plan_json is None:
            return None
        plan = Plan.from_json(checkpoint.plan_json, name.source)
        if "finetuned" in plan.facts:
            warn(f"{name.source} was trained since its scales were measured")
        return plan
    kept = run.last / "equalize.json"
    if not kept.is_file() and is_main():
        dataset = splits.train.dataset
        how = Measuring(
            samples=recipe.samples,
            size=recipe.size,
            split=dataset.split,
            batch_size=recipe.batch_size,
            device=recipe.device,
            workers=recipe.workers,
            seed=recipe.seed,
        )
        plan = embed(
            name,
            dataset.root,
            run.path,
            strategy=recipe.calibrate,
            keep_norm=recipe.keep_norm,
            how=how,
            dry_run=True,
            say=say,
            warn=warn,
        )
        if not plan.sites:
            warn(f"{name.source} has no fusion layer that can be equalized")
        write_whole(kept, json.dumps(plan.to_json()))
    wait()
    plan = Plan.read(kept)
    apply(plan, checkpoint.model)
    return plan


def _seen_by_optimiser(plan: Plan | None, train_as: TrainAs | None) -> Plan | None:
    """The plan of the sites whose V is trained; by default those where V is the only effect there is."""
    if plan is None or train_as == "folded":
        return None
    sites = tuple(site for site in plan.sites if train_as == "explicit" or site.strategy == "preserve")
    return replace(plan, sites=sites) if sites else None
