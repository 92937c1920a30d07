"""State dicts of mmsegmentation -> `Checkpoint`: the network is the one its config describes."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from equalize.checkpoint import mmseg_family
from equalize.checkpoint.base import Checkpoint, Origin
from equalize.checkpoint.directories import read_plan
from equalize.checkpoint.factory import construct
from equalize.checkpoint.matching import disk_state, fill, fit
from equalize.checkpoint.mmseg_config import bare_model, read_literals, trusted_model, with_classes
from equalize.checkpoint.mmseg_facts import class_names, config_text, meta_with_classes, preprocessing
from equalize.checkpoint.placement import placement_notes, settled
from equalize.checkpoint.reading import Weights
from equalize.checkpoint.request import Request
from equalize.errors import CheckpointError

__all__ = ["ARCH", "is_mmseg", "load_mmseg"]

ARCH = "mmseg"
"""Alone, as ``--arch``: the config that comes with the checkpoint. With ``:config.py`` behind it, that file, run."""
_CONFIG_FILE = "config.py"
_NEST = "state_dict"  # where mmengine looks for one


@dataclass(frozen=True, slots=True, kw_only=True)
class _Blueprint:
    """A config, read or run."""

    config: Mapping[str, Any]
    model: dict[str, Any]
    """What is built of it."""
    text: str | None
    """As it lies, or shall lie, beside the weights; None if it cannot be read without being run."""
    arch: str
    run: bool
    """Whether `model` may name whatever it likes, because the user named its file."""


def is_mmseg(weights: Weights, arch: str | None) -> bool:
    """Whether a state dict is asked to be, or itself says to be, of mmsegmentation."""
    if arch is None:
        # transformers calls its classifier otherwise: only mmsegmentation's heads have these keys
        return config_text(weights.meta) is not None or any("decode_head.conv_seg." in key for key in weights.tensors)
    return arch.partition(":")[0] == ARCH


def load_mmseg(path: Path, weights: Weights, request: Request) -> Checkpoint:
    """Load a state dict of mmsegmentation.

    Args:
        path: the file, or the directory it came from.
        weights: as read.
        request: what the caller asked for; its ``arch_args`` may hold ``num_classes``.

    Raises:
        CheckpointError: no config, one that will not be run, or one that the weights do not fit.
        ResourceError: mmsegmentation is not installed.
    """
    file = (request.arch or "").removeprefix(ARCH).removeprefix(":")
    plan = _run(Path(file)) if file else _read(path, weights, request)
    number, arguments = _num_classes(request, plan)
    meta: dict[str, object] = {}
    if number is not None and (changed := _with_classes(plan, number)) is not plan:
        plan, meta = changed, meta_with_classes(None)
        meta |= {key: plan.text for key in ("cfg", "config") if plan.text and key in weights.meta}
    make = mmseg_family.builder(plan.model, draw=request.init_missing, room=None if plan.run else weights.tensors)
    model = construct(make, plan.arch, weights=request.weights, seed=request.seed)
    architecture = _architecture(plan.model)
    match = fit(
        model,
        weights.tensors,
        request.source,
        init_missing=request.init_missing or not request.weights,  # looking at the structure needs no weights
        num_classes=number,
        architecture=architecture,
    )
    names = class_names(weights.meta)
    classes = names if names and len(names) == _head(plan.model).get("num_classes") else None
    notes = (*weights.notes, *placement_notes(path, weights, match))
    lacking = bool(match.missing)
    if lacking:
        meta |= _meta_of_the_whole(weights, plan, classes)
    weights, match = settled(weights, match, own_keys=True)
    drawn: tuple[str, ...] = ()
    if request.weights:
        drawn = fill(model, weights, match, request.source)
    origin = Origin(
        path=path,
        weights=weights,
        disk_state=partial(disk_state, match),
        architecture={"arch": plan.arch, "arch_args": arguments},
        prefix=match.prefix,
        model_key={disk: key for key, disk in match.disk_name.items()} if match.submodule else {},
        meta=meta,
        nest=_NEST if lacking else None,
        texts={} if plan.text is None else {_CONFIG_FILE: plan.text},
    )
    return Checkpoint(
        source=request.source,
        family="mmsegmentation",
        architecture=architecture,
        model=model,
        preprocess=preprocessing(plan.config),
        classes=classes,
        revision=None,
        drawn=drawn,
        notes=notes,
        sha256=weights.sha256() if request.weights else None,
        plan_json=read_plan(path) if path.is_dir() else None,
        arch=plan.arch,
        arch_args=arguments,
        origin=origin if request.weights else None,
    )


def _meta_of_the_whole(weights: Weights, plan: _Blueprint, classes: tuple[str, ...] | None) -> dict[str, object]:
    """What has to change in the ``meta`` of a backbone, which may tell of the network that it was trained in."""
    config = {} if config_text(weights.meta) == plan.text else {"cfg": plan.text, "config": None}
    return {**config, **({} if classes else meta_with_classes(None))}


def _read(path: Path, weights: Weights, request: Request) -> _Blueprint:
    """The config that came with the weights, as data."""
    beside = path / _CONFIG_FILE
    if request.arch is not None and path.is_dir() and beside.is_file():
        text: str | None = beside.read_text(encoding="utf-8", errors="replace")
    else:
        text = config_text(weights.meta)
    if text is None:
        raise CheckpointError(
            request.source, "holds no config of mmsegmentation", remedy="name the config: --arch mmseg:config.py"
        )
    return _from_text(text, request.source)


def _from_text(text: str, where: object) -> _Blueprint:
    config = read_literals(text, where)
    model = bare_model(config, where)
    mmseg_family.check_types(model, where)
    return _Blueprint(config=config, model=model, text=text, arch=ARCH, run=False)


def _run(file: Path) -> _Blueprint:
    """The config that the user named. Where its values say all, they are kept beside OUT, which then needs no file."""
    config = mmseg_family.run_config(file.expanduser())
    try:
        return _from_text(mmseg_family.dump(config), file)
    except CheckpointError:
        model = trusted_model(config, file)
        return _Blueprint(config=config, model=model, text=None, arch=f"{ARCH}:{file}", run=True)


def _num_classes(request: Request, plan: _Blueprint) -> tuple[int | None, dict[str, object]]:
    """The number asked for, and what must be recorded of it because no config beside OUT will tell."""
    if unknown := set(request.arch_args) - {"num_classes"}:
        raise CheckpointError(
            f"--arch-arg {sorted(unknown)[0]}", "is no argument of a config", remedy="change the config instead"
        )
    asked = request.num_classes if request.num_classes is not None else request.arch_args.get("num_classes")
    if asked is None:
        return None, {}
    if not isinstance(asked, int) or asked < 1:
        raise CheckpointError("num_classes", "must be a positive number", got=asked)
    return asked, {"num_classes": asked} if plan.text is None else {}


def _with_classes(plan: _Blueprint, number: int) -> _Blueprint:
    model = with_classes(plan.model, number)
    if model == plan.model:
        return plan
    config = {**plan.config, "model": with_classes(plan.config["model"], number)}
    text = None if plan.text is None else mmseg_family.dump(config)
    return _Blueprint(config=config, model=model, text=text, arch=plan.arch, run=plan.run)


def _head(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """The head that the logits come from: the last of a cascade."""
    head = model.get("decode_head")
    if isinstance(head, (list, tuple)) and head:
        head = head[-1]
    return head if isinstance(head, Mapping) else {}


def _architecture(model: Mapping[str, Any]) -> str:
    backbone = model.get("backbone")
    parts = (backbone.get("type") if isinstance(backbone, Mapping) else None, _head(model).get("type"))
    return f"{model['type']} ({', '.join(str(part) for part in parts if part)})"
