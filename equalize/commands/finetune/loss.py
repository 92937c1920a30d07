"""The training loss, and a module that computes it."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equalize.checkpoint.checkpoint import Checkpoint
from equalize.commands.finetune.config import TrainConfig
from equalize.commands.finetune.stored_backbone import StoredBackbone
from equalize.commands.finetune.trained_output import TrainedOutput
from equalize.commands.labels import as_classes


def segmentation_loss(heads: Sequence[Tensor], labels_NHW: Tensor, config: TrainConfig) -> Tensor:
    """Cross entropy () at the labels' resolution: of the main head, the first, and, weighted, of auxiliary ones.

    Logits are (N, classes, h, w); labels are classes or `config.ignored`. Where every label is ignored it is 0.
    """
    losses = [_cross_entropy(logits, labels_NHW, config) for logits in heads]
    return losses[0] + config.aux_weight * sum(losses[1:])


def _cross_entropy(logits_NChw: Tensor, labels_NHW: Tensor, config: TrainConfig) -> Tensor:
    logits, size = as_classes(logits_NChw).float(), labels_NHW.shape[1:]
    if logits.shape[2:] != size:  # the identity would cost as much as any other
        logits = F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
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

    `trained` says which output carries the loss; `frozen` are modules that stay in eval mode; `backbone` is one whose
    outputs come with the batch.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: TrainConfig,
        trained: TrainedOutput,
        frozen: Sequence[nn.Module] = (),
        backbone: StoredBackbone | None = None,
    ) -> None:
        super().__init__()
        self.network = checkpoint.model
        self._no_split_modules = getattr(checkpoint.model, "_no_split_modules", None)  # the modules that FSDP wraps
        self._config = config
        self._checkpoint = replace(checkpoint, save_spec=None)
        self._trained = trained
        self._frozen = frozen
        self._backbone = backbone
        self._mode: bool | None = None  # that was set last

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, features: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The loss of a batch, (N, C, H, W) and (N, H, W); without labels the logits of the main head.

        With `features`, (N, F), the backbone returns them, and only the shape of `pixel_values` matters.
        """
        stored = nullcontext() if features is None or self._backbone is None else self._backbone.returning(features)
        with stored:
            if labels is None:
                return {"logits": self._checkpoint.scores(self.network(pixel_values), pixel_values)}
            heads = self._trained.of(self._checkpoint, self.network, pixel_values)
        return {"loss": segmentation_loss(heads, labels, self._config)}

    def train(self, mode: bool = True) -> "ModelWithLoss":
        """Sets the mode of all modules except the frozen ones; the trainer calls it before every step."""
        if mode == self._mode == self.training:
            return self
        self._mode = mode
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self
