"""torchvision's segmentation networks: found by their keys, built, and their published weights fetched."""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from equalize.checkpoint.build import class_argument
from equalize.checkpoint.family import Family, Loaded, SaveSpec, Spec
from equalize.checkpoint.files.weights import ARCHITECTURE_FILE, Weights, read_json
from equalize.checkpoint.keys import Match, pair
from equalize.checkpoint.loading_code import state_dict_code
from equalize.checkpoint.preprocess import Preprocess
from equalize.checkpoint.request import Request
from equalize.checkpoint.source import Place
from equalize.errors import CheckpointError, ResourceError

__all__ = ["Torchvision", "arguments_from", "recognize"]

Shapes = Mapping[str, torch.Size]

_MARK = 9973  # a number of classes that no other axis has: shows which tensors carry it


class Torchvision(Family[Spec]):
    """State dicts, and the weights that torchvision publishes as ``torchvision:NAME``."""

    name = "torchvision"
    scheme = "torchvision"
    arch_forms = ("torchvision:NAME",)

    def claims(self, place: Place, weights: Weights, request: Request) -> bool:
        """By name, or where half of the keys are those of one of its networks, if only of a part of one."""
        if request.arch is not None:
            return request.scheme == self.scheme
        shapes = _shapes(weights)
        found = (len(_compare(name, shapes)[0].on_disk) for name in _names() if shapes)
        return place.library == self.name or any(2 * count >= len(shapes) for count in found)

    def open(self, place: Place, weights: Weights, request: Request) -> Spec:
        """The network by name or by keys and shapes, its arguments as these tell them."""
        name, shapes = request.arch_name, _shapes(weights)
        classes: tuple[str, ...] | None = None
        arguments: dict[str, object]
        if place.library == self.name:
            name = place.published or ""
            arguments, classes = published_arguments(name)
            if shapes:
                arguments = arguments_from(name, shapes)
        elif request.arch is None:
            name, arguments = recognize(shapes, request.source, init_missing=request.init_missing)
        else:
            arguments = {**arguments_from(name, shapes), **request.arch_args}
        factory = builder(name)
        if request.num_classes is not None:
            arguments[class_argument(factory, f"{self.scheme}:{name}")] = request.num_classes
        if classes and request.num_classes not in (None, len(classes)):
            classes = None
        return Spec(
            architecture=name,
            make=partial(factory, **arguments),
            preprocess=Preprocess(origin="ImageNet, as torchvision trains"),
            classes=classes,
            num_classes=request.num_classes,
            arch=f"{self.scheme}:{name}",
            arguments=arguments,
        )

    def save_spec(self, spec: Spec, loaded: Loaded, place: Place) -> SaveSpec:
        """With the class names of published weights, which lie in no file of theirs."""
        save = super().save_spec(spec, loaded, place)
        return self.with_classes(save, spec.classes) if spec.classes else save

    def fetch(self, place: Place) -> Place:
        """Published weights from torchvision's server, into its own cache."""
        if place.kind != "published":
            return super().fetch(place)
        return replace(place, kind="file", path=_download(place.published or ""))

    def architecture(self, out: Path) -> str:
        """The function that builds it."""
        return str(read_json(out / ARCHITECTURE_FILE).get("arch")).partition(":")[2]

    def loading_code(self, out: Path, repository: str | None = None, revision: str | None = None) -> str:
        """The function that builds it, then its state dict."""
        arguments: Any = read_json(out / ARCHITECTURE_FILE).get("arch_args") or {}
        given = {**arguments, "weights": None, "weights_backbone": None}
        return state_dict_code(
            out, "torchvision.models.segmentation", self.architecture(out), given, repository, revision
        )


def _shapes(weights: Weights) -> Shapes:
    return {key: tensor.shape for key, tensor in weights.tensors.items()}


def _names() -> list[str]:
    """The segmentation networks of this torchvision."""
    from torchvision.models import list_models, segmentation

    return list(list_models(module=segmentation))


def builder(name: str) -> Callable[..., nn.Module]:
    """The function that builds a network with fresh weights: nothing is downloaded unless arguments ask for it.

    Raises:
        CheckpointError: torchvision has no segmentation network of that name.
    """
    from torchvision.models import get_model_builder

    if name not in _names():
        raise CheckpointError(
            f"torchvision:{name}", "is no segmentation network of torchvision", expected=", ".join(_names())
        )
    build: Callable[..., nn.Module] = get_model_builder(name)

    def make(**arguments: Any) -> nn.Module:
        return build(**{"weights": None, "weights_backbone": None, **arguments})

    make.__signature__ = inspect.signature(build)  # type: ignore[attr-defined]
    return make


@functools.cache
def _marked(name: str, aux_loss: bool) -> Shapes:
    """Key -> shape of a network whose number of classes is `_MARK`."""
    make = builder(name)
    arguments: dict[str, object] = {"num_classes": _MARK}
    if "aux_loss" in inspect.signature(make).parameters:
        arguments["aux_loss"] = aux_loss
    with torch.device("meta"):
        return {key: value.shape for key, value in make(**arguments).state_dict().items()}


def _compare(name: str, shapes: Shapes) -> tuple[Match, dict[str, object]]:
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


def arguments_from(name: str, shapes: Shapes) -> dict[str, object]:
    """The number of classes and the auxiliary head, as a state dict's keys and shapes tell them."""
    return _compare(name, shapes)[1]


def recognize(shapes: Shapes, where: object, *, init_missing: bool) -> tuple[str, dict[str, object]]:
    """The network and arguments that a state dict belongs to.

    Args:
        shapes: key -> shape, as they lie on disk.
        where: the file, for errors.
        init_missing: also accept the only network that the keys are a part of.

    Raises:
        CheckpointError: none fits, or several do.
    """
    matches: dict[str, tuple[Match, dict[str, object]]] = {}
    for name in _names():
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
        f"state dict fits no known architecture (tried torchvision {', '.join(_names())})",
        got=f"{hits} of {len(shapes)} keys in common with {closest}",
        remedy="say what it is, with --arch",
    )


def _download(name: str) -> Path:
    """Fetch torchvision's own weights of a network.

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
    return path


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
