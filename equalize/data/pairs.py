"""Pairs of pictures and labels as tensors, for training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from equalize.data.augment import Augment, draw_seed, pad
from equalize.data.bands import Picture, picture_size, read_picture
from equalize.data.images import Item
from equalize.data.loader import Preprocessor
from equalize.data.masks import LabelRule, check_labels, demand_same_size, read_mask
from equalize.errors import EqualizeError

Pair = tuple[Tensor, Tensor]
"""(C, H, W) float32 and (H, W) int64."""


def read_pair(image: Item, mask: Item, rule: LabelRule, num_classes: int, channels: int) -> tuple[Picture, Tensor]:
    """A picture and its labels (H, W), which are checked: of the classes, and of the picture's size."""
    labels_HW = read_mask(mask, rule, image)
    check_labels(labels_HW, num_classes, rule, mask)
    picture = read_picture(image, channels)
    demand_same_size(labels_HW, mask, picture_size(picture), image)
    return picture, labels_HW


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPairs(Dataset[Pair | EqualizeError]):
    """Pairs, augmented: item `epoch * len + index` is pair `index` as that epoch sees it, padded to `padded` (H, W).

    Our errors are returned as values: torch would carry only their message from a worker.
    """

    pairs: Sequence[tuple[Item, Item]]
    rule: LabelRule
    num_classes: int
    augment: Augment
    preprocess: Preprocessor
    seed: int
    padded: tuple[int, int]
    channels: int = 3

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, item: int) -> Pair | EqualizeError:
        try:
            return self._read(*divmod(item, len(self)))
        except EqualizeError as error:
            return error

    def _read(self, epoch: int, index: int) -> Pair:
        picture, labels_HW = read_pair(*self.pairs[index], self.rule, self.num_classes, self.channels)
        picture, labels_HW = self.augment(picture, labels_HW, draw_seed(self.seed, epoch, index))
        image_CHW = self.preprocess(picture, picture_size(picture))
        return pad(image_CHW, labels_HW, self.padded, self.rule.ignore_index)


@dataclass(slots=True)
class EpochOrder(Sampler[int]):
    """Every pair once an epoch, in an order that depends on the seed and the epoch alone."""

    length: int
    seed: int
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch whose order the next iteration has."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(draw_seed(self.seed, self.epoch, -1))
        order = torch.randperm(self.length, generator=generator).tolist()
        yield from (self.epoch * self.length + index for index in order)


def collate(pairs: Sequence[Pair | EqualizeError]) -> dict[str, Any]:
    """A batch: "pixel_values" (N, C, H, W) and "labels" (N, H, W); or "failure", the first error among `pairs`."""
    good = [pair for pair in pairs if not isinstance(pair, EqualizeError)]
    if len(good) < len(pairs):
        return {"failure": next(pair for pair in pairs if isinstance(pair, EqualizeError))}
    images, labels = zip(*good, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}
