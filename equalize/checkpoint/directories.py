"""Directories that transformers and smp saved -> `Checkpoint`."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from equalize.checkpoint.build import construct
from equalize.checkpoint.checkpoint import PLAN_FILE, Checkpoint, Origin
from equalize.checkpoint.families.smp import family as smp_family
from equalize.checkpoint.families.transformers import config as hf_config
from equalize.checkpoint.families.transformers import loader as hf
from equalize.checkpoint.families.transformers.backbone import at_home
from equalize.checkpoint.files.weights import read_json, read_weights, weight_files
from equalize.checkpoint.keys import disk_state, fill, fit
from equalize.checkpoint.limits import bounded
from equalize.checkpoint.request import Request
from equalize.checkpoint.source import Place, fetch_weights

__all__ = ["load_smp", "load_transformers", "read_plan"]


def load_transformers(place: Place, request: Request) -> Checkpoint:
    """Load a transformers directory, under its own config or under that of ``--arch transformers:DIR``."""
    directory = place.path
    if request.arch is not None:
        directory = Path(request.arch.removeprefix("transformers:"))
    config = hf_config.read_config(directory, request.num_classes)
    common: dict[str, Any] = {
        "source": request.source,
        "family": "transformers",
        "architecture": hf_config.target_class(config, directory).__name__,
        "preprocess": hf_config.preprocessing(place.path),
        "classes": hf_config.labels(config),
        "revision": place.revision,
        "plan_json": read_plan(place.path),
    }
    if not request.weights:
        return Checkpoint(model=hf.skeleton(config, directory), **common)
    fetch_weights(place)
    files = weight_files(place.path)
    hf.variant(*files)
    weights = read_weights(*files)
    notes: tuple[str, ...] = ()
    if request.arch is not None:
        weights, notes = at_home(config, weights, place.path, lone=False)
    loaded = hf.fill(
        config,
        weights.clones(),
        request.source,
        init_missing=request.init_missing,
        num_classes=request.num_classes,
        seed=request.seed,
        strip=False,
    )
    around = request.arch is not None
    origin = Origin(
        path=place.path,
        weights=weights,
        disk_state=partial(hf.disk_state, loaded),
        config=hf.config_fields(loaded.model) if loaded.drawn or around else None,
        beside=(directory / "config.json",) if around else (),
    )
    return Checkpoint(
        model=loaded.model,
        drawn=loaded.drawn,
        notes=notes,
        sha256=weights.sha256(),
        arch=request.arch,
        origin=origin,
        **common,
    )


def load_smp(place: Place, config: Mapping[str, object], request: Request) -> Checkpoint:
    """Load a directory that smp's ``save_pretrained`` wrote, given its ``config.json``."""
    name = str(config["_model_class"])
    make = smp_family.builder(name)
    arguments = smp_family.arguments_of(config)
    if request.num_classes is not None:
        arguments["classes"] = request.num_classes
    weights = None
    if request.weights:
        fetch_weights(place)
        weights = read_weights(*weight_files(place.path))
    with bounded(weights.tensors if weights else None, draw=request.init_missing):
        model = construct(lambda: make(**arguments), f"smp:{name}", weights=request.weights, seed=request.seed)
    common: dict[str, Any] = {
        "source": request.source,
        "family": "smp",
        "architecture": type(model).__name__,
        "model": model,
        "preprocess": smp_family.preprocessing(str(config.get("encoder_name")), _text(config.get("encoder_weights"))),
        "classes": None,
        "revision": place.revision,
        "plan_json": read_plan(place.path),
    }
    if weights is None:
        return Checkpoint(**common)
    match = fit(
        model,
        weights.tensors,
        request.source,
        init_missing=request.init_missing,
        num_classes=request.num_classes,
        architecture=type(model).__name__,
    )
    drawn = fill(model, weights, match, request.source)
    fields = {"classes": request.num_classes} if request.num_classes is not None else None
    origin = Origin(path=place.path, weights=weights, disk_state=partial(disk_state, match), config=fields)
    return Checkpoint(drawn=drawn, sha256=weights.sha256(), origin=origin, **common)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def read_plan(directory: Path) -> dict[str, Any] | None:
    """The receipt that an earlier equalization left in a directory."""
    path = directory / PLAN_FILE
    return read_json(path) if path.is_file() else None
