"""torchvision's segmentation networks: state dicts, recognized by their keys, and published weights."""

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
from equalize.checkpoint.families.torchvision.description import TorchvisionDescription
from equalize.checkpoint.family import Family, Loaded, SaveSpec, Spec
from equalize.checkpoint.files.weights import Weights
from equalize.checkpoint.keys import Match, pair, unwrapped
from equalize.checkpoint.preprocess import Preprocess
from equalize.checkpoint.request import Request
from equalize.checkpoint.source import Place
from equalize.errors import CheckpointError, ResourceError

Shapes = Mapping[str, torch.Size]

_CLASSIFIERS = (".classifier.4.weight", ".classifier.low_classifier.weight")  # the second is LR-ASPP's


class Torchvision(TorchvisionDescription, Family[Spec]):
    """State dicts, and the weights that torchvision publishes as ``torchvision:NAME``."""

    arch_forms = ("torchvision:NAME",)

    def claims(self, place: Place, weights: Weights, request: Request) -> bool:
        """By name, or if half of the keys are those of one of its networks or of a part of one."""
        if request.arch is not None:
            return request.scheme == self.scheme
        shapes = weights.shapes
        found = (len(_compare(name, shapes).on_disk) for name in _names() if shapes)
        return place.library == self.name or any(2 * count >= len(shapes) for count in found)

    def open(self, place: Place, weights: Weights, request: Request) -> Spec:
        """The network by name or by keys and shapes, its arguments from the shapes."""
        shapes, classes = weights.shapes, None
        if place.library == self.name:
            name = place.published or ""
            classes = tuple(_published(name).meta["categories"])
        else:
            name = request.arch_name if request.arch is not None else recognize(shapes, request.source)
        factory, arguments = builder(name), {**arguments_from(name, shapes), **request.arch_args}
        if request.num_classes is not None:
            arguments[class_argument(factory, f"{self.scheme}:{name}")] = request.num_classes
        return Spec(
            architecture=name,
            make=partial(factory, **arguments),
            preprocess=Preprocess(origin="ImageNet, as torchvision trains", assumed=place.library != self.name),
            classes=classes if classes and request.num_classes in (None, len(classes)) else None,
            num_classes=request.num_classes,
            arch=f"{self.scheme}:{name}",
            arguments=arguments,
        )

    def save_spec(self, spec: Spec, loaded: Loaded, place: Place) -> SaveSpec:
        """Adds the class names of published weights, whose files have none."""
        save = super().save_spec(spec, loaded, place)
        return self.with_classes(save, spec.classes) if spec.classes else save

    def fetch(self, place: Place) -> Place:
        """Published weights from torchvision's server, into its own cache."""
        if place.kind != "published":
            return super().fetch(place)
        return replace(place, kind="file", path=_download(place.published or ""))


def _names() -> list[str]:
    """The segmentation networks of this torchvision."""
    from torchvision.models import list_models, segmentation

    return list(list_models(module=segmentation))


def builder(name: str) -> Callable[..., nn.Module]:
    """The function that builds a network with fresh weights: nothing is downloaded unless arguments ask for it."""
    from torchvision.models import get_model_builder

    if name not in _names():
        what = "is no segmentation network of torchvision"
        raise CheckpointError(f"torchvision:{name}", what, expected=", ".join(_names()))
    return partial(get_model_builder(name), weights=None, weights_backbone=None)


def arguments_from(name: str, shapes: Shapes) -> dict[str, object]:
    """The number of classes and the auxiliary head, derived from keys and shapes on disk.

    Without shapes they are those of the published weights, which all have the auxiliary head.
    """
    found: dict[str, object] = {}
    if "aux_loss" in inspect.signature(builder(name)).parameters:
        found["aux_loss"] = not shapes or any("aux_classifier." in key for key in shapes)
    for key, shape in shapes.items():
        if f".{unwrapped(key)}".endswith(_CLASSIFIERS) and shape.numel() > 0:
            found["num_classes"] = shape[0]
    return found


@functools.cache
def _shapes_of(name: str, **arguments: Any) -> Shapes:
    with torch.device("meta"):
        return {key: value.shape for key, value in builder(name)(**arguments).state_dict().items()}


def _compare(name: str, shapes: Shapes) -> Match:
    return pair(_shapes_of(name, **arguments_from(name, shapes)), shapes)


def recognize(shapes: Shapes, where: object) -> str:
    """The network whose keys and shapes a state dict has, or that it has the most in common with."""
    matches = {name: _compare(name, shapes) for name in _names()}
    whole = next((name for name, match in matches.items() if match.complete), None)
    if whole is not None:
        return whole
    parts = [name for name, match in matches.items() if match.on_disk and not (match.unexpected or match.mismatched)]
    if len(parts) > 1:
        remedy = "choose: --arch torchvision:NAME"
        raise CheckpointError(where, "is part of several networks", got=", ".join(parts), remedy=remedy)
    return parts[0] if parts else max(matches, key=lambda name: len(matches[name].on_disk))


def _published(name: str) -> Any:
    """torchvision's own weights of a network."""
    from torchvision.models import get_model_weights

    builder(name)
    return get_model_weights(name).DEFAULT


def _download(name: str) -> Path:
    """Fetch torchvision's own weights of a network."""
    url = _published(name).url
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not path.exists():
        digest = torch.hub.HASH_REGEX.search(path.name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), digest[1] if digest else None, sys.stderr.isatty())
        except (OSError, RuntimeError) as error:  # a URLError is an OSError
            reason = getattr(error, "reason", error)
            raise ResourceError(f"torchvision:{name}", f"weights cannot be downloaded ({reason})") from error
    return path
