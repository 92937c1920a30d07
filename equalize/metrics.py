"""mIoU, mAcc and aAcc from pixels counted by label and prediction.

K classes; counts_KK[label, prediction] in pixels. With tp = counts[k, k]: IoU = tp / (labeled k + predicted k - tp),
Acc = tp / labeled k (Long, Shelhamer & Darrell, arXiv 1411.4038, section 5). The means leave out classes for which
the fraction is 0 / 0.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScore:
    """One class."""

    id: int
    name: str
    """Its index as text where no name is known."""
    IoU: float | None
    """Percent; None for a class in no label and no prediction."""
    Acc: float | None
    """Percent of the class's pixels that were predicted; None where there are none."""
    pixels: int
    """The number of pixels with this label."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A segmentation against its labels, in percent; None where not one pixel was scored."""

    mIoU: float | None
    mAcc: float | None
    aAcc: float | None
    classes: tuple[ClassScore, ...]
    """Every class, absent ones too."""
    images: int
    left_out: int | None = None
    """A class that is not scored."""

    def to_json(self) -> dict[str, Any]:
        """The object that `equalize evaluate --json` prints."""
        given = asdict(self) | {"classes": [asdict(row) for row in self.classes]}
        del given["left_out"]
        return given


def count_pixels(prediction: Tensor, label: Tensor, num_classes: int, *, ignore_index: int = 255) -> Tensor:
    """(K, K) int64 on the CPU: pixels by [label, prediction]; exact, so that images may be summed in any order.

    `prediction` and `label`, classes or `ignore_index`, are of one shape and of any integer type.
    """
    cells = label.long() * num_classes + prediction.long()
    cells = cells.where(label != ignore_index, num_classes**2)
    counts = torch.bincount(cells.flatten(), minlength=num_classes**2 + 1)[:-1]
    return counts.view(num_classes, num_classes).cpu()


def score_of(counts_KK: Tensor, images: int, names: Sequence[str] | None = None, left_out: int | None = None) -> Score:
    """The scores of counts (K, K) over that many images; `names` are those of the K classes.

    What is predicted as the class `left_out` counts as wrong, but that class has no score of its own.
    """
    right = counts_KK.diagonal().tolist()
    labeled = counts_KK.sum(dim=1).tolist()
    predicted = counts_KK.sum(dim=0).tolist()
    rows = tuple(
        ClassScore(
            id=k,
            name=names[k] if names else str(k),
            IoU=None if k == left_out else _percent(right[k], labeled[k] + predicted[k] - right[k]),
            Acc=_percent(right[k], labeled[k]),
            pixels=labeled[k],
        )
        for k in range(len(right))
    )
    return Score(
        mIoU=_mean([row.IoU for row in rows]),
        mAcc=_mean([row.Acc for row in rows]),
        aAcc=_percent(sum(right), sum(labeled)),
        classes=rows,
        images=images,
        left_out=left_out,
    )


def _percent(part: int, whole: int) -> float | None:
    return 100.0 * part / whole if whole else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
