"""How well-known data sets lay out images, masks and splits on disk.

Each finder returns a `Layout`, or None if the folder does not have it. They are tried from the most specific to
the least; the last, a plain folder of images, fits everything.

    cityscapes      leftImg8bit/SPLIT/CITY/*_leftImg8bit.png, gtFine/SPLIT/CITY/*_gtFine_label[Train]Ids.png
    voc             JPEGImages/, SegmentationClass/, ImageSets/Segmentation/SPLIT.txt
    ade20k          images/{training,validation}/, annotations/{training,validation}/
    images+masks    images/[SPLIT/], masks/[SPLIT/]
    camvid          SPLIT/, SPLITannot/ (or _labels, _masks, ... in place of annot)
    images          [SPLIT/] with images at any depth, but for folders that hold masks by their names
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from equalize.data.folders import list_folders, list_images, read_text
from equalize.data.images import Item
from equalize.errors import DataError

SPLIT_SYNONYMS = (
    ("train", "training"),
    ("val", "valid", "validation", "dev"),
    ("test", "testing"),
    ("trainval",),
)
"""Names that data sets give to the same split."""

_SPLIT_NAMES = frozenset(name for names in SPLIT_SYNONYMS for name in names)
_MASK_FOLDERS = ("masks", "annotations", "labels")
_HOLDS_MASKS = r"(?i:annot|annotations?|masks?|labels?)$"
"""Endings of names of mask folders: a plain folder's images do not include theirs."""

Pairs = Sequence[tuple[Item, Item | None]]
"""Images, each with its mask or None."""

Readers = Mapping[str | None, Callable[[], Pairs]]
"""What lists the pairs of each split; of everything, for None, where there are no splits."""

_Files = list[tuple[Path, Path | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A layout that fits a folder or a table.

    Attributes:
        name: one of the names above, or `table`.
        has_masks: whether it has a place for masks.
        readers: its splits.
    """

    name: str
    has_masks: bool
    readers: Readers

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits; empty where there are none."""
        return tuple(split for split in self.readers if split is not None)


def find_layout(root: Path) -> Layout:
    """The most specific layout that fits the folder `root`."""
    for finder in (_find_cityscapes, _find_voc, _find_ade20k, _find_images_and_masks, _find_camvid):
        if layout := finder(root):
            return layout
    return _find_images(root)


def without_masks(root: Path, pairs: Pairs) -> Pairs:
    """Those of a plain folder that lie in no folder of masks, unless all do."""

    def is_mask(item: Item) -> bool:
        return isinstance(item, Path) and any(
            re.search(_HOLDS_MASKS, part) for part in item.relative_to(root).parts[:-1]
        )

    return [pair for pair in pairs if not is_mask(pair[0])] or pairs


def _find_cityscapes(root: Path) -> Layout | None:
    images, masks = root / "leftImg8bit", root / "gtFine"
    endings = ("_gtFine_labelTrainIds", "_gtFine_labelIds")
    readers: Readers = {
        split: partial(_pair, images / split, masks / split, "_leftImg8bit", endings) for split in list_folders(images)
    }
    return Layout(name="cityscapes", has_masks=True, readers=readers) if readers else None


def _find_voc(root: Path) -> Layout | None:
    bases = (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012")
    base = next((base for base in bases if (base / "JPEGImages").is_dir()), None)
    if base is None:
        return None
    pair = partial(_pair, base / "JPEGImages", base / "SegmentationClass")
    lists = sorted((base / "ImageSets" / "Segmentation").glob("[!.]*.txt"))
    readers: Readers = {listing.stem: partial(_select, pair, listing) for listing in lists}
    return Layout(name="voc", has_masks=True, readers=readers or {None: pair})


def _select(pair: Callable[[], _Files], listing: Path) -> _Files:
    """The pairs whose image is named in `listing`, one stem a line."""
    wanted = {line.split()[0] for line in read_text(listing).splitlines() if line.strip()}
    by_stem = {image.stem: (image, mask) for image, mask in pair()}
    missing = sorted(wanted - by_stem.keys())
    if missing:
        raise DataError(
            listing,
            f"names {len(missing)} of {len(wanted)} images that are not in JPEGImages, the first is {missing[0]}",
            remedy="complete the data set or shorten the list",
        )
    return [by_stem[stem] for stem in sorted(wanted)]


def _find_ade20k(root: Path) -> Layout | None:
    for base in (root, root / "ADEChallengeData2016"):
        images, masks = base / "images", base / "annotations"
        if masks.is_dir() and {"training", "validation"}.intersection(list_folders(images)):
            return _find_folders("ade20k", images, masks)
    return None


def _find_images_and_masks(root: Path) -> Layout | None:
    masks = next((root / name for name in _MASK_FOLDERS if (root / name).is_dir()), None)
    if masks is None or not (root / "images").is_dir():
        return None
    return _find_folders("images+masks", root / "images", masks)


def _find_camvid(root: Path) -> Layout | None:
    """A folder of masks for every split, or for every one but the test split."""
    folders = list_folders(root)
    splits = [name for name in folders if name in _SPLIT_NAMES]
    named_so = {split: [name for name in folders if re.match(f"{split}[_-]*{_HOLDS_MASKS}", name)] for split in splits}
    masks = {split: root / names[0] for split, names in named_so.items() if names}
    if not masks or len(folders) != len(splits) + len(masks):
        return None
    readers: Readers = {split: partial(_pair, root / split, masks.get(split)) for split in splits}
    return Layout(name="camvid", has_masks=True, readers=readers)


def _find_images(root: Path) -> Layout:
    # Without masks the pictures of `images/train` are as good a training split as those of `train`.
    inner = _find_folders("images", root / "images", None)
    return inner if inner.splits and list_folders(root) == ["images"] else _find_folders("images", root, None)


def _find_folders(name: str, images: Path, masks: Path | None) -> Layout:
    """Splits are subfolders of `images` (and of `masks`) if all of them have the name of a split."""
    folders = list_folders(images)
    readers: Readers = {None: partial(_pair, images, masks)}
    if folders and _SPLIT_NAMES.issuperset(folders):
        readers = {split: partial(_pair, images / split, masks and masks / split) for split in folders}
    return Layout(name=name, has_masks=masks is not None, readers=readers)


def _pair(images: Path, masks: Path | None, ending: str = "", mask_endings: Sequence[str] = ("",)) -> _Files:
    """Pairs `images/a/b.jpg` with `masks/a/b.png`: same relative path but for the suffix.

    Args:
        images, masks: folders; no mask is found where the second does not exist.
        ending: of the stems of images, which those of masks lack; files without it are none of the images.
        mask_endings: what the stems of masks have in its place; the first that exists is taken.
    """
    by_stem: dict[Path, Path] = {}
    if masks is not None and masks.is_dir():
        # Where a mask exists in two formats, PNG is the lossless one.
        for mask in sorted(list_images(masks), key=lambda path: path.suffix.lower() != ".png"):
            by_stem.setdefault(mask.relative_to(masks).with_suffix(""), mask)
    pairs: _Files = []
    for image in list_images(images):
        stem = image.relative_to(images).with_suffix("")
        if stem.name.endswith(ending):
            candidates = (stem.with_name(stem.name.removesuffix(ending) + each) for each in mask_endings)
            pairs.append((image, next((by_stem[each] for each in candidates if each in by_stem), None)))
    return pairs
