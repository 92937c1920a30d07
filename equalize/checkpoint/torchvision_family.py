"""torchvision's segmentation networks: found by their keys, built, and their published weights fetched."""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from equalize.checkpoint.matching import Match, pair
from equalize.errors import CheckpointError, ResourceError

__all__ = ["arguments_from", "builder", "names", "published", "recognise"]

_MARK = 9973  # a number of classes that no other axis has: shows which tensors carry it


def names() -> list[str]:
    """The segmentation networks of this torchvision."""
    from torchvision.models import list_models, segmentation

    return list(list_models(module=segmentation))


def builder(name: str) -> Callable[..., nn.Module]:
    """The function that builds a network with fresh weights: nothing is downloaded unless arguments ask for it.

    Raises:
        CheckpointError: torchvision has no segmentation network of that name.
    """
    from torchvision.models import get_model_builder

    if name not in names():
        raise CheckpointError(
            f"torchvision:{name}", "is no segmentation network of torchvision", expected=", ".join(names())
        )
    build: Callable[..., nn.Module] = get_model_builder(name)

    def make(**arguments: Any) -> nn.Module:
        return build(**{"weights": None, "weights_backbone": None, **arguments})

    make.__signature__ = inspect.signature(build)  # type: ignore[attr-defined]
    return make


@functools.cache
def _marked(name: str, aux_loss: bool) -> Mapping[str, torch.Size]:
    """Key -> shape of a network whose number of classes is `_MARK`."""
    make = builder(name)
    arguments: dict[str, object] = {"num_classes": _MARK}
    if "aux_loss" in inspect.signature(make).parameters:
        arguments["aux_loss"] = aux_loss
    with torch.device("meta"):
        return {key: value.shape for key, value in make(**arguments).state_dict().items()}


def _compare(name: str, shapes: Mapping[str, torch.Size]) -> tuple[Match, dict[str, object]]:
    """How a state dict fits a network, given the arguments that its own keys and shapes tell."""
    aux_loss = any("aux_classifier." in key for key in shapes)
    marked = _marked(name, aux_loss)
    arguments: dict[str, object] = {}
    if "aux_loss" in inspect.signature(builder(name)).parameters:
        arguments["aux_loss"] = aux_loss
    rough = pair(marked, shapes)
    carriers = [key for key, shape in marked.items() if shape[:1] == (_MARK,)]
    counts = {shapes[rough.disk_name[key]][:1] for key in carriers if key in rough.mismatched}
    if len(counts) != 1 or not (count := counts.pop()):
        return rough, arguments
    arguments["num_classes"] = count[0]
    shaped = {key: torch.Size([count[0], *shape[1:]]) if key in carriers else shape for key, shape in marked.items()}
    return pair(shaped, shapes), arguments


def arguments_from(name: str, shapes: Mapping[str, torch.Size]) -> dict[str, object]:
    """The number of classes and the auxiliary head, as a state dict's keys and shapes tell them."""
    return _compare(name, shapes)[1]


def recognise(shapes: Mapping[str, torch.Size], where: object, *, init_missing: bool) -> tuple[str, dict[str, object]]:
    """The network and arguments that a state dict belongs to.

    Args:
        shapes: key -> shape, as they lie on disk.
        where: the file, for errors.
        init_missing: also accept the only network that the keys are a part of.

    Raises:
        CheckpointError: none fits, or several do.
    """
    matches: dict[str, tuple[Match, dict[str, object]]] = {}
    for name in names():
        match, arguments = _compare(name, shapes)
        if match.complete:
            return name, arguments
        matches[name] = match, arguments
    parts = [
        name for name, (match, _) in matches.items() if match.on_disk and not (match.unexpected or match.mismatched)
    ]
    if init_missing and len(parts) == 1:
        return parts[0], matches[parts[0]][1]
    if init_missing and parts:
        raise CheckpointError(
            where, "is part of several networks", got=", ".join(parts), remedy="choose: --arch torchvision:NAME"
        )
    closest = max(matches, key=lambda name: len(matches[name][0].on_disk))
    hits = len(matches[closest][0].on_disk)
    raise CheckpointError(
        where,
        f"state dict fits no known architecture (tried torchvision {', '.join(names())})",
        got=f"{hits} of {len(shapes)} keys in common with {closest}" if hits else f"keys such as {next(iter(shapes))}",
        remedy="say what it is: --arch torchvision:NAME, smp:NAME --arch-arg encoder_name=…, or file.py:Factory",
    )


def published(name: str) -> tuple[Path, tuple[str, ...] | None]:
    """Fetch torchvision's own weights of a network: the file, and the class names.

    Raises:
        CheckpointError: there are no weights for it.
        ResourceError: the download failed.
    """
    weights = _default_weights(name)
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if not path.exists():
        digest = torch.hub.HASH_REGEX.search(path.name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(
                weights.url, str(path), digest[1] if digest else None, progress=sys.stderr.isatty()
            )
        except (OSError, RuntimeError) as error:  # a URLError is an OSError
            reason = getattr(error, "reason", error)
            raise ResourceError(f"torchvision:{name}", f"weights cannot be downloaded ({reason})") from error
    categories = weights.meta.get("categories")
    return path, tuple(categories) if categories else None


def published_arguments(name: str) -> tuple[dict[str, object], tuple[str, ...] | None]:
    """The arguments that torchvision's own weights of a network need, and their class names; nothing is downloaded."""
    categories = _default_weights(name).meta.get("categories")
    arguments: dict[str, object] = {"num_classes": len(categories)} if categories else {}
    if "aux_loss" in inspect.signature(builder(name)).parameters:
        arguments["aux_loss"] = True
    return arguments, tuple(categories) if categories else None


def _default_weights(name: str) -> Any:
    from torchvision.models import get_model_weights

    builder(name)
    return get_model_weights(name).DEFAULT
