"""Confusion matrix -> mIoU, mAcc, aAcc.

K classes; counts_KK[label, prediction] in pixels. With tp = counts[k, k]: IoU = tp / (labelled k + predicted k - tp),
Acc = tp / labelled k (Long, Shelhamer & Darrell, arXiv 1411.4038, section 5). The means leave out classes for which
the fraction is 0 / 0.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from equalize.errors import DataError, InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScore:
    """One class.

    Attributes:
        id: its index.
        name: its name, or the index as text where none is known.
        IoU: percent; None where no pixel is labelled or predicted so.
        Acc: percent of the labelled pixels that were found; None where no pixel is labelled so.
        pixels: how many are labelled so.
    """

    id: int
    name: str
    IoU: float | None
    Acc: float | None
    pixels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A segmentation against its labels, in percent; None where not one pixel was scored.

    Attributes:
        mIoU: mean of the classes' IoU.
        mAcc: mean of the classes' Acc.
        aAcc: share of all scored pixels that are right.
        classes: every class, absent ones too.
        images: how many were scored.
    """

    mIoU: float | None
    mAcc: float | None
    aAcc: float | None
    classes: tuple[ClassScore, ...]
    images: int

    def to_json(self) -> dict[str, Any]:
        """The object that `equalize evaluate --json` prints."""
        return asdict(self) | {"classes": [asdict(row) for row in self.classes]}


class ConfusionMatrix:
    """Counts pixels by label and prediction; its size does not depend on how many it has seen.

    Attributes:
        counts_KK: (K, K) int64 on the CPU, [label, prediction]; exact, so processes may sum theirs in any order.
        images: how many images were counted.
    """

    def __init__(self, num_classes: int, *, ignore_index: int = 255) -> None:
        if num_classes < 1:
            raise InputError("num_classes", "out of range", got=num_classes, expected="at least 1")
        self.ignore_index = ignore_index
        self.counts_KK = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.images = 0

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count the pixels of an image (H, W) or of a batch (N, H, W), on any device.

        Args:
            prediction: classes, any integer type.
            label: classes or `ignore_index`, of the same shape.

        Raises:
            DataError: a label is neither a class nor ignored.
        """
        assert prediction.shape == label.shape, f"{tuple(prediction.shape)} against {tuple(label.shape)}"
        assert label.ndim in (2, 3), label.shape
        scored = label != self.ignore_index
        label_P, prediction_P = label[scored].long(), prediction[scored].long()
        classes = len(self.counts_KK)
        _check_range(label_P, classes)
        assert not prediction_P.numel() or (prediction_P.min() >= 0 and prediction_P.max() < classes)
        counts = torch.bincount(label_P * classes + prediction_P, minlength=classes * classes)
        self.counts_KK += counts.view(classes, classes).cpu()
        self.images += label.shape[0] if label.ndim == 3 else 1

    def __add__(self, other: "ConfusionMatrix") -> "ConfusionMatrix":
        assert self.counts_KK.shape == other.counts_KK.shape
        assert self.ignore_index == other.ignore_index
        total = ConfusionMatrix(len(self.counts_KK), ignore_index=self.ignore_index)
        total.counts_KK = self.counts_KK + other.counts_KK
        total.images = self.images + other.images
        return total

    def score(self, names: Sequence[str] | None = None) -> Score:
        """The fractions of what was counted so far.

        Args:
            names: of the classes, one each.
        """
        assert names is None or len(names) == len(self.counts_KK)
        right = self.counts_KK.diagonal().tolist()
        labelled = self.counts_KK.sum(dim=1).tolist()
        predicted = self.counts_KK.sum(dim=0).tolist()
        rows = tuple(
            ClassScore(
                id=k,
                name=names[k] if names else str(k),
                IoU=_percent(right[k], labelled[k] + predicted[k] - right[k]),
                Acc=_percent(right[k], labelled[k]),
                pixels=labelled[k],
            )
            for k in range(len(right))
        )
        return Score(
            mIoU=_mean([row.IoU for row in rows]),
            mAcc=_mean([row.Acc for row in rows]),
            aAcc=_percent(sum(right), sum(labelled)),
            classes=rows,
            images=self.images,
        )


def _check_range(label_P: Tensor, classes: int) -> None:
    outside = label_P[(label_P < 0) | (label_P >= classes)]
    if outside.numel():
        raise DataError("labels", f"label {int(outside[0])} is out of range", expected=f"0 to {classes - 1} or ignored")


def _percent(part: int, whole: int) -> float | None:
    return 100.0 * part / whole if whole else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
