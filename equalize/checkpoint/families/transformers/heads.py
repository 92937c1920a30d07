"""The outputs of transformers' segmentation networks that carry a loss."""

from torch import Tensor, nn

from equalize.checkpoint.outputs import main_output

__all__ = ["heads"]


def heads(model: nn.Module, x_NCHW: Tensor) -> list[Tensor]:
    """The logits of the main head and of the auxiliary one, each (N, classes, h, w).

    The auxiliary head's are not returned without labels: they are caught as it gives them.
    """
    auxiliary: list[Tensor] = []
    head = getattr(model, "auxiliary_head", None)
    hook = head.register_forward_hook(lambda *call: auxiliary.append(call[-1])) if isinstance(head, nn.Module) else None
    try:
        return [main_output(model(x_NCHW), type(model).__name__), *auxiliary]
    finally:
        if hook is not None:
            hook.remove()
