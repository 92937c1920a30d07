"""How data sets lay out images, masks and splits on disk.

Each finder returns a `Layout`, or None if the folder does not have it. They are tried from the most specific to
the least; the last fits everything.

    cityscapes      leftImg8bit/SPLIT/CITY/*_leftImg8bit.png, gtFine/SPLIT/CITY/*_gtFine_label[Train]Ids.png
    voc             JPEGImages/, SegmentationClass[Aug]/, ImageSets/Segmentation/SPLIT.txt
    images+masks    any names of folders or files by which pictures and masks, and splits, can be told (`pairing.py`);
                    splits also by lists, SPLIT.txt
    ade20k, camvid  the same: images/{training,validation}/, annotations/...; SPLIT/, SPLITannot/
    images          the same without a mask: [SPLIT/] with images at any depth
"""

import re
from collections import defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path, PureWindowsPath

from equalize.data.folders import first_file, list_images, read_text
from equalize.data.images import Item
from equalize.data.naming import canonical_split, read_folder, words
from equalize.data.pairing import Matched, match
from equalize.errors import DataError

Pairs = Sequence[tuple[Item, Item | None]]
"""Images, each with its mask or None."""

Readers = Mapping[str | None, Callable[[], Pairs]]
"""What lists the pairs of each split; of everything, for None, where there are no splits."""

_SPLITS = ("train", "val", "test", "trainval")
_Pair = tuple[Path, Path | None]
_Files = Sequence[_Pair]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A layout that fits a folder or a table.

    Attributes:
        name: one of the names above, or `table`.
        matched: what was told by names; empty for a layout that leaves no choice.
        lists: of the splits, where lists in the folder make them, folder by folder; the first folder's are followed.
    """

    name: str
    has_masks: bool
    readers: Readers
    matched: Matched = field(default_factory=Matched)
    lists: Sequence[Sequence[Path]] = ()


def find_layout(root: Path) -> Layout:
    """The most specific layout that fits the folder `root`."""
    return _find_cityscapes(root) or _find_voc(root) or _find_by_names(root)


def _find_cityscapes(root: Path) -> Layout | None:
    images, masks = root / "leftImg8bit", root / "gtFine"
    pictures, labels = (list_images(folder) if folder.is_dir() else [] for folder in (images, masks))
    names = {path.stem.rpartition("_")[2] for path in (*pictures, *labels)}
    splits = sorted({path.relative_to(images).parts[0] for path in pictures if path.parent != images})
    if not splits or "leftImg8bit" not in names or (labels and not names & {"labelIds", "labelTrainIds"}):
        return None
    readers: Readers = {split: partial(_pair, images / split, masks / split) for split in splits}
    return Layout(name="cityscapes", has_masks=True, readers=readers)


def _pair(images: Path, masks: Path) -> _Files:
    """`images/a/b_leftImg8bit.png` with `masks/a/b_gtFine_labelTrainIds.png`, else with that of `labelIds`."""
    pairs: list[_Pair] = []
    for image in list_images(images):
        if image.stem.endswith("_leftImg8bit"):
            stem = masks / image.relative_to(images).with_name(image.stem.removesuffix("_leftImg8bit"))
            named = (stem.with_name(f"{stem.name}_gtFine_{which}.png") for which in ("labelTrainIds", "labelIds"))
            pairs.append((image, first_file(named)))
    return pairs


def _find_voc(root: Path) -> Layout | None:
    """Pascal VOC, of the last year that is there; where it has lists, only the images in them count.

    Masks of SBD stand in where it has none.
    """
    years = (sorted(root.glob(f"{above}VOC20[0-9][0-9]"), reverse=True) for above in ("", "VOCdevkit/"))
    base = next((base for base in (root, *chain(*years)) if (base / "JPEGImages").is_dir()), None)
    if base is None:
        return None
    places = [place for place in (base / "JPEGImages", base / "SegmentationClass") if place.is_dir()]
    found = match(base, [path for place in places for path in list_images(place)])
    if (more := base / "SegmentationClassAug").is_dir():
        pairs = [(image, mask or first_file([more / f"{image.stem}.png"])) for image, mask in found.pairs]
        found = replace(found, pairs=pairs)
    lists = sorted((base / "ImageSets" / "Segmentation").glob("[!.]*.txt"))
    readers: Readers = {listing.stem: partial(_select, base, found, listing) for listing in lists}
    return Layout(name="voc", has_masks=True, readers=readers or {None: lambda: found.pairs}, matched=found)


def _select(root: Path, found: Matched, listing: Path) -> _Files:
    """The pairs whose image is named in `listing`."""
    pairs = _by_name(root, found.pairs)
    wanted = _listed(listing, pairs)
    missing = sorted(wanted - pairs.keys())
    if missing:
        what = f"names {len(missing)} of {len(wanted)} images that are not there, the first is {missing[0]}"
        raise DataError(listing, what, remedy="complete the data set or shorten the list")
    chosen = {pairs[name] for name in wanted}
    return [pair for pair in found.pairs if pair in chosen]


def _by_name(root: Path, pairs: _Files) -> dict[str, _Pair]:
    """The pairs by what a list may call their images: stems; paths under `root`, or the ends of paths that no two
    images share, without suffixes, where stems are shared."""
    by_stem = {pair[0].stem: pair for pair in pairs}
    if len(by_stem) == len(pairs):
        return by_stem
    whole: dict[str, _Pair] = {}
    ends: dict[str, list[_Pair]] = defaultdict(list)
    for pair in pairs:
        first, *rest = pair[0].relative_to(root).with_suffix("").parts
        whole["/".join((first, *rest))] = pair
        for start in range(len(rest) - 1):
            ends["/".join(rest[start:])].append(pair)
    return {name: same[0] for name, same in ends.items() if len(same) == 1} | whole


def _listed(listing: Path, names: Container[str]) -> set[str]:
    """The names of the images in a list, one a line, alone or as paths, perhaps with those of their masks."""
    found: set[str] = set()
    for line in filter(None, map(str.strip, read_text(listing).splitlines())):
        first = re.split(r"[\s,;]", line)[0]
        parts = PureWindowsPath(first).with_suffix("").parts
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        found.add(next((name for name in (line, first, *ends) if name in names), PureWindowsPath(first).stem))
    return found


def _find_by_names(root: Path) -> Layout:
    """Splits are those in which all pairs lie (where there are none, all images), by the names of their folders.

    Else folders such as `uavid_train` and `uavid_val` make them, or lists such as `train.txt` beside the folders.
    """
    found = match(root, list_images(root))
    splits = {image: split_of(root, image) for image, _ in found.pairs}
    paired = [image for image, mask in found.pairs if mask is not None] or [*splits]
    if not all(splits[image] for image in paired):
        wider = {image: _split_among_words(root, image) for image in splits}
        splits = wider if {"train", "val"} <= {*wider.values()} else splits
    readers: Readers = {None: lambda: found.pairs}
    lists: Sequence[Sequence[Path]] = ()
    if paired and all(splits[image] for image in paired):
        names = sorted({split for split in splits.values() if split})
        readers = {name: partial(_of_split, found.pairs, splits, name) for name in names}
    elif lists := _lists(root, found):
        readers = {listing.stem: partial(_select, root, found, listing) for listing in lists[0]}
    name = _name(root, found, readers)
    return Layout(name=name, has_masks=found.has_masks, readers=readers, matched=found, lists=lists)


def _lists(root: Path, found: Matched) -> list[list[Path]]:
    """The lists of splits that name any image, of each folder, `root` first, with one to train on."""
    names = _by_name(root, found.pairs)
    folders = (root, *sorted(path for path in root.glob("[!.]*") if path.is_dir()))
    lists = [[path for path in lists_in(folder) if _listed(path, names) & names.keys()] for folder in folders]
    return [each for each in lists if any(path.stem.lower().startswith("train") for path in each)]


def lists_in(folder: Path) -> list[Path]:
    """The text files in a folder that have the name of a split."""
    return [path for path in sorted(folder.glob("[!.]*.txt")) if canonical_split(path.stem) in _SPLITS]


def split_of(root: Path, path: Path) -> str | None:
    """The split that the folders of a file name; None where they name none."""
    return read_folder(path.relative_to(root).parts[:-1]).split


def _split_among_words(root: Path, path: Path) -> str | None:
    """The split that is the first or last word in the name of a folder."""
    named = (word for part in path.relative_to(root).parts[:-1] for word in (words(part)[:1] + words(part)[-1:]))
    return next((split for split in map(canonical_split, named) if split in _SPLITS), None)


def _of_split(pairs: Sequence[tuple[Path, Path | None]], splits: Mapping[Path, str | None], name: str) -> _Files:
    return [pair for pair in pairs if splits[pair[0]] == name]


def _name(root: Path, found: Matched, readers: Readers) -> str:
    if not found.has_masks:
        return "images"
    image, mask = next((pair for pair in found.pairs if pair[1] is not None), (root, root))
    above, beside = (path.relative_to(root).parts[:-1] for path in (image, mask or root))
    if {"images", "annotations"} <= {*above, *beside} and {"training", "validation"} & readers.keys():
        return "ade20k"
    is_camvid = not read_folder(above).role and read_folder(beside).role and beside[:-1] == above[:-1]
    return "camvid" if is_camvid and None not in readers else "images+masks"
