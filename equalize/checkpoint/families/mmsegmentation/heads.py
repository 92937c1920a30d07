"""The outputs of mmsegmentation's networks that carry a loss."""

from typing import Any

from torch import Tensor, nn

from equalize.checkpoint.outputs import main_output

__all__ = ["heads"]


def heads(model: Any, x_NCHW: Tensor) -> list[Tensor]:
    """The logits of the last decode head, of those before it in a cascade, and of auxiliary ones.

    The network's own forward gives the last head's alone. In a cascade each head takes the features and the logits of
    the one before.
    """
    features = model.extract_feat(x_NCHW)
    cascade = model.decode_head if isinstance(model.decode_head, nn.ModuleList) else [model.decode_head]
    found = [main_output(cascade[0](features), type(model).__name__)]
    for head in cascade[1:]:
        found.insert(0, main_output(head(features, found[0]), type(model).__name__))
    auxiliary = getattr(model, "auxiliary_head", None) or ()
    several = auxiliary if isinstance(auxiliary, (nn.ModuleList, tuple)) else (auxiliary,)
    return found + [main_output(head(features), type(model).__name__) for head in several]
