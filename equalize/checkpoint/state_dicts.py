"""Lone state dicts -> `Checkpoint`: built as ``--arch``, a record beside them, or their keys say."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from equalize.checkpoint.build import class_argument, construct, json_arguments, load_factory
from equalize.checkpoint.checkpoint import Checkpoint, Family, Origin
from equalize.checkpoint.directories import read_plan
from equalize.checkpoint.families.mmsegmentation.family import is_mmseg, load_mmseg
from equalize.checkpoint.families.smp import family as smp_family
from equalize.checkpoint.families.smp import keys as smp_keys
from equalize.checkpoint.families.torchvision import family as torchvision_family
from equalize.checkpoint.families.transformers import config as hf_config
from equalize.checkpoint.families.transformers import loader as hf
from equalize.checkpoint.families.transformers.backbone import at_home
from equalize.checkpoint.files.weights import ARCHITECTURE_FILE, Weights, read_json, read_weights, weight_files
from equalize.checkpoint.keys import disk_state, fill, fit
from equalize.checkpoint.limits import bounded
from equalize.checkpoint.placement import placement_notes, settled
from equalize.checkpoint.preprocess import Preprocess
from equalize.checkpoint.recognition import recognise
from equalize.checkpoint.request import Request
from equalize.errors import CheckpointError

__all__ = ["load_published", "load_state_dict", "load_written", "reload_state_dict"]

_DOWNLOADS = ("weights", "weights_backbone", "encoder_weights")  # arguments that a record may not set


@dataclass(frozen=True, slots=True, kw_only=True)
class _Blueprint:
    """How to build the network of a state dict."""

    family: Family
    architecture: str
    arch: str
    arguments: Mapping[str, object]
    make: Callable[..., nn.Module]
    preprocess: Preprocess
    notes: tuple[str, ...] = ()
    """What the keys told, where the caller did not."""


def load_state_dict(
    path: Path, weights: Weights, request: Request, *, classes: tuple[str, ...] | None = None
) -> Checkpoint:
    """Load a state dict.

    Args:
        path: the file, or the directory it came from.
        weights: as read.
        request: what the caller asked for.
        classes: names, where something beside the file tells them.
    """
    if request.arch is not None and request.arch.startswith("transformers:"):
        return _load_with_config(path, weights, request)
    if is_mmseg(weights, request.arch):
        return load_mmseg(path, weights, request)
    plan = _blueprint(weights, request)
    make = partial(plan.make, **plan.arguments)
    bounds = nullcontext() if plan.family == "custom" else bounded(weights.tensors, draw=request.init_missing)
    with bounds:
        model = construct(make, plan.arch, weights=request.weights, seed=request.seed)
    match = fit(
        model,
        weights.tensors,
        request.source,
        init_missing=request.init_missing or not request.weights,  # looking at the structure needs no weights
        num_classes=request.num_classes,
        architecture=plan.architecture,
    )
    notes = (*weights.notes, *plan.notes, *placement_notes(path, weights, match))
    weights, match = settled(weights, match)
    drawn: tuple[str, ...] = ()
    if request.weights:
        drawn = fill(model, weights, match, request.source)
    record = {"arch": plan.arch, "arch_args": json_arguments(plan.arguments)}
    origin = Origin(
        path=path,
        weights=weights,
        disk_state=partial(disk_state, match),
        architecture=record,
        prefix=match.prefix,
        model_key={disk: key for key, disk in match.disk_name.items()} if match.submodule else {},
    )
    return Checkpoint(
        source=request.source,
        family=plan.family,
        architecture=plan.architecture,
        model=model,
        preprocess=plan.preprocess,
        classes=classes,
        revision=None,
        drawn=drawn,
        notes=notes,
        sha256=weights.sha256() if request.weights else None,
        plan_json=read_plan(path) if path.is_dir() else None,
        arch=plan.arch,
        arch_args=plan.arguments,
        origin=origin if request.weights else None,
    )


def _blueprint(weights: Weights, request: Request) -> _Blueprint:
    shapes = {key: tensor.shape for key, tensor in weights.tensors.items()}
    arch, arguments = request.arch, dict(request.arch_args)
    notes: tuple[str, ...] = ()
    if arch is None:
        _refuse_adapters(shapes, request.source)
        arch, arguments, notes = recognise(shapes, request.source, init_missing=request.init_missing)
    family, _, name = arch.partition(":")
    if family == "torchvision":
        arguments = {**torchvision_family.arguments_from(name, shapes), **arguments}
    if family == "smp" and request.arch is not None:
        arguments, notes = smp_keys.completed(name, shapes, arguments, request.source)
    plan = _unfinished(arch, family, name)
    if request.num_classes is not None:
        arguments[class_argument(plan.make, arch)] = request.num_classes
    if family == "smp":
        encoder = arguments.get("encoder_name", "resnet34")
        plan = replace(plan, preprocess=smp_family.preprocessing(str(encoder), None))
    return replace(plan, arguments=arguments, notes=notes)


def _refuse_adapters(keys: Iterable[str], where: object) -> None:
    adapter = next((key for key in keys if ".lora_" in key), None)
    if adapter is not None:
        raise CheckpointError(
            where,
            "holds LoRA adapters, not a whole network",
            got=adapter,
            remedy="merge them into their network first: peft's merge_and_unload(), then save_pretrained",
        )


def _unfinished(arch: str, family: str, name: str) -> _Blueprint:
    """The blueprint of an architecture by its name, without arguments."""
    common: dict[str, Any] = {"arch": arch, "arguments": {}}
    if family == "torchvision":
        preprocess = Preprocess(origin="ImageNet, as torchvision trains")
        make = torchvision_family.builder(name)
        return _Blueprint(family="torchvision", architecture=name, make=make, preprocess=preprocess, **common)
    if family == "smp":
        make = smp_family.builder(name)
        return _Blueprint(family="smp", architecture=make.__name__, make=make, preprocess=Preprocess(), **common)
    preprocess = Preprocess(origin="ImageNet defaults, the checkpoint does not say")
    make = load_factory(arch)
    return _Blueprint(family="custom", architecture=name, make=make, preprocess=preprocess, **common)


def _load_with_config(path: Path, weights: Weights, request: Request) -> Checkpoint:
    """A state dict of a transformers network, whose config lies in a directory of its own."""
    assert request.arch is not None
    directory = Path(request.arch.removeprefix("transformers:")).expanduser()
    if request.arch_args:
        raise CheckpointError(request.arch, "takes no --arch-arg", remedy="change its config.json")
    config = hf_config.read_config(directory, request.num_classes)
    common: dict[str, Any] = {
        "source": request.source,
        "family": "transformers",
        "architecture": hf_config.target_class(config, directory).__name__,
        "preprocess": hf_config.preprocessing(directory),
        "classes": hf_config.labels(config),
        "revision": None,
        "plan_json": read_plan(path) if path.is_dir() else None,
        "arch": request.arch,
    }
    if not request.weights:
        return Checkpoint(model=hf.skeleton(config, directory), **common)
    weights, notes = at_home(config, weights, path, lone=True)
    loaded = hf.fill(
        config,
        weights.clones(),
        request.source,
        init_missing=request.init_missing,
        num_classes=request.num_classes,
        seed=request.seed,
        strip=True,
    )
    names = ("config.json", "preprocessor_config.json", "processor_config.json")
    origin = Origin(
        path=path,
        weights=weights,
        disk_state=partial(hf.disk_state, loaded),
        config=hf.config_fields(loaded.model),
        architecture={"arch": "transformers:.", "arch_args": None},
        prefix=loaded.prefix,
        beside=tuple(directory / name for name in names if (directory / name).is_file()),
    )
    return Checkpoint(
        model=loaded.model,
        drawn=loaded.drawn,
        notes=(*weights.notes, *notes),
        sha256=weights.sha256(),
        origin=origin,
        **common,
    )


def load_published(name: str, request: Request) -> Checkpoint:
    """``torchvision:NAME``: the network with torchvision's own weights."""
    if request.arch is not None:
        raise CheckpointError(request.source, "names its architecture itself", remedy="leave --arch away")
    if not request.weights:
        return _skeleton_of(name, request)
    path, classes = torchvision_family.published(name)
    if request.num_classes is not None and classes and request.num_classes != len(classes):
        classes = None
    return load_state_dict(path, read_weights((path,)), replace(request, arch=f"torchvision:{name}"), classes=classes)


def _skeleton_of(name: str, request: Request) -> Checkpoint:
    plan = _unfinished(f"torchvision:{name}", "torchvision", name)
    arguments, classes = torchvision_family.published_arguments(name)
    if request.num_classes is not None:
        arguments["num_classes"], classes = request.num_classes, None
    return Checkpoint(
        source=request.source,
        family="torchvision",
        architecture=name,
        model=construct(partial(plan.make, **arguments), plan.arch, weights=False, seed=0),
        preprocess=plan.preprocess,
        classes=classes,
        revision=None,
        arch=plan.arch,
        arch_args=arguments,
    )


def load_written(directory: Path, request: Request) -> Checkpoint:
    """A state dict that `Checkpoint.save` wrote, with the record of its architecture beside it."""
    arch, arguments = _recorded(directory, request.arch, request.arch_args)
    weights = read_weights(*weight_files(directory))
    return load_state_dict(directory, weights, replace(request, arch=arch, arch_args=arguments))


def _recorded(directory: Path, arch: str | None, arch_args: Mapping[str, object]) -> tuple[str, dict[str, object]]:
    """The architecture to build: the record's, unless the caller names one. A record never names code to run."""
    path = directory / ARCHITECTURE_FILE
    record = read_json(path)
    named, arguments = record.get("arch"), record.get("arch_args") or {}
    if not isinstance(named, str) or not isinstance(arguments, dict):
        raise CheckpointError(path, "is no record of an architecture", expected='{"arch": …, "arch_args": {…}}')
    arguments = {key: value for key, value in arguments.items() if key not in _DOWNLOADS}
    if arch is not None:
        return arch, {**(arguments if arch == named else {}), **arch_args}
    if named == "transformers:.":
        return f"transformers:{directory}", {}
    if named.startswith(("torchvision:", "smp:")) or named == "mmseg":
        return named, arguments
    raise CheckpointError(directory, "was built by code outside it", remedy=f"name that code again: --arch {named}")


def reload_state_dict(directory: Path, arch: str | None, arch_args: Mapping[str, object]) -> nn.Module:
    """Build the network and load what was written with ``load_state_dict(strict=True)``."""
    named, arguments = _recorded(directory, arch, arch_args)
    if named.startswith("transformers:"):
        return hf.reload(directory)
    request = Request(source=str(directory), arch=named, arch_args=arguments)
    weights = read_weights(*weight_files(directory))
    checkpoint = load_state_dict(directory, weights, request)
    model = checkpoint.model
    twin = directory / "model.safetensors"
    if twin.is_file() and twin not in weights.files:
        model.load_state_dict(load_file(twin), strict=True)
    return model
