"""`open_data`: recognizes the layout of a folder or table, chooses a split, lists its images and masks."""

import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from equalize.data.depth import with_depth
from equalize.data.folders import IMAGE_SUFFIXES, list_unread, walk_files
from equalize.data.hf_datasets import Choice
from equalize.data.images import Cell, Deep, Item
from equalize.data.layouts import Layout, Pairs, find_layout, lists_in, split_of
from equalize.data.naming import canonical_split
from equalize.data.table_columns import find_table
from equalize.errors import DataError
from equalize.messages import counted, first_of

_Entry = TypeVar("_Entry")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """The images of one split, with their masks where the layout has masks.

    Attributes:
        root: the folder, the file or the Hub id, as the user gave it.
        layout: ``images``, ``images+masks``, ``camvid``, ``ade20k``, ``voc``, ``cityscapes`` or ``table``.
        split: the split as the data set spells it; None where it has no splits.
        images: files sorted by relative path, or the cells of a table in its order.
        masks: one for each image, None where it is missing; empty where the layout has none.
        notes: what was left out, and what names do not tell, in words.
    """

    root: Path
    layout: str
    split: str | None
    images: tuple[Item, ...]
    masks: tuple[Item | None, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def place(self) -> Path:
        """`root` without a choice of columns."""
        return Path(Choice.of(self.root).place)

    @property
    def folders(self) -> list[Path]:
        """Where files about the classes may lie: its root, and the folders of its first picture and mask."""
        first = [item for item in (*self.images[:1], *self.masks[:1]) if isinstance(item, Path)]
        return list(dict.fromkeys((self.place, *(path.parent for path in first))))

    @property
    def is_on_hub(self) -> bool:
        """Whether it is a table on the Hub, not at a path."""
        return self.layout == "table" and not self.place.exists()

    @property
    def name(self) -> str:
        """Its name for publication: the last part of its path, or its Hub id."""
        return str(self.root) if self.is_on_hub else os.path.basename(os.path.abspath(self.root))

    @property
    def pairs(self) -> int:
        """How many images have a mask."""
        return len(self.with_masks())

    def with_masks(self) -> list[tuple[Item, Item]]:
        """The images that have a mask, with it; none where the layout has no masks."""
        return [(image, mask) for image, mask in zip(self.images, self.masks, strict=False) if mask is not None]

    def fingerprint(self, *, exact: bool = False) -> str:
        """Sha256 over the relative name and size in bytes of every image and mask, in sorted order.

        Cheap enough to take every time; a file changed without changing its size goes unnoticed, as do other arrays of
        the same names, unless it is `exact`: then the place and the times of change count too. Of a table it is Sha256
        over its own fingerprint, which for parquet and arrow files follows their place and time of change.
        """
        items = [item for item in (*self.images, *self.masks) if item is not None]
        items = [item.item if isinstance(item, Deep) else item for item in items]
        paths = sorted(item for item in items if isinstance(item, Path))
        found = [path.stat() if path.exists() else None for path in paths]  # None: a dangling link
        sizes = (-1 if each is None else each.st_size for each in found)
        facts = [f"{path.relative_to(self.root).as_posix()}\0{size}\n" for path, size in zip(paths, sizes, strict=True)]
        if exact:
            facts += [os.path.realpath(self.root), *(f"\n{each.st_mtime_ns}" for each in found if each is not None)]
        facts += sorted({f"{item.column}\0{item.table._fingerprint}\n" for item in items if isinstance(item, Cell)})
        return hashlib.sha256("".join(facts).encode(errors="surrogateescape")).hexdigest()

    def describe(self) -> str:
        """One line for people: what was matched, which split, how many images and pairs."""
        cells = (item.item if isinstance(item, Deep) else item for item in (*self.images, *self.masks))
        columns = list(dict.fromkeys(item.column for item in cells if isinstance(item, Cell)))
        facts = [f"{self.layout} layout"]
        if columns:
            facts.append(f"column{'s' * (len(columns) > 1)} {' and '.join(columns)}")
        facts += [f"split {self.split}" if self.split else "no splits", counted(len(self.images), "image")]
        if self.masks:
            facts.append(counted(self.pairs, "pair"))
        if self.pairs and self.layout in ("images+masks", "camvid"):
            image, mask = (_under(self.root, each) for each in self.with_masks()[0])
            facts.append(f"such as {image} with {mask}")
        return "; ".join([f"{self.root}: {', '.join(facts)}", *self.notes])


def open_data(path: str | Path, *, split: str | None = None, labels: bool = False) -> DataSet:
    """Look at a folder or a table, recognize its layout and list one split of it.

    Args:
        path: a folder, a .parquet or .arrow file, or a Hub id where no such folder exists; see `Choice`.
        split: the split to take; synonyms (``val``, ``validation``) are understood. By default the training split
            where no labels are asked for (calibration), else the validation split, else the test split.
        labels: whether every image must have a mask.

    A DataError if the place is missing, empty, unreadable or without images, or a split or masks are; a ResourceError
    if the Hub cannot be reached, or the library `datasets` is not installed and needed.
    """
    path = os.path.expanduser(path)  # of the text: ./org/name is no Hub id
    root, layout = Path(path), _find(Choice.of(path), labels)
    chosen = _choose_split(root, layout, split, labels)
    pairs = layout.readers[chosen]()
    if not pairs:
        raise _no_images(root, layout, chosen)
    listed = [layout.matched.pairs] if layout.matched.pairs else [of_split() for of_split in layout.readers.values()]
    every = [image for each in listed for image, _ in each]  # of all splits
    unread = list_unread(root) if layout.name != "table" else []
    if layout.matched.all_masks and unread:
        what = "is of a kind that is not read, and all other files lie in folders named as those of masks are"
        raise DataError(unread[0], what, expected=f"files named {' '.join(IMAGE_SUFFIXES)}")
    images, notes = with_depth([image for image, _ in pairs], every)
    dataset = DataSet(
        root=root,
        layout=layout.name,
        split=chosen,
        images=images,
        masks=tuple(mask for _, mask in pairs) if layout.has_masks and not layout.matched.conflict else (),
        notes=(*_notes(root, layout, chosen, pairs, unread), *notes),
    )
    if labels:
        if layout.matched.conflict:
            raise layout.matched.conflict
        require_masks(dataset)
    return dataset


def sample(items: Sequence[_Entry], count: int | None, seed: int) -> list[_Entry]:
    """A random subset of `count` items, the same for the same seed, in their order; all for None or if no more."""
    number = len(items)
    chosen = random.Random(seed).sample(range(number), number if count is None else min(count, number))
    return [items[index] for index in sorted(chosen)]


def require_masks(dataset: DataSet) -> None:
    """Refuse a data set in which an image has no mask, by a DataError with the first and their number."""
    if not dataset.masks:
        remedy = "put the images into images/ and the masks, under the same names, into masks/"
        raise DataError(dataset.root, "holds images without masks", remedy=remedy)
    missing = [image for image, mask in zip(dataset.images, dataset.masks, strict=True) if mask is None]
    if missing:
        what = f"has no mask; {len(missing)} of {len(dataset.images)} images of {dataset.root} have none"
        what += "".join(f"; {note}" for note in dataset.notes if "without an image" in note)
        raise DataError(missing[0], what, remedy="add the masks under the same names, or remove these images")


def _find(choice: Choice, labels: bool) -> Layout:
    root = Path(choice.place)
    layout = find_layout(root) if os.path.isdir(root) else None
    if layout is None or layout.name == "images":
        layout = find_table(choice, labels=labels) or layout
    wanted = "a folder of images, images/ + masks/, the root of ADE20K, Pascal VOC or Cityscapes, or parquet files"
    if layout is None:
        try:
            root.stat()
            what = "is a file, not a folder"
        except FileNotFoundError:
            what = "no such folder"
        except OSError as error:
            what = f"cannot be read ({error.strerror})"
        raise DataError(root, what, expected=wanted)
    if layout.name != "table" and choice != Choice(place=choice.place):
        what = f"has no columns to choose from ({layout.name} layout)"
        raise DataError(root, what, remedy="name the folder alone")
    return layout


def _notes(root: Path, layout: Layout, split: str | None, pairs: Pairs, unread: Sequence[Path]) -> Iterator[str]:
    """What a user may not expect, in words: whatever pairs with nothing, or lies in no split."""
    found = layout.matched
    if found.conflict:
        yield f"masks passed over: {_under(root, Path(str(found.conflict.where)))} {found.conflict.what}"
    for files, what in ((found.aside, "beside other pictures"), (unread, "of kinds that are not read")):
        if files:
            names = first_of([_under(root, each) for each in files])
            yield f"{counted(len(files), 'file')} {what} passed over ({names})"
    alone = [_under(root, mask) for mask in found.alone if split is None or split_of(root, mask) in (None, split)]
    bare = [image.name for image, mask in pairs if mask is None]
    if alone:
        yield f"{counted(len(alone), 'mask')} without an image ({first_of(alone)})"
    if 0 < len(bare) < len(pairs):
        yield f"{counted(len(bare), 'image')} without a mask ({first_of(bare)})"
    formats: dict[str, str] = {}
    images = [image for image, _ in pairs if isinstance(image, Path)]
    twice = [each for each in images if formats.setdefault(each.stem, suffix := each.suffix.lower()) != suffix]
    if twice:
        names = first_of([_under(root, each) for each in twice])
        yield f"{counted(len(twice), 'image')} named as others of another format, all are taken ({names})"
    if split is not None:
        left = [_under(root, image) for image, _ in found.pairs if split_of(root, image) is None]
        if 0 < len(left) < len(found.pairs):  # else lists make the splits
            yield f"{counted(len(left), 'image')} in no split passed over ({first_of(left)})"
    if split is None and found.has_masks and (lists := lists_in(root)):
        names = first_of([path.name for path in lists])
        yield f"{names} make{'s' * (len(lists) == 1)} no split without a list train.txt of these images"
    if layout.lists:
        taken, *others = [_under(root, each[0].parent) for each in layout.lists]
        if others:
            yield f"lists in {first_of(others)} passed over, those in {taken} make the splits"
    if found.all_masks:
        yield "all lie in folders named as those of masks are"


def _under(root: Path, item: Item) -> str:
    item = item.item if isinstance(item, Deep) else item
    return item.relative_to(root).as_posix() if isinstance(item, Path) else item.name


def _choose_split(root: Path, layout: Layout, wanted: str | None, labels: bool) -> str | None:
    splits = [split for split in layout.readers if split is not None]
    preferred = ("val", "test", "train") if labels else ("train", "trainval", "val", "test")
    if wanted in splits:
        return wanted
    names = [canonical_split(name) for name in ((wanted,) if wanted else preferred)]
    found = [split for name in names for split in splits if canonical_split(split) == name]
    if found and labels and wanted is None:  # a test split often comes without masks
        return next((split for split in found if any(mask for _, mask in layout.readers[split]())), found[0])
    if found:
        return found[0]
    if wanted is None:
        return splits[0] if splits else None
    expected, remedy = (f"one of {', '.join(splits)}", None) if splits else (None, "leave --split away")
    raise DataError(root, f"has no split {wanted!r} ({layout.name} layout)", expected=expected, remedy=remedy)


def _no_images(root: Path, layout: Layout, split: str | None) -> DataError:
    place = f"split {split} of the {layout.name} layout" if split else f"{layout.name} layout"
    if layout.name == "table":
        return DataError(root, f"has no rows ({place})")
    what = f"no images found in {counted(sum(1 for _ in walk_files(root)), 'file')} ({place})"
    return DataError(root, what, expected=f"files named {' '.join(IMAGE_SUFFIXES)}")
