"""The training loss, and a network that gives it."""

import inspect

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equalize.checkpoint import Checkpoint
from equalize.checkpoint.checkpoint import main_output
from equalize.commands.labels import as_classes
from equalize.errors import InputError

__all__ = ["Criterion", "ModelWithLoss", "backbone_of"]


class Criterion(nn.Module):
    """Cross entropy at the labels' resolution, of the main head and, weighted, of auxiliary ones.

    Args:
        ignore_index: the label that does not count.
        class_weights: one a class.
        label_smoothing: 0 to 1.
        aux_weight: of each auxiliary head.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        *,
        ignore_index: int = 255,
        class_weights: tuple[float, ...] | None = None,
        label_smoothing: float = 0.0,
        aux_weight: float = 0.4,
    ) -> None:
        super().__init__()
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.aux_weight = aux_weight

    def forward(self, heads: list[Tensor], labels_NHW: Tensor) -> Tensor:
        """The loss of the heads' logits (N, classes, h, w), the main head first; 0 where every label is ignored."""
        total = self._cross_entropy(heads[0], labels_NHW)
        for auxiliary in heads[1:]:
            total = total + self.aux_weight * self._cross_entropy(auxiliary, labels_NHW)
        return total

    def _cross_entropy(self, logits: Tensor, labels_NHW: Tensor) -> Tensor:
        height, width = labels_NHW.shape[1:]
        logits = F.interpolate(as_classes(logits).float(), size=(height, width), mode="bilinear", align_corners=False)
        loss = F.cross_entropy(
            logits,
            labels_NHW,
            weight=self.class_weights,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )
        # torch's mean would be 0/0 where a crop has nothing but ignored labels.
        counted = labels_NHW != self.ignore_index
        weights = counted.float()
        if self.class_weights is not None:
            weights = weights * self.class_weights[labels_NHW.where(counted, 0)]
        return loss / weights.sum().clamp(min=torch.finfo(torch.float32).tiny)


def backbone_of(checkpoint: Checkpoint) -> str | None:
    """The module path of the network's backbone, if it has one: under the name that libraries give it."""
    known = ("backbone", "encoder", getattr(checkpoint.model, "base_model_prefix", ""))
    children = dict(nn.Module.named_children(checkpoint.model))
    return next((name for name in known if name in children), None)


class ModelWithLoss(nn.Module):
    """A network of any family as `transformers.Trainer` takes it: pictures and labels in, loss out.

    Args:
        checkpoint: whose model is trained.
        criterion: the loss.
        frozen: modules that stay in eval mode.

    Raises:
        InputError: the network is trained with another kind of loss.
    """

    def __init__(self, checkpoint: Checkpoint, criterion: Criterion, frozen: tuple[nn.Module, ...] = ()) -> None:
        super().__init__()
        if "mask_labels" in inspect.signature(checkpoint.model.forward).parameters:
            raise InputError(
                checkpoint.architecture,
                "is trained by matching masks, which is not supported yet",
                expected="a network that gives logits for every pixel",
            )
        self.network = checkpoint.model
        self._no_split_modules = getattr(checkpoint.model, "_no_split_modules", None)  # where FSDP shall cut
        self.criterion = criterion
        self._heads = checkpoint.adapter.heads
        self._frozen = frozen

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """The loss of a batch, (N, 3, H, W) and (N, H, W); without labels the logits of the main head."""
        if labels is None:
            return {"logits": main_output(self.network(pixel_values), type(self.network).__name__)}
        return {"loss": self.criterion(self._heads(self.network, pixel_values), labels)}

    def train(self, mode: bool = True) -> "ModelWithLoss":
        """As ever, but for what is frozen."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self
