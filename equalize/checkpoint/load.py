"""MODEL -> `Checkpoint`, and a written directory -> model through its library's own loader."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from equalize.checkpoint.checkpoint import Checkpoint
from equalize.checkpoint.class_names import with_names, with_recorded
from equalize.checkpoint.directories import load_smp, load_transformers
from equalize.checkpoint.families.smp import family as smp_family
from equalize.checkpoint.families.transformers import loader as hf
from equalize.checkpoint.files.weights import ARCHITECTURE_FILE, read_json, read_weights, shards, weight_files
from equalize.checkpoint.request import Request
from equalize.checkpoint.source import Place, fetch_weights, locate
from equalize.checkpoint.state_dicts import load_published, load_state_dict, load_written, reload_state_dict
from equalize.errors import CheckpointError

__all__ = ["load", "load_request", "reload"]


def load(
    source: str | Path,
    arch: str | None = None,
    arch_args: Mapping[str, object] | None = None,
    *,
    weights: bool = True,
    init_missing: bool = False,
    num_classes: int | None = None,
    seed: int = 0,
) -> Checkpoint:
    """Load a segmentation network from wherever users keep it.

    Args:
        source: a Hub id ``org/name[@revision]``, a directory saved by transformers, smp or equalize, a state-dict
            file, or ``torchvision:NAME``.
        arch: what a state dict belongs to, if its keys do not tell: ``torchvision:NAME``, ``smp:NAME``,
            ``transformers:DIR``, ``mmseg:config.py``, ``file.py:Factory`` or ``package.module:Factory``. The last
            three run that code.
        arch_args: arguments of the factory.
        weights: False builds the network on the meta device from its config alone.
        init_missing: draw what the checkpoint lacks with the library's initialiser; all else stays strict.
        num_classes: of the network; another number than the checkpoint's needs ``init_missing``.
        seed: of the draw.

    Raises:
        CheckpointError: the checkpoint cannot be read, recognised or built.
        NumericsError: its weights hold NaN or Inf.
        ResourceError: not readable, or the Hub fails.
    """
    request = Request(
        source=str(source),
        arch=arch,
        arch_args=dict(arch_args or {}),
        weights=weights,
        init_missing=init_missing,
        num_classes=num_classes,
        seed=seed,
    )
    return load_request(request)


def load_request(request: Request) -> Checkpoint:
    """`load`, its arguments in one."""
    if request.num_classes is not None and request.num_classes < 1:
        raise CheckpointError("--num-classes", "must be positive", got=request.num_classes)
    if request.arch_args and request.arch is None:
        raise CheckpointError("--arch-arg", "needs --arch")
    return _load(request)


def _load(request: Request) -> Checkpoint:
    place = locate(request.source)
    if place.kind == "torchvision":
        published = load_published(place.path.name, request)
        return with_names(published, published.classes) if published.classes else published
    if place.kind == "directory":
        return with_recorded(_load_directory(place, request), place.path, request.num_classes)
    if place.path.name.endswith(".index.json"):
        return load_state_dict(place.path, read_weights(shards(place.path), place.path), request)
    return load_state_dict(place.path, read_weights((place.path,)), request)


def _load_directory(place: Place, request: Request) -> Checkpoint:
    """Tell transformers, smp and state dicts apart by the JSON files that lie there."""
    path = place.path
    if (path / ARCHITECTURE_FILE).is_file():
        return load_written(path, request)
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if "_model_class" in config and request.arch is None:
        return load_smp(place, config, request)
    of_transformers = request.arch is not None and request.arch.startswith("transformers:")
    if ("model_type" in config or "auto_map" in config) and (request.arch is None or of_transformers):
        return load_transformers(place, request)
    if config and request.arch is None:
        raise CheckpointError(
            path / "config.json", "is of no known library", expected="model_type (transformers) or _model_class (smp)"
        )
    fetch_weights(place)
    return load_state_dict(path, read_weights(*weight_files(path)), request)


def reload(
    directory: str | Path,
    arch: str | None = None,
    arch_args: Mapping[str, object] | None = None,
) -> nn.Module:
    """Load a written directory as its own library does, strictly: the proof that it is what it should be.

    Args:
        directory: as `Checkpoint.save` wrote it.
        arch: the ``--arch`` of a state dict whose architecture is the user's own code.
        arch_args: its arguments.

    Raises:
        CheckpointError: the library does not take it, or takes only a part.
    """
    place = Path(directory)
    if (place / ARCHITECTURE_FILE).is_file():
        return reload_state_dict(place, arch, arch_args or {})
    if "_model_class" in read_json(place / "config.json"):
        return smp_family.reload(place)
    return hf.reload(place)
