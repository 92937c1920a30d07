"""smp's encoders and the most used of timm's, narrowed down to those that a state dict can hold."""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from equalize.checkpoint.build import construct
from equalize.checkpoint.families.smp import family as smp_family
from equalize.checkpoint.families.smp.decoders import Shapes
from equalize.errors import CheckpointError

__all__ = ["COUNTER", "candidates", "input_channels", "shapes_of"]

COUNTER = ".num_batches_tracked"
_PREFIX = "encoder."
_COLOURS = 3
_TIMM: Mapping[str, str] = {
    "layer1": "resnet18/resnetblur18 resnet34 resnet50/resnetaa50/resnetblur50 resnet101 resnet152 resnet26 "
    "resnet18d resnet34d/resnetaa34d resnet50d/resnetaa50d/resnetblur50d resnet101d/resnetaa101d/resnetblur101d "
    "resnet152d resnet26d resnext50_32x4d resnext101_32x8d wide_resnet50_2 seresnet50 seresnext50_32x4d "
    "res2net50_14w_8s res2net50_26w_4s res2net50_26w_6s res2net50_26w_8s res2net50_48w_2s res2net101_26w_4s "
    "res2next50 resnest14d resnest26d resnest50d resnest101e resnest50d_1s4x24d resnest50d_4s2x40d",
    "conv_stem": "efficientnet_lite0/tf_efficientnet_lite0 efficientnet_b0/tf_efficientnet_b0/efficientnet_blur_b0 "
    "mobilenetv2_100 mobilenetv3_large_100/tf_mobilenetv3_large_100 mobilenetv3_small_100/tf_mobilenetv3_small_100 "
    "mobilenetv2_050 mobilenetv2_140 mobilenetv3_large_075/tf_mobilenetv3_large_075 "
    "mobilenetv3_small_075/tf_mobilenetv3_small_075 tf_mobilenetv3_large_minimal_100 tf_mobilenetv3_small_minimal_100 "
    "efficientnet_b1/tf_efficientnet_b1 efficientnet_b2/tf_efficientnet_b2 efficientnet_b3/tf_efficientnet_b3 "
    "efficientnet_b4/tf_efficientnet_b4 efficientnet_b5/tf_efficientnet_b5 efficientnet_b6/tf_efficientnet_b6 "
    "efficientnet_b7/tf_efficientnet_b7 efficientnet_lite1/tf_efficientnet_lite1 "
    "efficientnet_lite2/tf_efficientnet_lite2 efficientnet_lite3/tf_efficientnet_lite3 "
    "efficientnet_lite4/tf_efficientnet_lite4 tf_efficientnetv2_b0 tf_efficientnetv2_b1 tf_efficientnetv2_b2 "
    "tf_efficientnetv2_b3 efficientnetv2_s/tf_efficientnetv2_s efficientnetv2_m/tf_efficientnetv2_m "
    "efficientnetv2_l/tf_efficientnetv2_l",
    "stem_0": "convnext_atto convnext_femto convnext_pico convnext_nano convnext_tiny convnext_small convnext_base "
    "convnext_large",
    "stem": "regnetx_002 regnetx_004 regnetx_006 regnetx_008 regnetx_016 regnetx_032 regnetx_040 regnetx_064 "
    "regnetx_080 regnety_002 regnety_004 regnety_006 regnety_008 regnety_016 regnety_032 regnety_040 regnety_064 "
    "regnety_080 gernet_s gernet_m gernet_l",
}
"""The most used of timm's thousand by a part that they have; between slashes those that shapes cannot tell apart."""


def candidates(bare: Shapes) -> Iterator[list[str]]:
    """Names of encoders whose parts are called as those in ``bare``; together where shapes cannot tell them apart."""
    parts = {key.split(".")[1] for key in bare if key.startswith(_PREFIX)}
    if parts == {"model"}:
        inner = {key.split(".")[2] for key in bare if key.startswith(f"{_PREFIX}model.")}
        listed = next((listed for mark, listed in _TIMM.items() if mark in inner), "")
        yield from ([f"tu-{name}" for name in group.split("/")] for group in listed.split())
        return
    families: dict[type, list[str]] = {}
    for name, entry in smp_family.library().encoders.encoders.items():
        families.setdefault(entry["encoder"], []).append(name)
    for names in families.values():
        if {key.partition(".")[0] for key in _encoder(names[0])} >= parts:
            yield from ([name] for name in names)


def input_channels(name: str, bare: Shapes) -> int | None:
    """How many channels the input of an encoder has in ``bare``; None if that is another encoder.

    Of timm's encoders smp keeps only the levels that are asked for, of its own all.
    """
    built = _encoder(name)
    if not built:
        return _COLOURS  # not to be had without a decoder
    there = {key.removeprefix(_PREFIX): shape for key, shape in bare.items() if key.startswith(_PREFIX)}
    differing = [key for key, shape in there.items() if not key.endswith(COUNTER) and built.get(key) != shape]
    channels = {_exchanged(built.get(key), there[key]) for key in differing} or {_COLOURS}
    return channels.pop() if len(channels) == 1 else None


def _exchanged(here: torch.Size | None, there: torch.Size) -> int | None:
    """The input channels of a convolution that has three in the network as built, if all else is equal."""
    if here is None or len(here) != 4 or len(there) != 4 or here[1] != _COLOURS:
        return None
    return there[1] if (here[0], *here[2:]) == (there[0], *there[2:]) else None


@functools.cache
def _encoder(name: str) -> Shapes:
    return shapes_of(functools.partial(smp_family.library().encoders.get_encoder, name, weights=None), name)


def shapes_of(make: Callable[[], nn.Module], name: str) -> Shapes:
    """Key -> shape of a network, built without memory; empty if it cannot be built.

    Not every encoder goes with every decoder, depth and stride.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # smp announces the end of some encoders
            model = construct(make, name, weights=False, seed=0)
    except CheckpointError:
        return {}
    return {key: value.shape for key, value in model.state_dict().items()}
