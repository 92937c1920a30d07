"""Finds the logits in the output of a segmentation network; pads images to sizes that it takes."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from equalize.errors import SiteError


def main_output(output: Any, architecture: str) -> Tensor:
    """The logits (N, classes, h, w) in the output of a segmentation network.

    Raises:
        SiteError: there is none.
    """
    if isinstance(output, Mapping) and "out" in output:
        output = output["out"]
    elif hasattr(output, "class_queries_logits"):  # mask classification: MaskFormer and its successors
        classes = output.class_queries_logits.softmax(-1)[..., :-1]
        return torch.einsum("nqc,nqhw->nchw", classes, output.masks_queries_logits.sigmoid())
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    if isinstance(output, Tensor) and output.ndim >= 4:
        return output
    raise SiteError(
        architecture, "returns no logits", got=type(output).__name__, expected="a tensor (N, classes, h, w)"
    )


def round_up(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """The smallest multiples that are no less than (H, W)."""
    height, width = (-(-side // multiple) * multiple for side in size)
    return height, width


def pad_images(x_NCHW: Tensor, multiple: int) -> Tensor:
    """Images (N, C, H, W) padded with 0, the normalized mean, at the right and bottom to sides that are multiples."""
    height, width = x_NCHW.shape[2:]
    rows, columns = round_up((height, width), multiple)
    return x_NCHW if (rows, columns) == (height, width) else F.pad(x_NCHW, (0, columns - width, 0, rows - height))


def logits_of_padded(logits: Callable[[Tensor], Tensor], x_NCHW: Tensor, multiple: int) -> Tensor:
    """Logits of images (N, C, H, W) as the network gives them; of padded ones brought to their size and cropped back.

    Args:
        logits: (N, C, H, W) -> (N, classes, h, w).
        x_NCHW: of any size.
        multiple: of which the sides must be that the network takes.

    Returns:
        (N, classes, h, w), or (N, classes, H, W) where images were padded.
    """
    padded = pad_images(x_NCHW, multiple)
    scores = logits(padded)
    if padded is x_NCHW:
        return scores
    scores = F.interpolate(scores.float(), size=padded.shape[2:], mode="bilinear", align_corners=False)
    return scores[..., : x_NCHW.shape[2], : x_NCHW.shape[3]]
