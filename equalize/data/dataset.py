"""A folder as a data set: which layout it has, which split was chosen, which images belong to it."""

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError, InputError
from .folders import IMAGE_SUFFIXES, walk_files
from .layouts import SPLIT_SYNONYMS, Layout, find_layout


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """The images of one split, with their masks where the layout has masks.

    Attributes:
        root: the folder as the user gave it.
        layout: ``images``, ``images+masks``, ``ade20k``, ``voc`` or ``cityscapes``.
        split: the split as the folder spells it; None where the folder has no splits.
        images: sorted by relative path.
        masks: one for each image, None where it is missing; empty where the layout has none.
    """

    root: Path
    layout: str
    split: str | None
    images: tuple[Path, ...]
    masks: tuple[Path | None, ...] = ()

    @property
    def pairs(self) -> int:
        """How many images have a mask."""
        return sum(mask is not None for mask in self.masks)

    def fingerprint(self) -> str:
        """Sha256 over the relative name and size in bytes of every image and mask, in sorted order.

        Cheap enough to take every time; a file changed without changing its size goes unnoticed.
        """
        digest = hashlib.sha256()
        for path in sorted([*self.images, *(mask for mask in self.masks if mask)]):
            digest.update(f"{path.relative_to(self.root).as_posix()}\0{_size(path)}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def describe(self) -> str:
        """One line for people: what was matched, which split, how many images and pairs."""
        split = f"split {self.split}" if self.split else "no splits"
        facts = [f"{self.layout} layout", split, _counted(len(self.images), "image")]
        if self.masks:
            facts.append(_counted(self.pairs, "pair"))
        return f"{self.root}: {', '.join(facts)}"


def open_data(path: str | Path, *, split: str | None = None, labels: bool = False) -> DataSet:
    """Look at a folder, recognise its layout and list one split of it.

    Args:
        path: a folder.
        split: the split to take; synonyms (``val``, ``validation``) are understood. By default the training split
            where no labels are asked for (calibration), else the validation split, else the test split.
        labels: whether every image must have a mask.

    Raises:
        DataError: the folder is missing, empty, unreadable or without images; there is no such split; with
            `labels`, masks are missing.
    """
    root = Path(path)
    _check_folder(root)
    layout = find_layout(root)
    chosen = _choose_split(root, layout, split, labels)
    pairs = layout.read(chosen)
    if not pairs:
        raise _no_images(root, layout, chosen)
    dataset = DataSet(
        root=root,
        layout=layout.name,
        split=chosen,
        images=tuple(image for image, _ in pairs),
        masks=tuple(mask for _, mask in pairs) if layout.has_masks else (),
    )
    if labels:
        require_masks(dataset)
    return dataset


def sample(dataset: DataSet, count: int | None, seed: int) -> tuple[Path, ...]:
    """A random subset of `count` images, the same for the same seed, in sorted order; all of them for None.

    Raises:
        InputError: `count` is not positive.
    """
    if count is not None and count < 1:
        raise InputError("samples", "no image would be read", got=count, expected="at least 1")
    if count is None or count >= len(dataset.images):
        return dataset.images
    chosen = random.Random(seed).sample(range(len(dataset.images)), count)
    return tuple(dataset.images[index] for index in sorted(chosen))


def require_masks(dataset: DataSet) -> None:
    """Refuse a data set in which an image has no mask.

    Raises:
        DataError: names the first such image and counts them.
    """
    if not dataset.masks:
        raise DataError(
            dataset.root,
            "is a folder of images without masks",
            remedy="put the images into images/ and the masks, under the same names, into masks/",
        )
    missing = [image for image, mask in zip(dataset.images, dataset.masks, strict=True) if mask is None]
    if missing:
        raise DataError(
            missing[0],
            f"has no mask; {len(missing)} of {len(dataset.images)} images of {dataset.root} have none",
            remedy="add the masks under the same names, or remove these images",
        )


def _check_folder(root: Path) -> None:
    wanted = "a folder of images, images/ + masks/, or the root of ADE20K, Pascal VOC or Cityscapes"
    try:
        if not root.is_dir():
            what = "is a file, not a folder" if root.exists() else "no such folder"
            raise DataError(root, what, expected=wanted)
    except PermissionError as error:
        raise DataError(root, "cannot be read (Permission denied)", expected=wanted) from error
    if next(walk_files(root), None) is None:
        raise DataError(root, "is empty", expected=wanted)


def _choose_split(root: Path, layout: Layout, wanted: str | None, labels: bool) -> str | None:
    if wanted is None:
        preferred = ("val", "test", "train") if labels else ("train", "trainval", "val", "test")
        found = (_match(name, layout.splits) for name in preferred)
        return next((name for name in found if name), layout.splits[0] if layout.splits else None)
    if name := _match(wanted, layout.splits):
        return name
    there = ", ".join(layout.splits)
    raise DataError(
        root,
        f"has no split {wanted!r} ({layout.name} layout)",
        expected=f"one of {there}" if there else None,
        remedy=None if there else "it has no splits: leave --split away",
    )


def _match(wanted: str, splits: Iterable[str]) -> str | None:
    """The split called `wanted` or, failing that, by a synonym of it."""
    synonyms = next((names for names in SPLIT_SYNONYMS if wanted in names), ())
    return next((name for name in (wanted, *synonyms) if name in splits), None)


def _no_images(root: Path, layout: Layout, split: str | None) -> DataError:
    place = f"split {split} of the {layout.name} layout" if split else f"{layout.name} layout"
    return DataError(
        root,
        f"no images found in {_counted(sum(1 for _ in walk_files(root)), 'file')} ({place})",
        expected=f"files named {' '.join(IMAGE_SUFFIXES)}",
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1  # a link to nothing: it counts by its name, and reading it says what is wrong


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
