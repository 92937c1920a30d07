"""Outputs of a frozen backbone, computed once for every image and its mirror image, and memory-mapped afterwards.

CACHE/KEY/facts.json      what KEY is a digest of: the backbone, the images, their size, the labels' rule
CACHE/KEY/NNNNN/          64 images from number NNNNN * 64 on; whole or absent, so that several runs may fill one cache
    features.npy          (rows, F) float32: what the network reads of the outputs, flattened; mirror images come second
    labels.npy, sizes.npy labels of all images one after another; their heights and widths

N images, F numbers an image.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from equalize.checkpoint.files.atomic import atomic_directory
from equalize.checkpoint.outputs import pad_images
from equalize.commands.evaluate import Inputs
from equalize.commands.finetune.loss import backbone_of
from equalize.commands.finetune.run_directory import write_whole
from equalize.commands.finetune.splits import Task, training_pairs
from equalize.commands.finetune.stored_backbone import StoredBackbone
from equalize.commands.images import working_size
from equalize.commands.labels import LabeledSplit
from equalize.data.augment import Augment, draw_seed
from equalize.data.images import Item
from equalize.data.loader import Batch
from equalize.data.pairs import read_pair
from equalize.distributed import my_share, wait
from equalize.errors import DataError, EqualizeError, InputError
from equalize.eval_mode import eval_mode
from equalize.messages import Notify, Progress, ignore, ignore_progress

_PART = 64  # images
_FLAG = "--cache-backbone"

Read = Callable[[int], tuple[Tensor, Tensor]]
"""Number of a pair -> image (C, H, W) and labels (h, w)."""


def digest(model: nn.Module) -> str:
    """Sha256 over every tensor and its key."""
    total = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        total.update(key.encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedSplit:
    """Stored outputs of the backbone and labels for the pairs of a split."""

    features: tuple[NDArray[np.float32], ...]
    """(rows, F), a memory map for each part."""
    labels: tuple[NDArray[Any], ...]
    sizes: tuple[NDArray[np.int64], ...]
    """(images, 2), for each part."""

    def __len__(self) -> int:
        return sum(map(len, self.sizes))

    def rows(self, numbers: Sequence[int], mirrored: Sequence[bool]) -> Tensor:
        """(N, F)."""
        places = [(*divmod(number, _PART), flip) for number, flip in zip(numbers, mirrored, strict=True)]
        rows = [self.features[part][place + flip * len(self.sizes[part])] for part, place, flip in places]
        return torch.from_numpy(np.stack(rows))

    def label(self, number: int) -> Tensor:
        """(H, W) int64."""
        part, place = divmod(number, _PART)
        ends = self.sizes[part].prod(axis=1).cumsum()
        start = int(ends[place - 1]) if place else 0
        return torch.from_numpy(self.labels[part][start : ends[place]].astype(np.int64)).view(*self.sizes[part][place])


class BackboneCache:
    """The cache of one training, in a directory that other trainings may share."""

    def __init__(self, task: Task, directory: Path, notify: Notify, progress: Progress) -> None:
        config = task.config
        if config.size is None and task.checkpoint.preprocess.size is None:
            raise InputError(_FLAG, "needs one size for all images", remedy="give --size")
        self._task = replace(task, config=replace(config, size=working_size(task.checkpoint, config.size)))
        self._directory = directory
        self._notify = notify
        self._progress = progress
        self._pairs = training_pairs(self._task)
        image_CHW, _ = self._read_training(0)
        path = backbone_of(task.checkpoint)
        assert path is not None  # `freeze` has refused it
        images_2CHW = torch.stack([image_CHW, image_CHW.flip(-1)]).to(task.device)
        self._blank = torch.zeros(1, len(image_CHW), 1, 1)  # images whose features are stored have only their shape
        self.backbone = StoredBackbone.of(task.checkpoint, path, images_2CHW)

    def training(self) -> "CachedPairs":
        """The training split; features of the mirror images, too, if any is to be flipped."""
        augment, train = self._pairs.augment, self._task.train
        split = self._open(train, self._read_training, len(self._pairs), kind="train", mirrored=augment.flip > 0)
        return CachedPairs(split=split, augment=augment, seed=self._pairs.seed, blank=self._blank)

    def inputs(self, labeled: LabeledSplit) -> Inputs:
        """What `count_images` scores; while a batch is handed out, the backbone returns its stored outputs."""
        pairs, size, checkpoint = labeled.dataset.with_masks(), self._task.config.size, self._task.checkpoint

        def read(number: int) -> tuple[Tensor, Tensor]:
            channels = checkpoint.preprocess.bands
            picture, labels_HW = read_pair(*pairs[number], labeled.rule, labeled.num_classes, channels)
            return pad_images(checkpoint.preprocess(picture, size), checkpoint.multiple), labels_HW

        split = self._open(labeled, read, len(pairs), kind="scored", mirrored=False)
        numbers = {image: number for number, (image, _) in enumerate(pairs)}
        return Inputs(
            batches=self._batches(split, my_share(labeled.dataset.images), numbers),
            label=lambda image: split.label(numbers[image]),
        )

    def _batches(self, split: CachedSplit, images: Sequence[Item], numbers: dict[Item, int]) -> Iterator[Batch]:
        many = self._task.config.batch_size
        for chunk in (images[start : start + many] for start in range(0, len(images), many)):
            features_NF = split.rows([numbers[image] for image in chunk], [False] * len(chunk))
            with self.backbone.returning(features_NF.to(self._task.device)):
                images_NCHW = self._blank.expand(len(chunk), -1, *(self._task.config.size or ()))
                yield Batch(images=images_NCHW, paths=tuple(chunk))

    def _read_training(self, number: int) -> tuple[Tensor, Tensor]:
        plain = replace(self._pairs, augment=replace(self._pairs.augment, flip=0.0))
        pair = plain[number]
        if isinstance(pair, EqualizeError):
            raise pair
        return pair

    def _open(self, labeled: LabeledSplit, read: Read, count: int, *, kind: str, mirrored: bool) -> CachedSplit:
        preprocess = replace(self._task.checkpoint.preprocess, origin="")
        facts = {
            "backbone": digest(self.backbone.module),
            "structure": repr(self.backbone.module),
            "read": [list(self.backbone.read), self.backbone.shapes],
            "data": labeled.dataset.fingerprint(exact=True),
            "labels": [kind, repr(labeled.rule), labeled.num_classes],
            "images": [repr(preprocess), self._task.config.size, self._task.checkpoint.multiple, mirrored],
        }
        text = json.dumps(facts, indent=2)
        folder = self._directory / hashlib.sha256(text.encode()).hexdigest()[:16]
        starts = range(0, count, _PART)
        parts = {folder / f"{start // _PART:05}": range(start, min(start + _PART, count)) for start in starts}
        missing = [part for part in parts if not part.is_dir()]
        if missing:
            self._notify(f"computing what the backbone gives for {count} images ({kind}), once, in {folder}")
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "facts.json", text)
        random.SystemRandom().shuffle(missing)  # processes that fill it together seldom meet
        done = 0
        with eval_mode(self._task.checkpoint.model):
            for part in missing:
                if not part.is_dir():
                    self._fill(part, parts[part], read, labeled, mirrored=mirrored)
                done += len(parts[part])
                self._progress(done, sum(len(parts[each]) for each in missing))
        wait()
        loaded = [_load(part, len(numbers) * (1 + mirrored)) for part, numbers in parts.items()]
        features, labels, sizes = zip(*loaded, strict=True)
        return CachedSplit(features=features, labels=labels, sizes=sizes)

    def _fill(self, part: Path, numbers: range, read: Read, labeled: LabeledSplit, *, mirrored: bool) -> None:
        many, device, model = self._task.config.batch_size, self._task.device, self._task.checkpoint.model
        rule = labeled.rule
        dtype = np.result_type(np.min_scalar_type(rule.ignore_index), np.min_scalar_type(labeled.num_classes))
        features: list[list[Tensor]] = [[], []]
        labels: list[NDArray[Any]] = []
        for start in range(0, len(numbers), many):
            images, labels_HW = zip(*(read(number) for number in numbers[start : start + many]), strict=True)
            labels += [each.numpy().astype(dtype) for each in labels_HW]
            images_NCHW = torch.stack(images).to(device)
            for flip in range(1 + mirrored):
                features[flip].append(self.backbone.run(model, images_NCHW.flip(-1) if flip else images_NCHW))
        with atomic_directory(part, overwrite=True) as new:
            np.save(new / "features.npy", torch.cat([*features[0], *features[1]]).numpy())
            np.save(new / "labels.npy", np.concatenate([each.ravel() for each in labels]))
            np.save(new / "sizes.npy", np.array([each.shape for each in labels]))


def _load(part: Path, rows: int) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[np.int64]]:
    try:
        features, labels = (np.load(part / f"{name}.npy", mmap_mode="r") for name in ("features", "labels"))
        sizes = np.load(part / "sizes.npy")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(part, f"cannot be read ({error})", remedy="remove it: it is computed again") from error
    if len(features) != rows or len(labels) != sizes.prod(axis=1).sum():
        raise DataError(part, "is not whole", remedy="remove it: it is computed again")
    return features, labels, sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedPairs(Dataset[dict[str, Tensor]]):
    """Like `TrainingPairs`, a batch at a time: item `epoch * len + index` is pair `index` as that epoch flips it."""

    split: CachedSplit
    augment: Augment
    seed: int
    blank: Tensor
    """(1, C, 1, 1), in place of images."""

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, items: Sequence[int]) -> dict[str, Tensor]:
        places = [divmod(item, len(self)) for item in items]
        flips = [self.augment.flips(draw_seed(self.seed, epoch, index)) for epoch, index in places]
        labels = [self.split.label(index) for _, index in places]
        return {
            # not `expand`: what is pinned for CUDA must own its memory
            "pixel_values": self.blank.new_zeros(len(items), self.blank.shape[1], *labels[0].shape),
            "labels": torch.stack([each.flip(-1) if flip else each for each, flip in zip(labels, flips, strict=True)]),
            "features": self.split.rows([index for _, index in places], flips),
        }


def open_cache(
    task: Task, beside: Path, notify: Notify = ignore, progress: Progress = ignore_progress
) -> BackboneCache | None:
    """The cache that the configuration asks for, in `cache_dir`, else in features/ beside the training's state."""
    if not task.config.cache_backbone:
        return None
    notify("the frozen backbone runs once an image: whole images, and no augmentation but the flip")
    place = task.config.cache_dir
    return BackboneCache(task, Path(place).expanduser() if place else beside / "features", notify, progress)
