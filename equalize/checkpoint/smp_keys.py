"""segmentation_models_pytorch, recognised: decoder and its widths from the keys, the encoder by building candidates.

A candidate counts when its keys and shapes are exactly those on disk; it is built on the meta device, without memory.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from equalize.checkpoint import smp_family
from equalize.checkpoint.factory import construct
from equalize.checkpoint.matching import strippings
from equalize.errors import CheckpointError

__all__ = ["looks_like_smp", "recognise"]

Shapes = Mapping[str, torch.Size]

_COUNTER = ".num_batches_tracked"
_PARTS = {"encoder", "decoder", "segmentation_head"}
_HEAD, _AUX = "segmentation_head.0.weight", "classification_head.3.weight"
_TIMM: Mapping[str, Sequence[tuple[str, ...]]] = {
    "layer1": [(f"tu-resnet{depth}{kind}",) for depth in (18, 34, 50, 101, 152, 26) for kind in ("", "d")],
    "conv_stem": [
        *((f"tu-efficientnet_lite{number}", f"tu-tf_efficientnet_lite{number}") for number in range(5)),
        *((f"tu-efficientnet_b{number}", f"tu-tf_efficientnet_b{number}") for number in range(8)),
        *((f"tu-mobilenetv3_{width}_100", f"tu-tf_mobilenetv3_{width}_100") for width in ("small", "large")),
    ],
    "stem_0": [
        (f"tu-convnext_{size}",) for size in ("tiny", "small", "base", "large", "atto", "femto", "pico", "nano")
    ],
}
"""The most used of timm's thousand encoders by a part that they have; those with the same keys and shapes together."""


def looks_like_smp(shapes: Shapes) -> bool:
    """Whether the keys are divided as in every network of smp."""
    return _bare(shapes) is not None


def recognise(shapes: Shapes, where: object) -> tuple[str, dict[str, object], tuple[str, ...]]:
    """The class and arguments of the network that a state dict belongs to, and notes on what shapes do not tell.

    Args:
        shapes: key -> shape, as they lie on disk.
        where: the file, for errors.

    Raises:
        CheckpointError: no candidate fits, or several do.
        ResourceError: smp is not installed.
    """
    bare = _bare(shapes)
    assert bare is not None
    name = next((name for name, (mark, _) in _DECODERS.items() if mark in bare), None)
    flags = (
        "--arch smp:NAME --arch-arg encoder_name=…" if name is None else f"--arch smp:{name} --arch-arg encoder_name=…"
    )
    if name is None:
        raise CheckpointError(
            where, "is of smp, but no known decoder of it", expected=", ".join(_DECODERS), remedy=f"say what: {flags}"
        )
    smp_family.library()
    try:
        arguments = {"classes": bare[_HEAD][0], **_DECODERS[name][1](bare)}
        if _AUX in bare:
            arguments["aux_params"] = {"classes": bare[_AUX][0]}
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            where, f"has the keys of an smp:{name}, but not all of them", got=f"no {error}"
        ) from error
    for names in _encoders(bare):
        fitting = [found for encoder in names if (found := _fit(name, {"encoder_name": encoder, **arguments}, bare))]
        if len(fitting) == 1:
            return name, fitting[0], _notes(where, name, str(fitting[0]["encoder_name"]))
        if fitting:
            raise CheckpointError(
                where,
                f"is an smp:{name} whose keys and shapes several encoders have",
                got=" and ".join(str(each["encoder_name"]) for each in fitting),
                remedy=f"choose: --arch smp:{name} "
                + " ".join(
                    f"--arch-arg {key}={_json(value)}" for key, value in fitting[0].items() if key != "encoder_name"
                )
                + " --arch-arg encoder_name=…",
            )
    raise CheckpointError(where, f"is an smp:{name} over an encoder that is not known here", remedy=f"name it: {flags}")


def _bare(shapes: Shapes) -> Shapes | None:
    """The shapes under the keys that smp gives them, if it does."""
    for reading in strippings(shapes):
        tops = {key.partition(".")[0] for key in reading}
        if tops >= _PARTS and _HEAD in reading and shapes[reading[_HEAD]]:
            return {key: shapes[disk] for key, disk in reading.items()}
    return None


def _notes(where: object, name: str, encoder: str) -> tuple[str, ...]:
    untold = _UNTOLD.get(name)
    rest = f"; {untold}, which weights do not tell, as smp has them by default" if untold else ""
    return (f"{where}: recognised as smp:{name} over {encoder}{rest}",)


def _fit(name: str, arguments: dict[str, object], bare: Shapes) -> dict[str, object] | None:
    """The arguments, with the number of input channels where it is not 3, if a network built with them fits."""
    built = _built(name, arguments)
    if {key for key in built if not key.endswith(_COUNTER)} != {key for key in bare if not key.endswith(_COUNTER)}:
        return None
    differing = [key for key, shape in built.items() if key in bare and bare[key] != shape]
    if len(differing) == 1 and "in_channels" not in arguments:
        there, here = bare[differing[0]], built[differing[0]]
        if len(there) == len(here) == 4 and (there[0], *there[2:]) == (here[0], *here[2:]):
            return _fit(name, {**arguments, "in_channels": there[1]}, bare)
    return None if differing else arguments


def _built(name: str, arguments: Mapping[str, object]) -> Shapes:
    make: Callable[..., Any] = smp_family.builder(name)
    try:
        model = _skeleton(partial(make, **arguments), f"smp:{name}")
    except CheckpointError:  # not every encoder goes with every decoder and depth
        return {}
    return {key: value.shape for key, value in model.state_dict().items()}


def _skeleton(make: Callable[[], nn.Module], arch: str) -> nn.Module:
    with warnings.catch_warnings(action="ignore"):  # smp announces the end of some encoders
        return construct(make, arch, weights=False, seed=0)


def _encoders(bare: Shapes) -> Iterator[tuple[str, ...]]:
    """Names of encoders whose parts have the names that are on disk; together where shapes cannot tell them apart."""
    parts = {key.split(".")[1] for key in bare if key.startswith("encoder.")}
    if parts == {"model"}:
        inner = {key.split(".")[2] for key in bare if key.startswith("encoder.model.")}
        yield from (names for mark, groups in _TIMM.items() if mark in inner for names in groups)
        return
    known = smp_family.library().encoders
    families: dict[type, list[str]] = {}
    for name, entry in known.encoders.items():
        families.setdefault(entry["encoder"], []).append(name)
    for names in families.values():
        first = _skeleton(partial(known.get_encoder, names[0], weights=None), names[0])
        if {key.partition(".")[0] for key in first.state_dict()} >= parts:
            yield from ((name,) for name in names)


def _json(value: object) -> str:
    return str(value).replace(" ", "").replace("'", '"')


def _widths(bare: Shapes, pattern: str, numbers: Iterable[int] = range(12)) -> list[int]:
    """Output channels of layers whose keys count upwards."""
    return [bare[pattern.format(n)][0] for n in numbers if pattern.format(n) in bare]


def _unet(bare: Shapes, pattern: str = "decoder.blocks.{}.conv1.0.weight") -> dict[str, object]:
    channels = _widths(bare, pattern)
    arguments: dict[str, object] = {"decoder_channels": channels, "encoder_depth": len(channels)}
    if pattern.format(0).removesuffix("weight") + "bias" in bare:  # a convolution has one where no BatchNorm follows
        arguments["decoder_use_norm"] = False
    if any(".attention1.attention.cSE." in key for key in bare):
        arguments["decoder_attention_type"] = "scse"
    return arguments


def _manet(bare: Shapes) -> dict[str, object]:
    return {**_unet(bare), "decoder_pab_channels": bare["decoder.center.top_conv.weight"][0]}


def _linknet(bare: Shapes) -> dict[str, object]:
    return {"encoder_depth": len(_widths(bare, "decoder.blocks.{}.block.0.0.weight"))}


def _fpn(bare: Shapes) -> dict[str, object]:
    narrow = bare["decoder.seg_blocks.0.block.0.block.0.weight"][0]
    return {
        "decoder_pyramid_channels": bare["decoder.p5.weight"][0],
        "decoder_segmentation_channels": narrow,
        "decoder_merge_policy": "add" if bare[_HEAD][1] == narrow else "cat",
    }


def _pspnet(bare: Shapes) -> dict[str, object]:
    return {"psp_out_channels": bare["decoder.conv.0.weight"][0]}


def _deeplab(bare: Shapes, aspp: str) -> dict[str, object]:
    separable = f"{aspp}.convs.1.0.0.weight" in bare
    return {"decoder_channels": bare[f"{aspp}.convs.0.0.weight"][0], "decoder_aspp_separable": separable}


def _first(key: str, argument: str, bare: Shapes) -> dict[str, object]:
    return {argument: bare[key][0]}


_STRIDE = "its output stride"
_UNTOLD = {"DeepLabV3": f"{_STRIDE} and atrous rates", "DeepLabV3Plus": f"{_STRIDE} and atrous rates", "PAN": _STRIDE}
_DECODERS: Mapping[str, tuple[str, Callable[[Shapes], dict[str, object]]]] = {
    "MAnet": ("decoder.blocks.0.hl_conv.0.0.weight", _manet),
    "Unet": ("decoder.blocks.0.conv1.0.weight", _unet),
    "UnetPlusPlus": (
        "decoder.blocks.x_0_0.conv1.0.weight",
        lambda bare: _unet(bare, "decoder.blocks.x_0_{}.conv1.0.weight"),
    ),
    "Linknet": ("decoder.blocks.0.block.0.0.weight", _linknet),
    "FPN": ("decoder.p5.weight", _fpn),
    "PSPNet": ("decoder.psp.blocks.0.pool.1.0.weight", _pspnet),
    "DeepLabV3": ("decoder.aspp.convs.0.0.weight", partial(_deeplab, aspp="decoder.aspp")),
    "DeepLabV3Plus": ("decoder.aspp.0.convs.0.0.weight", partial(_deeplab, aspp="decoder.aspp.0")),
    "PAN": (
        "decoder.fpa.branch1.1.conv.weight",
        partial(_first, "decoder.fpa.branch1.1.conv.weight", "decoder_channels"),
    ),
    "UPerNet": ("decoder.feature_norms.0.weight", partial(_first, "decoder.fusion_block.1.weight", "decoder_channels")),
    "Segformer": (
        "decoder.mlp_stage.0.linear.weight",
        partial(_first, "decoder.mlp_stage.0.linear.weight", "decoder_segmentation_channels"),
    ),
}
"""Class -> a key that it alone has, and how its arguments follow from keys and shapes."""
