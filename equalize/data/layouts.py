"""How well-known data sets lay out images, masks and splits on disk.

Each finder looks at a folder and answers with a `Layout`, or None where the folder looks different. They are asked
from the most specific to the least; the last, a plain folder of images, fits everything.

    cityscapes      leftImg8bit/SPLIT/CITY/*_leftImg8bit.png, gtFine/SPLIT/CITY/*_gtFine_label[Train]Ids.png
    voc             JPEGImages/, SegmentationClass/, ImageSets/Segmentation/SPLIT.txt
    ade20k          images/{training,validation}/, annotations/{training,validation}/
    images+masks    images/[SPLIT/], masks/[SPLIT/]
    camvid          SPLIT/, SPLITannot/ (or _labels, _masks, ... in place of annot)
    images          [SPLIT/] with images at any depth, but for folders that hold masks by their names
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
_HOLDS_MASKS = re.compile(r"(annot|annotations?|masks?|labels?)$", re.IGNORECASE)
"""Folders named so, beside images, are none of a plain folder's images."""

Pairs = Sequence[tuple[Item, Item | None]]
"""Images, each with its mask or None, sorted by the image."""

_Files = list[tuple[Path, Path | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A layout that fits a folder.

    Attributes:
        name: one of the names above, or `table`.
        splits: the splits that the data set has; empty where it has none.
        has_masks: whether the layout has a place for masks.
        read: lists the pairs of one of `splits`, or of everything (None) where there are none.
        identity: of a split that is not made of files, what tells it from others.
        classes: their names, or the file that gives them, where the data set itself has either.
    """

    name: str
    splits: tuple[str, ...]
    has_masks: bool
    read: Callable[[str | None], Pairs]
    identity: Callable[[str | None], str] | None = None
    classes: tuple[str, ...] | Path | None = None


def find_layout(root: Path) -> Layout:
    """The most specific layout that fits the folder `root`."""
    for finder in (_find_cityscapes, _find_voc, _find_ade20k, _find_images_and_masks, _find_camvid):
        if layout := finder(root):
            return layout
    return _find_images(root)


def without_masks(root: Path, pairs: Pairs) -> Pairs:
    """Those of a plain folder that lie in no folder of masks, unless all do."""

    def is_mask(item: Item) -> bool:
        return isinstance(item, Path) and any(map(_HOLDS_MASKS.search, item.relative_to(root).parts[:-1]))

    return [pair for pair in pairs if not is_mask(pair[0])] or pairs


def _find_cityscapes(root: Path) -> Layout | None:
    splits = list_folders(root / "leftImg8bit")
    if not splits:
        return None

    def read(split: str | None) -> Pairs:
        assert split is not None
        images = root / "leftImg8bit" / split
        return [
            (image, _cityscapes_mask(root / "gtFine" / split / image.relative_to(images).parent, image.stem))
            for image in list_images(images)
            if image.stem.endswith("_leftImg8bit")
        ]

    return Layout(name="cityscapes", splits=tuple(splits), has_masks=True, read=read)


def _cityscapes_mask(folder: Path, image_stem: str) -> Path | None:
    frame = image_stem.removesuffix("_leftImg8bit")
    candidates = (folder / f"{frame}_gtFine_{ids}.png" for ids in ("labelTrainIds", "labelIds"))
    return next((mask for mask in candidates if mask.is_file()), None)


def _find_voc(root: Path) -> Layout | None:
    bases = (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012")
    base = next((base for base in bases if (base / "JPEGImages").is_dir()), None)
    if base is None:
        return None
    lists = base / "ImageSets" / "Segmentation"
    splits = tuple(sorted(path.stem for path in lists.glob("[!.]*.txt")))

    def read(split: str | None) -> Pairs:
        pairs = _pair_by_stem(base / "JPEGImages", base / "SegmentationClass")
        return pairs if split is None else _select(pairs, lists / f"{split}.txt")

    return Layout(name="voc", splits=splits, has_masks=True, read=read)


def _select(pairs: _Files, listing: Path) -> _Files:
    """The pairs whose image is named in `listing`, one stem a line."""
    wanted = {line.split()[0] for line in read_text(listing).splitlines() if line.strip()}
    by_stem = {pair[0].stem: pair for pair in pairs}
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
        splits = [split for split in ("training", "validation") if (base / "images" / split).is_dir()]
        if splits and (base / "annotations").is_dir():
            return _folder_layout("ade20k", base / "images", base / "annotations")
    return None


def _find_images_and_masks(root: Path) -> Layout | None:
    masks = next((root / name for name in _MASK_FOLDERS if (root / name).is_dir()), None)
    if masks is None or not (root / "images").is_dir():
        return None
    return _folder_layout("images+masks", root / "images", masks)


def _find_camvid(root: Path) -> Layout | None:
    """A folder of masks for every split, or for every one but the test split."""
    folders = list_folders(root)
    masks = {split: _mask_folder(split, folders) for split in folders if split in _SPLIT_NAMES}
    if not any(masks.values()) or len(folders) != len(masks) + sum(map(bool, masks.values())):
        return None

    def read(split: str | None) -> Pairs:
        assert split is not None
        folder = masks[split]
        return _pair_by_stem(root / split, root / folder if folder else None)

    return Layout(name="camvid", splits=tuple(masks), has_masks=True, read=read)


def _mask_folder(split: str, folders: list[str]) -> str | None:
    named_so = (name for name in folders if name.startswith(split) and name != split)
    return next((name for name in named_so if _HOLDS_MASKS.match(name.removeprefix(split).lstrip("_-"))), None)


def _find_images(root: Path) -> Layout:
    # Without masks the pictures of `images/train` are as good a training split as those of `train`.
    inner = _folder_layout("images", root / "images", None)
    return inner if inner.splits and list_folders(root) == ["images"] else _folder_layout("images", root, None)


def _folder_layout(name: str, images: Path, masks: Path | None) -> Layout:
    """Splits are subfolders of `images` (and of `masks`) if all of them have the name of a split."""
    folders = list_folders(images)
    splits = tuple(folders) if _SPLIT_NAMES.issuperset(folders) else ()

    def read(split: str | None) -> Pairs:
        return _pair_by_stem(images / (split or ""), masks and masks / (split or ""))

    return Layout(name=name, splits=splits, has_masks=masks is not None, read=read)


def _pair_by_stem(images: Path, masks: Path | None) -> _Files:
    """Pairs `images/a/b.jpg` with `masks/a/b.png`: same relative path but for the suffix."""
    by_stem: dict[Path, Path] = {}
    if masks is not None and masks.is_dir():
        # Where a mask exists in two formats, PNG is the lossless one.
        for mask in sorted(list_images(masks), key=lambda path: path.suffix.lower() != ".png"):
            by_stem.setdefault(mask.relative_to(masks).with_suffix(""), mask)
    return [(image, by_stem.get(image.relative_to(images).with_suffix(""))) for image in list_images(images)]
