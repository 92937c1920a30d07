"""Loads MODEL as a `Checkpoint`: locates it, reads its weights, finds its family, builds and fills the model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from equalize.checkpoint.checkpoint import Checkpoint
from equalize.checkpoint.family import Family, SaveSpec
from equalize.checkpoint.files.atomic import CLASS_NAMES_FILE, PLAN_FILE, is_training_state
from equalize.checkpoint.files.weights import Weights, read_json, safetensors_copy
from equalize.checkpoint.preprocess import PREPROCESS_FILE, Override, Preprocess
from equalize.checkpoint.registry import FAMILIES, family_of, family_of_arch
from equalize.checkpoint.request import Request
from equalize.checkpoint.source import (
    NO_WEIGHTS,
    Place,
    demand_directory,
    fetch_weights,
    in_checkpoint,
    locate,
    weights_at,
)
from equalize.checkpoint.written import unknown_library, written_by
from equalize.errors import CheckpointError
from equalize.messages import first_of

_DOWNLOADS = ("weights", "weights_backbone", "encoder_weights")  # arguments that architecture.json may not set


def load(
    source: str | Path,
    arch: str | None = None,
    arch_args: Mapping[str, object] | None = None,
    *,
    key: str | None = None,
    output: str | None = None,
    weights: bool = True,
    init_missing: bool = False,
    num_classes: int | None = None,
    seed: int = 0,
) -> Checkpoint:
    """Load a segmentation network from wherever users keep it.

    Args:
        source: a Hub id ``org/name[@revision]``, a directory saved by transformers, smp or equalize, a state-dict
            file, or ``torchvision:NAME``.
        arch: what a state dict belongs to, if its keys do not identify it: ``torchvision:NAME``, ``smp:NAME``,
            ``transformers:DIR``, ``mmseg:config.py``, ``file.py:Factory`` or ``package.module:Factory``. The last
            three run that code.
        arch_args: arguments of the factory.
        key: of the state dict in a file that holds several, such as ``model_ema`` or ``checkpoint/generator``.
        output: which of several outputs of the network is scored: its key or index.
        weights: False builds the network on the meta device from its config alone.
        init_missing: draw what the checkpoint lacks with the library's initializer; all else stays strict.
        num_classes: of the network; a number other than the checkpoint's needs ``init_missing``.
        seed: of the initialization.

    Raises:
        CheckpointError: the checkpoint cannot be read, recognized or built.
        NumericsError: its weights hold NaN or Inf.
        ResourceError: not readable, or the Hub fails.
    """
    name = ModelName(
        source=str(source),
        arch=arch,
        arch_args=dict(arch_args or {}),
        key=key,
        output=output,
        init_missing=init_missing,
        num_classes=num_classes,
        seed=seed,
    )
    return name.load(weights=weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelName(Request):
    """MODEL and its flags, to be loaded more than once."""

    def load(self, *, weights: bool = True) -> Checkpoint:
        """Loads it; without weights on the meta device."""
        _check(self)
        place = locate(self.source)
        demand_directory(place)
        plan = place.path / PLAN_FILE
        plan_json = read_json(plan) if plan.is_file() else None
        request = _as_recorded(place, self)
        recorded_output = (place.record or {}).get("output") or (plan_json or {}).get("logits")
        if request.output is None and recorded_output:
            request = replace(request, output=str(recorded_output))
        family = _claiming(place, NO_WEIGHTS, request)
        found = NO_WEIGHTS
        missing: tuple[str, ...] = ()
        if family is None or weights or family.needs_weights(place, request):
            family, place, found = _with_weights(family, place, request)
        spec = family.open(place, found, request)
        if weights:
            loaded = family.load(spec, found, request)
            model, notes = loaded.model, loaded.notes
            save_spec = _with_choices(family.save_spec(spec, loaded, place), request)
        else:
            save_spec = None
            model, notes = family.outline(spec, found, request)
            missing = family.missing(model, spec, found, request)
        preprocess = self.preprocess.over(_as_kept(place, spec.preprocess))
        if save_spec is not None and self.preprocess.given():
            save_spec = family.with_preprocess(save_spec, preprocess)
        checkpoint = Checkpoint(
            source=request.source,
            adapter=family,
            architecture=spec.architecture,
            model=model,
            preprocess=preprocess,
            classes=spec.classes,
            palette=spec.palette,
            revision=place.revision,
            notes=(*notes, *_left_behind(place)) if weights else notes,
            sha256=found.sha256() if weights else None,
            plan_json=plan_json,
            arch=spec.arch,
            arch_args=spec.arguments,
            output=request.output,
            num_classes=spec.num_classes or (len(spec.classes) if spec.classes else None),
            logit_threshold=spec.logit_threshold,
            save_spec=save_spec,
            missing=missing,
        )
        if weights:
            _demand_same_copy(checkpoint, place)
        return _with_recorded_names(checkpoint, place, request)


def _check(request: Request) -> None:
    """Refuses flags that are wrong for any model."""
    if request.arch_args and request.arch is None:
        raise CheckpointError("--arch-arg", "needs --arch")
    if request.arch is not None and family_of_arch(request.arch).scheme is None:
        file_or_module, _, name = request.arch.rpartition(":")
        if not file_or_module or not name:
            raise CheckpointError(request.arch, "is no architecture", expected=_arch_forms())


def _arch_forms() -> str:
    forms = [form for family in FAMILIES for form in family.arch_forms]
    return f"{', '.join(forms[:-1])} or {forms[-1]}"


def _claiming(place: Place, weights: Weights, request: Request) -> Family[Any] | None:
    """The first family that claims a checkpoint; None if that depends on the weights."""
    family = next((each for each in FAMILIES if each.claims(place, weights, request)), None)
    if family is None and place.kind == "published":
        raise CheckpointError(request.source, "no such file or directory")
    if family is None and place.config and request.arch is None:
        raise unknown_library(place.path)
    return family


def _with_weights(family: Family[Any] | None, place: Place, request: Request) -> tuple[Family[Any], Place, Weights]:
    """The weights, and the family that claims them if none has claimed the place."""
    if family is not None:
        place = family.fetch(place)
        return family, place, weights_at(place, request.key)
    fetch_weights(place)
    weights = weights_at(place, request.key)
    family = _claiming(place, weights, request)
    if family is None:
        inside = place.kind == "file" and in_checkpoint(place.path)
        instead = f"give the directory: {place.path.parent}, or " if inside else ""
        remedy = f"{instead}say what it is, with --arch {_arch_forms()}"
        got = f"keys such as {next(iter(weights.tensors))}"
        raise CheckpointError(request.source, "state dict fits no known architecture", got=got, remedy=remedy)
    return family, place, weights


def _as_recorded(place: Place, request: Request) -> Request:
    """The request with the architecture of architecture.json, unless the caller names one."""
    if place.record is None:
        return request
    named, arguments = place.record.get("arch"), place.record.get("arch_args") or {}
    if not isinstance(named, str) or not isinstance(arguments, dict):
        where = place.path / "architecture.json"
        raise CheckpointError(where, "is no record of an architecture", expected='{"arch": …, "arch_args": {…}}')
    arguments = {key: value for key, value in arguments.items() if key not in _DOWNLOADS}
    if request.arch is not None:
        return replace(request, arch_args={**(arguments if request.arch == named else {}), **request.arch_args})
    arch = family_of_arch(named).recorded(named, place.path)
    if arch is None:
        remedy = f"name that code again: --arch {named}"
        raise CheckpointError(place.path, "was built by code outside it", remedy=remedy)
    return replace(request, arch=arch, arch_args=arguments)


def _with_choices(save: SaveSpec, request: Request) -> SaveSpec:
    """Records what was chosen among several state dicts and outputs, so that what is written is read alike."""
    key = save.keys.weights.key if save.nest is None else None
    chosen = {name: value for name, value in (("key", key), ("output", request.output)) if value is not None}
    return replace(save, architecture={**save.architecture, **chosen}) if save.architecture and chosen else save


def _left_behind(place: Place) -> list[str]:
    """A note on files of a training beside the weights, which are not copied to what is written."""
    beside = place.path.iterdir() if place.path.is_dir() else ()
    state = sorted(path.name for path in beside if is_training_state(path.name))
    what = "holds the state of a training too, which copies leave out"
    return [f"{place.path.name}: {what}: {first_of(state)}"] if state else []


def _demand_same_copy(checkpoint: Checkpoint, place: Place) -> None:
    """Refuses model.pth, which is read, and the model.safetensors that was written beside it, where they differ."""
    copy = safetensors_copy(place.path)
    if copy is None:
        return
    read = checkpoint.safetensors_copy(checkpoint.stored.keys.weights.tensors)
    same = copy.keys() == read.keys() and all(
        copy[key].dtype == tensor.dtype and torch.equal(copy[key], tensor) for key, tensor in read.items()
    )
    if not same:
        what = "holds other weights in model.safetensors than in model.pth, which would be read"
        raise CheckpointError(place.path, what, remedy="remove the one that is not meant")


def _as_kept(place: Place, preprocess: Preprocess) -> Preprocess:
    """The preprocessing that `Checkpoint.save` wrote beside the weights, else `preprocess`."""
    path = place.path / PREPROCESS_FILE
    if not path.is_file():
        return preprocess
    return Override.read(read_json(path), path).over(preprocess, f"from {PREPROCESS_FILE}")


def _with_recorded_names(checkpoint: Checkpoint, place: Place, request: Request) -> Checkpoint:
    """Adds the names of class_names.json if the format has none, or one for two classes, and their number fits."""
    path = place.path / CLASS_NAMES_FILE
    names = tuple(map(str, read_json(path).values())) if path.is_file() else ()
    is_single = len(names) == 2 and (request.num_classes or len(checkpoint.classes or names)) == 1
    fits = checkpoint.classes is None and request.num_classes in (None, len(names))
    return checkpoint.with_names(names) if names and (fits or is_single) else checkpoint


def reload(directory: str | Path, arch: str | None = None, arch_args: Mapping[str, object] | None = None) -> nn.Module:
    """Load a directory, as `Checkpoint.save` wrote it, with its own library's loader, strictly, to verify it.

    ``arch`` and ``arch_args`` are those of a state dict whose architecture is the user's own code. A CheckpointError if
    the library does not take it, or takes only a part.
    """
    place = locate(Path(directory))
    request = _as_recorded(place, Request(source=str(directory), arch=arch, arch_args=dict(arch_args or {})))
    return family_of(written_by(place.path)).reload(place, request)
