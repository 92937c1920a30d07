"""Verifies that a directory is a model with its plan applied: for `equalize verify`, and before OUT appears."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equalize.checkpoint.checkpoint import Checkpoint, write_plan
from equalize.checkpoint.files.weights import safetensors_copy, state_on_disk
from equalize.checkpoint.loading import ModelName, reload
from equalize.checkpoint.preprocess import Override
from equalize.checkpoint.registry import family_of_arch
from equalize.commands.calibration_config import CalibrationConfig
from equalize.commands.images import input_shape, open_images
from equalize.errors import InputError
from equalize.messages import Notify, ignore
from equalize.plan.apply import demand_fit
from equalize.plan.plan import Plan
from equalize.verify.function import Check, check_function
from equalize.verify.tensors import check_planned, check_tensors

CHECKED_IMAGES = 2


def verify_checkpoint(
    out: str | Path,
    name: ModelName,
    data: str | Path | None = None,
    config: CalibrationConfig | None = None,
    *,
    notify: Notify = ignore,
) -> tuple[Plan, Check]:
    """Verifies `out` against the model, on a few images of `data` or on random inputs.

    Raises:
        InputError: `out` holds no plan, or that of another model. NumericsError: it is not what its plan says.
    """
    plan = Plan.read(out)
    name = as_planned(name, plan)
    original = name.load()
    demand_fit(plan, original.model)
    if data is None:
        inputs = random_images(plan, original)
    else:
        _, images = open_images(data, original, config or CalibrationConfig(), notify=notify)
        inputs = [images.few(CHECKED_IMAGES)]
    plan = as_stored(plan, original)
    return plan, _prove(original, Path(out), name, plan, inputs)


def save_proven(
    checkpoint: Checkpoint, name: ModelName, plan: Plan, out: Path, inputs: Sequence[Tensor], *, overwrite: bool
) -> Plan:
    """Writes a model that a plan was applied to, and proves what was written before it takes its place.

    Args:
        checkpoint: the model as it is to be written; its weights are let go of.
        name: the original. inputs: (N, C, H, W) each, to compare the two on.

    Returns:
        The plan with the facts "output" and "check".
    """
    with checkpoint.writing(out, overwrite=overwrite) as directory:
        checkpoint.model.to("meta")  # it is written: free its memory for the verification
        check = _prove(name.load(), directory, name, plan, inputs)
        proof = {"check": check.to_json(), "logit_range": check.logit_range}
        plan = replace(plan, facts={**plan.facts, "output": str(out), **proof})
        write_plan(plan, directory)
    return plan


def _prove(original: Checkpoint, directory: Path, name: ModelName, plan: Plan, inputs: Sequence[Tensor]) -> Check:
    on_disk = original.disk_keys()
    # a classifier of other classes has another shape
    initialized = {on_disk.get(key, key) for key in original.newly_initialized}
    stored = {key: tensor for key, tensor in original.stored.keys.weights.tensors.items() if key not in initialized}
    after = state_on_disk(directory)
    check_tensors(stored, after, {*initialized, *plan.changed_on_disk})
    if (copy := safetensors_copy(directory)) is not None:
        check_tensors(original.safetensors_copy(after), copy, ())
    dtypes = {torch.float32, *(tensor.dtype for tensor in after.values() if tensor.is_floating_point())}
    stored_as = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    written = reload(directory, name.arch, name.arch_args).eval()
    score = partial(original.scores, inputs=inputs[0])
    check = check_function(original.model, written, plan, inputs, score, stored=stored_as)
    check_planned(original.model, written, plan, stored=stored_as)
    return check


def as_planned(name: ModelName, plan: Plan) -> ModelName:
    """The name with the arguments that the plan records; a plan never names code to run.

    Raises:
        InputError: the model was built by code that must be named again.
    """
    facts = plan.facts
    arch, arguments = facts.get("arch"), facts.get("arch_args") or {}
    preprocess: Any = facts.get("preprocess") or {}
    given = {field: preprocess[field] for field in preprocess.get("given", ())}  # by the user when the plan was made
    if name.arch is None and arch is not None and family_of_arch(str(arch)).runs_code(str(arch)):
        raise InputError(name.source, "was built by code outside it", remedy=f"name that code again: --arch {arch}")
    return replace(
        name,
        arch=name.arch or arch,
        arch_args=name.arch_args or (arguments if name.arch in (None, arch) else {}),
        key=name.key or facts.get("key"),
        output=name.output or facts.get("logits"),
        init_missing=name.init_missing or bool(facts.get("init_missing")),
        num_classes=name.num_classes or facts.get("num_classes"),
        preprocess=name.preprocess if name.preprocess.given() else Override.read(given, "equalize.json"),
        seed=plan.seed,
    )


def as_stored(plan: Plan, checkpoint: Checkpoint) -> Plan:
    """The plan with the keys on disk; without the counters that BatchNorms did not have before PyTorch 0.4.1."""
    stored = checkpoint.disk_keys()
    edits = (edit for edit in plan.edits if not edit.tensor.endswith(".num_batches_tracked") or edit.tensor in stored)
    plan = replace(plan, edits=tuple(edits))
    return replace(plan, disk_keys={key: disk for key in plan.changed if (disk := stored.get(key, key)) != key})


def random_images(plan: Plan, checkpoint: Checkpoint) -> list[Tensor]:
    """One batch (N, C, H, W) of the shape that the plan was made with; else of the channels that fit."""
    shape = tuple(plan.facts.get("input_shape") or ())
    if not all(isinstance(side, int) and side > 0 for side in shape):
        raise InputError("equalize.json", "has no valid input_shape", got=shape, remedy="use the plan as written")
    if not shape:
        shape = input_shape(checkpoint, None)
    return [torch.randn(shape, generator=torch.Generator().manual_seed(0))]
