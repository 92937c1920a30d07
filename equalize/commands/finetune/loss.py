"""The training loss, and a module that computes it."""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equalize.checkpoint import Checkpoint
from equalize.checkpoint.checkpoint import main_output
from equalize.commands.finetune.config import TrainConfig
from equalize.commands.labels import as_classes
from equalize.errors import InputError


def segmentation_loss(heads: Sequence[Tensor], labels_NHW: Tensor, config: TrainConfig) -> Tensor:
    """Cross entropy at the labels' resolution: of the main head and, weighted, of auxiliary ones.

    Args:
        heads: logits (N, classes, h, w), the main head's first.
        labels_NHW: classes or `config.ignored`; where every label is ignored the loss is 0.
        config: class weights, weight of auxiliary heads, ignored label.

    Returns:
        A scalar ().
    """
    losses = [_cross_entropy(logits, labels_NHW, config) for logits in heads]
    return losses[0] + config.aux_weight * sum(losses[1:])


def _cross_entropy(logits_NChw: Tensor, labels_NHW: Tensor, config: TrainConfig) -> Tensor:
    height, width = labels_NHW.shape[1:]
    logits = F.interpolate(as_classes(logits_NChw).float(), size=(height, width), mode="bilinear", align_corners=False)
    weights_C = logits.new_tensor(config.class_weights or [1.0] * logits.shape[1])
    loss = F.cross_entropy(
        logits,
        labels_NHW,
        weight=weights_C,
        ignore_index=config.ignored,
        label_smoothing=config.label_smoothing,
        reduction="sum",
    )
    counted = labels_NHW != config.ignored
    total = (counted * weights_C[labels_NHW.where(counted, 0)]).sum()
    return loss / total.clamp(min=torch.finfo(torch.float32).tiny)  # torch's own mean of no label is 0/0


def backbone_of(checkpoint: Checkpoint) -> str | None:
    """The module path of the network's backbone, by the names that libraries use; None if there is none."""
    known = ("backbone", "encoder", getattr(checkpoint.model, "base_model_prefix", ""))
    children = dict(nn.Module.named_children(checkpoint.model))
    return next((name for name in known if name in children), None)


class ModelWithLoss(nn.Module):
    """A network of any family as `transformers.Trainer` takes it: images and labels in, loss out.

    `frozen` are modules that stay in eval mode.

    Raises:
        InputError: the network is trained with another kind of loss.
    """

    def __init__(self, checkpoint: Checkpoint, config: TrainConfig, frozen: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        if "mask_labels" in inspect.signature(checkpoint.model.forward).parameters:
            what, expected = "is trained by matching masks, which is not supported yet", "logits for every pixel"
            raise InputError(checkpoint.architecture, what, expected=expected)
        self.network = checkpoint.model
        self._no_split_modules = getattr(checkpoint.model, "_no_split_modules", None)  # the modules that FSDP wraps
        self._config = config
        self._heads = checkpoint.adapter.heads
        self._frozen = frozen

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """The loss of a batch, (N, 3, H, W) and (N, H, W); without labels the logits of the main head."""
        if labels is None:
            return {"logits": main_output(self.network(pixel_values), type(self.network).__name__)}
        return {"loss": segmentation_loss(self._heads(self.network, pixel_values), labels, self._config)}

    def train(self, mode: bool = True) -> "ModelWithLoss":
        """Sets the mode of all modules except the frozen ones."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self
