"""smp's decoders by a key that each alone has, and what keys and shapes tell of the arguments they were built with."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch

__all__ = ["DECODERS", "HEADS", "Options", "Shapes", "told"]

Shapes = Mapping[str, torch.Size]
Options = dict[str, list[object]]
"""Argument -> the values that give a network these keys and shapes, or might; the first is the likeliest."""

HEADS = ("segmentation_head.0.weight", "segmentation_head.head.4.weight")
"""The classifier; the second is DPT's."""
_AUX = "classification_head.3.weight"
_DEEPEST = 5


def told(name: str, bare: Shapes) -> Options:
    """What keys and shapes tell of a decoder, its classes and its auxiliary head.

    Raises:
        KeyError: a key is missing that all such networks have.
        IndexError: it has the shape of none.
    """
    head = next((key for key in HEADS if key in bare), HEADS[0])
    options: Options = {"classes": [bare[head][0]], **DECODERS[name][1](bare)}
    if _AUX in bare:
        options["aux_params"] = [{"classes": bare[_AUX][0]}]
    return options


def _widths(bare: Shapes, pattern: str) -> list[int]:
    """Output channels of layers whose keys count upwards."""
    return [bare[key][0] for number in range(12) if (key := pattern.format(number)) in bare]


def _depths(*likely: int, least: int = 1) -> list[object]:
    """Depths of the encoder, the likely ones first: most decoders only see how wide its last level is."""
    return [*likely, *(depth for depth in range(_DEEPEST, least - 1, -1) if depth not in likely)]


def _norm(bare: Shapes, stem: str) -> Options:
    """The normalisation, ``stem.1``, between a convolution and its activation."""
    if f"{stem}.0.bias" in bare:  # a convolution has one where no normalisation follows
        return {"decoder_use_norm": [False]}
    if f"{stem}.1.weight" in bare and f"{stem}.1.running_mean" not in bare:
        untracked = {"type": "batchnorm", "track_running_stats": False}
        return {"decoder_use_norm": [{"type": "instancenorm", "affine": True}, untracked]}
    return {}


def _unet(bare: Shapes, blocks: str = "decoder.blocks.") -> Options:
    channels = _widths(bare, f"{blocks}{{}}.conv1.0.weight")
    options: Options = {"decoder_channels": [channels], "encoder_depth": [len(channels)]}
    if any(".attention1.attention.cSE." in key for key in bare):
        options["decoder_attention_type"] = ["scse"]
    return options | _norm(bare, f"{blocks}0.conv1")


def _manet(bare: Shapes) -> Options:
    return {**_unet(bare), "decoder_pab_channels": [bare["decoder.center.top_conv.weight"][0]]}


def _linknet(bare: Shapes) -> Options:
    first = "decoder.blocks.0.block.0"
    return {"encoder_depth": [len(_widths(bare, "decoder.blocks.{}.block.0.0.weight"))], **_norm(bare, first)}


def _fpn(bare: Shapes) -> Options:
    narrow = bare["decoder.seg_blocks.0.block.0.block.0.weight"][0]
    return {
        "encoder_depth": _depths(least=3),
        "decoder_pyramid_channels": [bare["decoder.p5.weight"][0]],
        "decoder_segmentation_channels": [narrow],
        "decoder_merge_policy": ["add" if bare[HEADS[0]][1] == narrow else "cat"],
    }


def _pspnet(bare: Shapes) -> Options:
    return {
        "encoder_depth": _depths(3),
        "psp_out_channels": [bare["decoder.conv.0.weight"][0]],
        **_norm(bare, "decoder.conv"),
    }


def _deeplab(bare: Shapes, aspp: str, least: int) -> Options:
    return {
        "encoder_depth": _depths(least=least),
        "decoder_channels": [bare[f"{aspp}.convs.0.0.weight"][0]],
        "decoder_aspp_separable": [f"{aspp}.convs.1.0.0.weight" in bare],
    }


def _pan(bare: Shapes) -> Options:
    levels = sum(f"decoder.gau{number}.conv2.conv.weight" in bare for number in (1, 2, 3))
    return {"encoder_depth": [2 + levels], "decoder_channels": [bare["decoder.fpa.branch1.1.conv.weight"][0]]}


def _upernet(bare: Shapes) -> Options:
    return {
        "encoder_depth": [1 + len(_widths(bare, "decoder.feature_norms.{}.weight"))],
        "decoder_channels": [bare["decoder.fusion_block.0.weight"][0]],
        **_norm(bare, "decoder.fusion_block"),
    }


def _segformer(bare: Shapes) -> Options:
    widths = _widths(bare, "decoder.mlp_stage.{}.linear.weight")
    levels: Iterable[int] = (len(widths), len(widths) + 1)  # transformers have no level of half the size
    return {
        "encoder_depth": [depth for depth in levels if depth <= _DEEPEST],
        "decoder_segmentation_channels": [widths[0]],
    }


def _dpt(bare: Shapes) -> Options:
    widths = _widths(bare, "decoder.reassemble_blocks.{}.project_to_out_channel.weight")
    return {
        "encoder_depth": [len(widths)],
        "decoder_intermediate_channels": [widths],
        "decoder_fusion_channels": [bare["decoder.fusion_blocks.0.project.weight"][0]],
        "decoder_readout": ["cat"] if "decoder.projection_blocks.0.project.0.weight" in bare else ["add", "ignore"],
    }


DECODERS: Mapping[str, tuple[str, Callable[[Shapes], Options]]] = {
    "MAnet": ("decoder.center.top_conv.weight", _manet),
    "Unet": ("decoder.blocks.0.conv1.0.weight", _unet),
    "UnetPlusPlus": ("decoder.blocks.x_0_0.conv1.0.weight", partial(_unet, blocks="decoder.blocks.x_0_")),
    "Linknet": ("decoder.blocks.0.block.0.0.weight", _linknet),
    "FPN": ("decoder.p5.weight", _fpn),
    "PSPNet": ("decoder.psp.blocks.0.pool.1.0.weight", _pspnet),
    "DeepLabV3": ("decoder.aspp.convs.0.0.weight", partial(_deeplab, aspp="decoder.aspp", least=1)),
    "DeepLabV3Plus": ("decoder.aspp.0.convs.0.0.weight", partial(_deeplab, aspp="decoder.aspp.0", least=3)),
    "PAN": ("decoder.fpa.branch1.1.conv.weight", _pan),
    "UPerNet": ("decoder.feature_norms.0.weight", _upernet),
    "Segformer": ("decoder.mlp_stage.0.linear.weight", _segformer),
    "DPT": ("decoder.reassemble_blocks.0.project_to_out_channel.weight", _dpt),
}
"""Class -> a key that it alone has (`MAnet` before `Unet`, whose blocks it shares), and how its arguments follow."""
