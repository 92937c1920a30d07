"""Finds the logits in the output of a segmentation network."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

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
