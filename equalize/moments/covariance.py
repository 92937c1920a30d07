"""First and second moments of a fusion layer's input channels, and their cross moments with the labels.

Rows are sampled positions (see `sampling.py`). They are taken up in the order of the images, in runs whose length
depends on nothing else: about the run's mean in float32, then merged in float64 (Chan, Golub & LeVeque 1979), so that
any number of processes come to the same bits on a CPU.

Shapes: R rows, C input channels, K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import torch
from torch import Tensor

from equalize.moments.sampling import Samples, labels_at

CLASSES = 256
"""Labels are 0 .. CLASSES - 1; other values mark pixels that do not count."""

_MOST_CHANNELS = 4096  # a covariance of 128 MiB

_RUN = 1024  # rows that are multiplied at once, at least


@dataclass(frozen=True, slots=True, kw_only=True)
class InputStatistics:
    """Population statistics of the channels that enter a fusion layer, over sampled positions of all images.

    Where there are labels, over the labeled positions alone: no others have a gradient.

    Attributes:
        positions: how many were seen.
        mean_C, covariance_CC: float64, centered per channel.
        cross_CK: covariance with the one-hot labels of the classes seen; K is 0 without labels.
        label_variance: E|Y - mean Y|^2 of the one-hot labels Y; 0 without labels.
    """

    positions: int
    mean_C: Tensor
    covariance_CC: Tensor
    cross_CK: Tensor
    label_variance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitStatistics:
    """The same of all images, and of those with an even and with an odd index; a half may have no position."""

    whole: InputStatistics
    halves: tuple[InputStatistics, InputStatistics]


class Rows(NamedTuple):
    """Sampled rows of a batch: values (R, C) on any device; labels (R,) and the images' indices (R,) on the CPU."""

    values_RC: Tensor
    labels_R: Tensor | None
    image_R: Tensor


def rows_of(samples: Sequence[Samples], labels_NHW: Tensor | None, first: int, fractions_NP: Tensor) -> Rows | None:
    """The rows of a batch, from samples of runs of its channels; None if these are not one row to an image.

    `first` is the index of the batch's first image; labels are looked up at the same positions.
    """
    if not samples or any(len(each.values_NPC) != len(fractions_NP) for each in samples):
        return None
    values_NPC, grid = torch.cat([each.values_NPC for each in samples], dim=2), samples[0].grid
    images, positions, channels = values_NPC.shape
    image_R = (first + torch.arange(images)).repeat_interleave(positions)
    values_RC = values_NPC.reshape(-1, channels)
    if labels_NHW is None or len(grid) != labels_NHW.ndim - 1:
        return Rows(values_RC, None, image_R)
    labels_R = labels_at(labels_NHW, grid, fractions_NP).flatten().long()
    counts_R = (labels_R >= 0) & (labels_R < CLASSES)
    return Rows(values_RC[counts_R.to(values_RC.device)], labels_R[counts_R], image_R[counts_R])


@dataclass(slots=True)
class _Sums:
    """Sums of squares and products about the mean, by Chan's formula.

    Attributes:
        moments_CC: sum of d d' over the rows, d from the mean. counts_K, moments_KC: of each class, and of d y'.
        pending: rows that wait for a run to be full.
    """

    count: int
    mean_C: Tensor
    moments_CC: Tensor
    counts_K: Tensor
    moments_KC: Tensor
    pending: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)

    @classmethod
    def empty(cls, channels: int, device: torch.device) -> Self:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        square, cross = zeros(channels, channels), zeros(CLASSES, channels)
        return cls(0, zeros(channels), square, zeros(CLASSES), cross)

    def add(self, rows: Rows) -> None:
        self.pending.append((rows.values_RC, rows.labels_R))
        if sum(len(values_RC) for values_RC, _ in self.pending) >= max(_RUN, len(self.mean_C) // 2):
            self.flush()

    def flush(self) -> None:
        device = self.mean_C.device
        x_RC = torch.cat([values_RC for values_RC, _ in self.pending] or [self.mean_C.new_zeros(0, len(self.mean_C))])
        labels = [labels_R for _, labels_R in self.pending if labels_R is not None]
        self.pending = []
        if not len(x_RC):
            return
        d_RC = x_RC.to(device)
        origin_C = d_RC.mean(0)
        d_RC = d_RC - origin_C
        number, rest_C = len(d_RC), d_RC.sum(0, dtype=torch.float64)  # the mean that float32 left
        away_C = origin_C + rest_C / number - self.mean_C
        weight = self.count * number / (self.count + number)
        with torch.autocast(device.type, enabled=False):  # the network's precision is not that of its statistics
            self.moments_CC.add_(d_RC.T @ d_RC).addr_(rest_C, rest_C, alpha=-1 / number)
        self.moments_CC.addr_(away_C, away_C, alpha=weight)
        if labels:
            labels_R = torch.cat(labels).to(device)
            new_K = torch.bincount(labels_R, minlength=CLASSES).double()
            drift_K = new_K / number - (self.counts_K / self.count if self.count else 0.0)
            sums_KC = torch.zeros_like(self.moments_KC).index_add_(0, labels_R, d_RC.double())
            self.moments_KC.add_(sums_KC).addr_(new_K, rest_C, alpha=-1 / number).addr_(drift_K, away_C, alpha=weight)
            self.counts_K += new_K
        self.mean_C += away_C * (number / (self.count + number))
        self.count += number

    def merge(self, other: Self) -> Self:
        """All rows of both, in sums of their own."""
        if not self.count or not other.count:
            return other if other.count else self
        count = self.count + other.count
        weight = self.count * other.count / count
        away_C = other.mean_C - self.mean_C
        drift_K = other.counts_K / other.count - self.counts_K / self.count
        return type(self)(
            count,
            self.mean_C + away_C * (other.count / count),
            (self.moments_CC + other.moments_CC).addr_(away_C, away_C, alpha=weight),
            self.counts_K + other.counts_K,
            (self.moments_KC + other.moments_KC).addr_(drift_K, away_C, alpha=weight),
        )

    def result(self) -> InputStatistics:
        seen_K = self.counts_K > 0
        share_K = self.counts_K[seen_K] / max(self.count, 1)
        return InputStatistics(
            positions=self.count,
            mean_C=self.mean_C,
            covariance_CC=self.moments_CC / max(self.count, 1),
            cross_CK=self.moments_KC[seen_K].T / max(self.count, 1),
            label_variance=float(1 - share_K.square().sum()) if len(share_K) else 0.0,
        )


class Collector:
    """Statistics by layer, while a pass goes on.

    A layer is given up once its rows are not one to an image; one of very many channels is not taken up.
    """

    def __init__(self, channels: Mapping[str, int], device: torch.device) -> None:
        """`channels`: of the input of each layer. `device`: where to compute."""
        device = torch.device("cpu") if device.type == "mps" else device  # no float64 on Metal
        self._halves = {
            layer: [_Sums.empty(number, device) for _ in range(2)]
            for layer, number in channels.items()
            if number <= _MOST_CHANNELS
        }

    def add(self, batch: Mapping[str, Rows | None]) -> None:
        """Takes up a batch, by layer; in the order of the images."""
        for layer, rows in batch.items():
            if rows is None:
                self._halves.pop(layer, None)
            elif layer in self._halves:
                for parity, sums in enumerate(self._halves[layer]):
                    is_of_R = rows.image_R % 2 == parity
                    labels_R = None if rows.labels_R is None else rows.labels_R[is_of_R]
                    sums.add(Rows(rows.values_RC[is_of_R], labels_R, rows.image_R[is_of_R]))

    def results(self) -> dict[str, SplitStatistics]:
        """By layer; of those with a position."""
        found: dict[str, SplitStatistics] = {}
        for layer, (even, odd) in self._halves.items():
            even.flush()
            odd.flush()
            if even.count + odd.count:
                halves = even.result(), odd.result()
                found[layer] = SplitStatistics(whole=even.merge(odd).result(), halves=halves)
        return found
