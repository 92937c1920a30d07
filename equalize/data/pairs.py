"""Pairs of pictures and labels as tensors, for training."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from equalize.data.augment import Augment, draw_seed, pad
from equalize.data.dataset import DataSet
from equalize.data.images import read_image
from equalize.data.loader import Preprocessor
from equalize.data.masks import LabelRule, check_labels, read_mask
from equalize.errors import EqualizeError

Pair = tuple[Tensor, Tensor]
"""(3, H, W) float32 and (H, W) int64."""


class TrainingPairs(Dataset[Pair | EqualizeError]):
    """The pairs of a split, augmented: item `epoch * len + index` is pair `index` as that epoch sees it.

    Errors of ours come back as values: torch cannot carry them from a worker, having only their message.
    """

    def __init__(
        self,
        dataset: DataSet,
        rule: LabelRule,
        num_classes: int,
        augment: Augment,
        preprocess: Preprocessor,
        *,
        seed: int,
    ) -> None:
        self._pairs = dataset.with_masks()
        self._rule = rule
        self._num_classes = num_classes
        self._augment = augment
        self._preprocess = preprocess
        self._seed = seed

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, item: int) -> Pair | EqualizeError:
        try:
            return self._read(*divmod(item, len(self)))
        except EqualizeError as error:
            return error

    def _read(self, epoch: int, index: int) -> Pair:
        image_path, mask_path = self._pairs[index]
        labels_HW = read_mask(mask_path, self._rule)
        check_labels(labels_HW, self._num_classes, self._rule, mask_path)
        picture: Image.Image = read_image(image_path)
        picture, labels_HW = self._augment(picture, labels_HW, draw_seed(self._seed, epoch, index))
        image_CHW = self._preprocess(picture, (picture.height, picture.width))
        return pad(image_CHW, labels_HW, self._augment.crop, self._rule.ignore_index)


class EpochOrder(Sampler[int]):
    """Every pair once an epoch, in an order that depends on the seed and the epoch alone."""

    def __init__(self, length: int, seed: int) -> None:
        self._length = length
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Whose order the next iteration gives."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(draw_seed(self._seed, self._epoch, -1))
        order = torch.randperm(self._length, generator=generator).tolist()
        yield from (self._epoch * self._length + index for index in order)


def collate(pairs: Sequence[Pair | EqualizeError]) -> dict[str, Any]:
    """A batch: "pixel_values" (N, 3, H, W) and "labels" (N, H, W); or "failure", the first error among `pairs`."""
    good: list[Pair] = []
    for pair in pairs:
        if isinstance(pair, EqualizeError):
            return {"failure": pair}
        good.append(pair)
    images, labels = zip(*good, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}
