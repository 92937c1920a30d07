"""segmentation_models_pytorch: its classes by name, the preprocessing of its encoders, its own loader."""

import contextlib
import functools
import io
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from torch import nn

from equalize.checkpoint.build import construct
from equalize.checkpoint.preprocess import Preprocess
from equalize.errors import CheckpointError, ResourceError
from equalize.messages import one_line


def library() -> ModuleType:
    """The library, which is an extra."""
    try:
        import segmentation_models_pytorch
    except ImportError as error:
        remedy = "pip install equalize[smp]"
        raise ResourceError("segmentation_models_pytorch", "not installed", remedy=remedy) from error
    return segmentation_models_pytorch  # type: ignore[no-any-return]


def builder(name: str) -> "functools.partial[nn.Module]":
    """The class of that name (``Unet`` or ``unet``), with fresh encoder weights unless arguments ask for others."""
    classes = library().MODEL_ARCHITECTURES_MAPPING
    if name.lower() not in classes:
        expected = ", ".join(cls.__name__ for cls in classes.values())
        raise CheckpointError(f"smp:{name}", "is no architecture of segmentation_models_pytorch", expected=expected)
    return functools.partial(classes[name.lower()], encoder_weights=None)


def preprocessing(encoder: str, pretrained: str) -> Preprocess:
    """The encoder's preprocessing if timm's tables or smp's file in the Hub's cache have it, else ImageNet's."""
    from huggingface_hub import try_to_load_from_cache

    encoders = library().encoders
    try:
        if not encoder.startswith("tu-"):
            place = encoders.encoders[encoder]["pretrained_settings"][pretrained]
            cached = try_to_load_from_cache(place["repo_id"], "config.json", revision=place["revision"])
            if not isinstance(cached, str):
                raise FileNotFoundError
        settings = encoders.get_preprocessing_params(encoder, pretrained)
    except (ValueError, KeyError, RuntimeError, OSError):
        origin = f"ImageNet defaults, smp's settings of encoder {encoder} are not at hand"
        return Preprocess(origin=origin, assumed=True)
    channels: Literal["RGB", "BGR"] = "BGR" if settings["input_space"] == "BGR" else "RGB"
    return Preprocess(
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        rescale=1.0 if max(settings["input_range"]) > 1 else 1 / 255,
        channels=channels,
        origin=f"smp's settings of encoder {encoder}",
        assumed=True,  # neither smp's directories nor state dicts say what the network itself was trained with
    )


def reload(directory: Path) -> nn.Module:
    """Load a directory with ``smp.from_pretrained``, strictly, without downloading the encoder's weights."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the Hub's mixin prints
            model: nn.Module = library().from_pretrained(str(directory), encoder_weights=None)
    except (RuntimeError, TypeError, KeyError, ValueError) as error:
        raise CheckpointError(directory, f"smp.from_pretrained refuses it ({one_line(error)})") from error
    return model.eval()


@functools.cache
def encoder_shapes(name: str, in_channels: int = 3) -> Mapping[str, torch.Size]:
    """Key -> shape of an encoder by itself; empty if it cannot be built without a decoder."""
    return shapes_of(functools.partial(library().encoders.get_encoder, name, in_channels, weights=None), name)


def shapes_of(make: Callable[[], nn.Module], name: str) -> Mapping[str, torch.Size]:
    """Key -> shape of a network, built without memory; empty if an encoder does not go with a decoder or depth."""
    try:
        with warnings.catch_warnings(action="ignore"):  # smp warns about deprecated encoders
            model = construct(make, name, on_meta=True)
    except CheckpointError:
        return {}
    return {key: value.shape for key, value in model.state_dict().items()}
