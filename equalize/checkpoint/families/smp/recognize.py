"""Recognizes state dicts of smp: decoder and widths from keys and shapes, the encoder by building candidates.

A candidate, built on the meta device, matches if its keys and shapes are exactly those on disk.
"""

import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from inspect import signature
from itertools import product

import torch

from equalize.checkpoint.families.smp.loader import builder, encoder_shapes, library, shapes_of
from equalize.checkpoint.keys import strippings
from equalize.errors import CheckpointError

Shapes = Mapping[str, torch.Size]
Arguments = dict[str, object]
Options = dict[str, list[object]]
"""Argument -> the values that give a network these keys and shapes, or might; the first is the likeliest."""

_PARTS = {"encoder", "decoder", "segmentation_head"}
_HEADS = ("segmentation_head.0.weight", "segmentation_head.head.4.weight")  # the second is DPT's
_AUX = "classification_head.3.weight"
_PAB, _FPA = "decoder.center.top_conv.weight", "decoder.fpa.branch1.1.conv.weight"
_NORMS = "decoder.feature_norms.{}.weight"
_COUNTER = ".num_batches_tracked"  # old files have none
_DEPTHS: list[object] = [5, 4, 3, 2, 1]  # encoder depths: most decoders depend on the width of its last level alone
_UNTOLD = ("encoder_output_stride", "decoder_atrous_rates", "decoder_interpolation", "upsampling", "activation")
"""Arguments that change what a network computes and leave its keys and shapes as they are."""
_TIMM: Mapping[str, str] = {
    "layer1": "resnet18/resnetblur18 resnet34 resnet50/resnetaa50/resnetblur50 resnet101 resnet152 resnet26 "
    "resnet18d resnet34d/resnetaa34d resnet50d/resnetaa50d/resnetblur50d resnet101d/resnetaa101d/resnetblur101d "
    "resnet152d resnet26d resnext50_32x4d resnext101_32x8d wide_resnet50_2 seresnet50 seresnext50_32x4d "
    "res2net50_14w_8s res2net50_26w_4s res2net50_26w_6s res2net50_26w_8s res2net50_48w_2s res2net101_26w_4s "
    "res2next50 resnest14d resnest26d resnest50d resnest101e resnest50d_1s4x24d resnest50d_4s2x40d",
    "conv_stem": "~efficientnet_lite0 ~efficientnet_b0/efficientnet_blur_b0 mobilenetv2_100 ~mobilenetv3_large_100 "
    "~mobilenetv3_small_100 mobilenetv2_050 mobilenetv2_140 ~mobilenetv3_large_075 ~mobilenetv3_small_075 "
    "tf_mobilenetv3_large_minimal_100 tf_mobilenetv3_small_minimal_100 ~efficientnet_b1 ~efficientnet_b2 "
    "~efficientnet_b3 ~efficientnet_b4 ~efficientnet_b5 ~efficientnet_b6 ~efficientnet_b7 ~efficientnet_lite1 "
    "~efficientnet_lite2 ~efficientnet_lite3 ~efficientnet_lite4 tf_efficientnetv2_b0 tf_efficientnetv2_b1 "
    "tf_efficientnetv2_b2 tf_efficientnetv2_b3 ~efficientnetv2_s ~efficientnetv2_m ~efficientnetv2_l",
    "stem_0": "convnext_atto convnext_femto convnext_pico convnext_nano convnext_tiny convnext_small convnext_base "
    "convnext_large",
    "stem": "regnetx_002 regnetx_004 regnetx_006 regnetx_008 regnetx_016 regnetx_032 regnetx_040 regnetx_064 "
    "regnetx_080 regnety_002 regnety_004 regnety_006 regnety_008 regnety_016 regnety_032 regnety_040 regnety_064 "
    "regnety_080 gernet_s gernet_m gernet_l",
}
"""The most used of timm's thousand by their stem. Between slashes stand those that shapes cannot tell apart; ``~x``
is ``x/tf_x``."""


def _widths(bare: Shapes, pattern: str) -> list[int]:
    """Output channels of layers whose keys count upwards."""
    return [bare[key][0] for number in range(12) if (key := pattern.format(number)) in bare]


def _options(bare: Shapes, depths: list[object], **widths: str) -> Options:
    """Candidate encoder depths, and arguments that equal the output channels of a layer."""
    return {"encoder_depth": depths, **{name: [bare[key][0]] for name, key in widths.items()}}


def _levels(bare: Shapes, pattern: str, *, more: int = 0, **widths: str) -> Options:
    """Where a decoder has a layer for each level of the encoder, or for all but ``more``."""
    return _options(bare, [more + len(_widths(bare, pattern))], **widths)


def _unet(bare: Shapes, blocks: str = "decoder.blocks.", **widths: str) -> Options:
    pattern = f"{blocks}{{}}.conv1.0.weight"
    attention = any(".attention1.attention.cSE." in key for key in bare)
    attended: Options = {"decoder_attention_type": ["scse"]} if attention else {}
    return {"decoder_channels": [_widths(bare, pattern)], **attended, **_levels(bare, pattern, more=0, **widths)}


def _fpn(bare: Shapes) -> Options:
    pyramid, segmentation = "decoder.p5.weight", "decoder.seg_blocks.0.block.0.block.0.weight"
    policy: Options = {"decoder_merge_policy": ["add" if bare[_HEADS[0]][1] == bare[segmentation][0] else "cat"]}
    widths = {"decoder_pyramid_channels": pyramid, "decoder_segmentation_channels": segmentation}
    return _options(bare, _DEPTHS, **widths) | policy


def _deeplab(bare: Shapes, aspp: str) -> Options:
    separable: Options = {"decoder_aspp_separable": [f"{aspp}.convs.1.0.0.weight" in bare]}
    return _options(bare, _DEPTHS, decoder_channels=f"{aspp}.convs.0.0.weight") | separable


def _segformer(bare: Shapes) -> Options:
    levels = len(_widths(bare, "decoder.mlp_stage.{}.linear.weight"))  # transformers have no level of half the size
    return _options(bare, [levels, levels + 1], decoder_segmentation_channels="decoder.mlp_stage.0.linear.weight")


_DECODERS: Mapping[str, tuple[str, Callable[[Shapes], Options]]] = {
    "MAnet": (_PAB, partial(_unet, decoder_pab_channels=_PAB)),
    "Unet": ("decoder.blocks.0.conv1.0.weight", _unet),
    "UnetPlusPlus": ("decoder.blocks.x_0_0.conv1.0.weight", partial(_unet, blocks="decoder.blocks.x_0_")),
    "Linknet": ("decoder.blocks.0.block.0.0.weight", partial(_levels, pattern="decoder.blocks.{}.block.0.0.weight")),
    "FPN": ("decoder.p5.weight", _fpn),
    "PSPNet": (
        "decoder.psp.blocks.0.pool.1.0.weight",
        partial(_options, depths=_DEPTHS, psp_out_channels="decoder.conv.0.weight"),
    ),
    "DeepLabV3": ("decoder.aspp.convs.0.0.weight", partial(_deeplab, aspp="decoder.aspp")),
    "DeepLabV3Plus": ("decoder.aspp.0.convs.0.0.weight", partial(_deeplab, aspp="decoder.aspp.0")),
    "PAN": (_FPA, partial(_levels, pattern="decoder.gau{}.conv2.conv.weight", more=2, decoder_channels=_FPA)),
    "UPerNet": (
        _NORMS.format(0),
        partial(_levels, pattern=_NORMS, more=1, decoder_channels="decoder.fusion_block.0.weight"),
    ),
    "Segformer": ("decoder.mlp_stage.0.linear.weight", _segformer),
}
"""Class -> a key that it alone has (`MAnet` before `Unet`, whose blocks it shares), and how its arguments follow."""


def recognize(
    shapes: Shapes, where: object, named: str | None = None, given: Mapping[str, object] | None = None
) -> tuple[str, Arguments, str]:
    """The class and arguments of the network that a state dict belongs to, and a note on what shapes leave open.

    Where the user ``named`` the class, defaults of smp hold as far as they fit; comparing the keys reports the rest.
    ``given`` are its arguments as far as the user gave them.
    """
    known, bare = dict(given or {}), under_smp_keys(shapes) or {}
    name, options = _decoder(bare)
    if named is not None and (builder(named).func.__name__ != name or _fits(name, known, bare)):
        return named, known, ""
    library()
    if name is not None:
        found = _search(name, bare, options | {key: [value] for key, value in known.items()}, where)
        if found is not None:
            return named or name, found, _note(where, name, found, known)
    if named is not None:
        return named, known, ""
    what = (
        "is of no known decoder of smp" if name is None else f"is an smp:{name}, but its keys do not tell of what kind"
    )
    remedy = f"say its encoder and what else is unusual: --arch smp:{name or 'NAME'} --arch-arg encoder_name=…"
    raise CheckpointError(where, what, remedy=remedy)


def _decoder(bare: Shapes) -> tuple[str | None, Options]:
    """The class, and its arguments derived from keys and shapes; none if no class has its key there."""
    name = next((name for name, (mark, _) in _DECODERS.items() if mark in bare), None)
    try:
        head = next(key for key in _HEADS if key in bare)
        return name, {"classes": [bare[head][0]], **_DECODERS[str(name)][1](bare), **_extras(str(name), bare)}
    except (KeyError, IndexError, StopIteration):
        return None, {}


def _extras(name: str, bare: Shapes) -> Options:
    """An auxiliary head that classifies images; no BatchNorm in a decoder that has them by default."""
    aux: Options = {"aux_params": [{"classes": bare[_AUX][0]}]} if _AUX in bare else {}
    if "decoder_use_norm" not in signature(builder(name)).parameters:
        return aux
    normalized = any(key.startswith("decoder.") and key.endswith(".running_mean") for key in bare)
    return aux if normalized else {**aux, "decoder_use_norm": [False]}


def under_smp_keys(shapes: Shapes) -> Shapes | None:
    """The shapes by smp's keys, if they are smp's; without BatchNorm counters, which old files lack."""
    for reading in reversed(strippings(shapes)):  # those without names of wrappers inside come last
        if {key.partition(".")[0] for key in reading} >= _PARTS and any(head in reading for head in _HEADS):
            return {key: shapes[disk] for key, disk in reading.items() if not key.endswith(_COUNTER)}
    return None


def _note(where: object, name: str, arguments: Arguments, given: Mapping[str, object]) -> str:
    known = signature(builder(name)).parameters
    untold = [argument for argument in _UNTOLD if argument in known and argument not in given]
    return (
        f"{where}: recognized as smp:{name} over {arguments['encoder_name']}; weights do not tell "
        f"{', '.join(untold)}: as smp has them by default, unless --arch smp:{name} --arch-arg {untold[0]}=… says else"
    )


def _search(name: str, bare: Shapes, options: Options, where: object) -> Arguments | None:
    """The one set of arguments that makes a network with these keys and shapes; an error if several do."""
    named = options.get("encoder_name")
    for encoders in _candidates(bare) if named is None else [[str(encoder) for encoder in named]]:
        found = [arguments for encoder in encoders for arguments in _fitting(name, encoder, options, bare)]
        if len(found) > 1:
            differing = [key for key in found[0] if any(each[key] != found[0][key] for each in found)]
            flags = [
                " ".join(f"--arch-arg {shlex.quote(f'{key}={_text(each[key])}')}" for key in differing)
                for each in found
            ]
            what = f"is an smp:{name} whose keys and shapes do not tell {' and '.join(differing)}"
            raise CheckpointError(where, what, remedy=f"choose: --arch smp:{name} with {' or '.join(flags)}")
        if found:
            return found[0]
    return None


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _candidates(bare: Shapes) -> Iterator[list[str]]:
    """Names of encoders whose modules have the names on disk, grouped where shapes cannot distinguish them."""
    parts = {key.split(".")[1] for key in bare if key.startswith("encoder.")}
    if parts == {"model"}:
        inner = {key.split(".")[2] for key in bare if key.startswith("encoder.model.")}
        for group in next((listed for stem, listed in _TIMM.items() if stem in inner), "").split():
            pairs = [f"{name[1:]}/tf_{name[1:]}" if name[0] == "~" else name for name in group.split("/")]
            yield [f"tu-{name}" for name in "/".join(pairs).split("/")]
        return
    kinds: dict[type, list[str]] = {}
    for name, entry in library().encoders.encoders.items():
        kinds.setdefault(entry["encoder"], []).append(name)
    for names in kinds.values():
        if {key.partition(".")[0] for key in encoder_shapes(names[0])} >= parts:
            yield from ([name] for name in names)


def _fitting(name: str, encoder: str, options: Options, bare: Shapes) -> Iterator[Arguments]:
    """The arguments that make a network over an encoder with these keys and shapes."""
    channels = _input_channels(encoder, bare)
    alone = encoder_shapes(encoder, channels)  # empty if it cannot be built without a decoder
    there = {key.removeprefix("encoder."): shape for key, shape in bare.items() if key.startswith("encoder.")}
    if alone and not there.items() <= alone.items():  # smp keeps only the levels of timm's encoders that it uses
        return
    known: Options = {"encoder_name": [encoder], **({} if channels == 3 else {"in_channels": [channels]}), **options}
    for values in product(*known.values()):
        arguments = dict(zip(known, values, strict=True))
        if _fits(name, arguments, bare):
            yield arguments


def _fits(name: str, arguments: Mapping[str, object], bare: Shapes) -> bool:
    built = shapes_of(partial(builder(name), **arguments), name)
    return {key: shape for key, shape in built.items() if not key.endswith(_COUNTER)} == bare


def _input_channels(encoder: str, bare: Shapes) -> int:
    """How many channels the first convolution of an encoder has on disk."""
    for key, shape in encoder_shapes(encoder).items():
        there = bare.get(f"encoder.{key}", torch.Size([]))
        if len(shape) == len(there) == 4 and shape[1] == 3:
            return there[1]
    return 3
