"""segmentation_models_pytorch: its classes by name, the preprocessing of its encoders, its own loader."""

import contextlib
import functools
import inspect
import io
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn

from equalize.checkpoint.build import construct
from equalize.checkpoint.preprocess import Preprocess
from equalize.errors import CheckpointError, ResourceError

__all__ = ["builder", "encoder_shapes", "library", "preprocessing", "reload", "shapes_of"]


def library() -> ModuleType:
    """The library, which is an extra.

    Raises:
        ResourceError: not installed.
    """
    try:
        import segmentation_models_pytorch
    except ImportError as error:
        raise ResourceError(
            "segmentation_models_pytorch", "not installed", remedy="pip install equalize[smp]"
        ) from error
    return segmentation_models_pytorch  # type: ignore[no-any-return]


def builder(name: str) -> Callable[..., nn.Module]:
    """The class of that name (``Unet`` or ``unet``), with fresh encoder weights unless arguments ask for others.

    Raises:
        CheckpointError: smp has no such architecture.
    """
    classes = library().MODEL_ARCHITECTURES_MAPPING
    found = classes.get(name.lower())
    if found is None:
        expected = ", ".join(cls.__name__ for cls in classes.values())
        raise CheckpointError(f"smp:{name}", "is no architecture of segmentation_models_pytorch", expected=expected)

    def make(**arguments: Any) -> nn.Module:
        model: nn.Module = found(**{"encoder_weights": None, **arguments})
        return model

    make.__name__ = found.__name__
    make.__signature__ = inspect.signature(found.__init__)  # type: ignore[attr-defined]
    return make


def preprocessing(encoder: str, pretrained: str | None) -> Preprocess:
    """What the encoder was pretrained with, as far as this can be known here; else ImageNet's numbers."""
    settings = _settings(encoder, pretrained or "imagenet")
    if settings is None:
        return Preprocess(origin=f"ImageNet defaults, smp's settings of encoder {encoder} are not at hand")
    top = max(float(value) for value in settings.get("input_range", [0, 1]))
    channels: Literal["RGB", "BGR"] = "BGR" if settings.get("input_space") == "BGR" else "RGB"
    return Preprocess(
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        rescale=1.0 if top > 1 else 1 / 255,
        channels=channels,
        origin=f"smp's settings of encoder {encoder}",
    )


def _settings(encoder: str, pretrained: str) -> dict[str, Any] | None:
    """smp's own answer where it needs no network: timm's tables, or a file already in the Hub cache."""
    from huggingface_hub import try_to_load_from_cache

    smp = library()
    if not encoder.startswith("tu-"):
        place = smp.encoders.encoders.get(encoder, {}).get("pretrained_settings", {}).get(pretrained)
        if place is None:
            return None
        cached = try_to_load_from_cache(place["repo_id"], "config.json", revision=place["revision"])
        if not isinstance(cached, str) or not Path(cached).is_file():
            return None
    try:
        return dict(smp.encoders.get_preprocessing_params(encoder, pretrained))
    except (ValueError, KeyError, RuntimeError, OSError):
        return None


def reload(directory: Path) -> nn.Module:
    """Load a directory with ``smp.from_pretrained``, strictly, whatever it once took its encoder's weights from.

    Raises:
        CheckpointError: smp does not take it.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the Hub's mixin prints
            model: nn.Module = library().from_pretrained(str(directory), encoder_weights=None)
    except (RuntimeError, TypeError, KeyError, ValueError) as error:
        raise CheckpointError(
            directory, f"smp.from_pretrained refuses it ({' '.join(str(error).split())[:200]})"
        ) from error
    return model.eval()


@functools.cache
def encoder_shapes(name: str) -> Mapping[str, torch.Size]:
    """Key -> shape of an encoder by itself; empty if it cannot be built without a decoder."""
    return shapes_of(functools.partial(library().encoders.get_encoder, name, weights=None), name)


def shapes_of(make: Callable[[], nn.Module], name: str) -> Mapping[str, torch.Size]:
    """Key -> shape of a network, built without memory; empty if it cannot be built.

    Not every encoder goes with every decoder, depth and stride.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # smp announces the end of some encoders
            model = construct(make, name, on_meta=True)
    except CheckpointError:
        return {}
    return {key: value.shape for key, value in model.state_dict().items()}
