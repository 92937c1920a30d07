"""What names say: whether a folder or a file holds pictures or masks, of which split, and which two belong together.

Names are read as words: `train_images`, `trainImages` and `TrainImages` are `train` and `images`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import PurePath

_SYNONYMS = ("train training tr", "val valid validation dev eval", "test testing ts", "trainval")
_CANONICAL = {name: names.split()[0] for names in _SYNONYMS for name in names.split()}
"""Names that data sets give to the same split."""

_MASK_WORDS = """
mask masks annotation annotations annot annots ann anns anno annos label labels lbl lbls labelmap labelmaps gt gts
groundtruth groundtruths truth seg segs segmap segmaps segmask segmasks segmentation segmentations semantic semantics
manual target targets trimap trimaps
"""
_PICTURE_WORDS = """
image images img imgs im ims picture pictures pic pics photo photos rgb frame frames input inputs sat
original originals
"""
_OTHER_WORDS = """
color colors colour colours colormap colormaps instance instances object objects panoptic depth visualization
visualizations vis overlay overlays edge edges boundary boundaries contour contours inv
"""
_MASKS = frozenset(_MASK_WORDS.split())
_PICTURES = frozenset(_PICTURE_WORDS.split())
_FURTHER = frozenset(("ground", "id", "ids", "anon"))
"""Words that stand beside these: `ground_truth`, `labelTrainIds`, `rgb_anon`."""

_NO_CLASSES = frozenset(_OTHER_WORDS.split())
"""Words of files beside masks that hold something else than one class a pixel."""

_YEAR = re.compile(r"[ _-]?(19|20)\d\d$")
"""Behind the split, as COCO has it: `train2017`."""
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^\W\d_]+")
_GLUED = re.compile(rf"({'|'.join(sorted(_CANONICAL, key=len, reverse=True))})({'|'.join(_MASKS | _PICTURES)})")
_ONE_LETTER = re.compile(r".+[_-][LP]$")
"""CamVid's masks: `x_L.png`, `x_P.png`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """What the names of the folders above a file say.

    Attributes:
        role: ``masks``, ``pictures`` or nothing; the last name that says something decides.
        split: the first split that is named, as it is spelled; below `trainval` another.
        keys: what a picture's folders and those of its mask share, from the strictest reading to the loosest: all but
            the words for pictures and masks; without further words beside these; splits alone; nothing.
    """

    role: str
    split: str | None
    keys: tuple[tuple[str, ...], ...]


def canonical_split(name: str) -> str:
    """``train``, ``val``, ``test`` or ``trainval`` for their synonyms, with or without a year; else in lower case."""
    return _CANONICAL.get(_YEAR.sub("", name.lower()), name.lower())


@cache
def read_folder(parts: tuple[str, ...], shared: int = 0) -> Folder:
    """Reads the names of nested folders, of which the first `shared` hold everything and so decide no role."""
    role, split = "", None
    keys: list[list[str]] = [[], [], []]
    for depth, part in enumerate(parts):
        found = words(part)
        kind = "masks" if _MASKS.intersection(found) else "pictures" if _PICTURES.intersection(found) else ""
        plain = [] if kind else [part]
        named = [word for word in (found if kind else plain) if canonical_split(word) in _CANONICAL]
        if {"train", "val"} <= {*map(canonical_split, named)}:  # `TrainVal_images`
            named = ["trainval"]
        if named and split in (None, "trainval"):
            split = named[0]
        role = kind if kind and depth >= shared else role
        splits = [canonical_split(word) for word in named]
        dated = [_CANONICAL.get(word.lower(), word.lower()) for word in named]
        rest = [_CANONICAL.get(word, word) for word in found if word not in _MASKS | _PICTURES | _FURTHER]
        keys[0] += ["_".join(rest)] if kind and rest else dated or [part.lower() for part in plain]
        keys[1] += dated or [part.lower() for part in plain]
        keys[2] += splits
    return Folder(role=role, split=split, keys=(*map(tuple, keys), ()))


@cache
def words(name: str) -> tuple[str, ...]:
    """The words of a name in lower case, numbers among them: `trainannot_2` is `train`, `annot`, `2`."""
    found: tuple[str, ...] = ()
    for word in map(str.lower, _WORD.findall(name)):
        glued = _GLUED.fullmatch(word)
        found += glued.groups() if glued else (word,)
    return found


def core(stem: str) -> tuple[str, ...]:
    """What the stems of a picture and of its mask share if words tell them apart: `img_12`, `mask_12`, `12-gt`."""
    if _ONE_LETTER.fullmatch(stem):
        stem = stem[:-2]
    found = words(stem.replace("TrainIds", "Ids"))
    return tuple(word for word in found if word not in _MASKS | _PICTURES | _FURTHER)


def names_mask(stem: str) -> bool:
    """Whether the first or last words of a stem are those of masks: `x_mask`, `gt-x`, `x_mask_1`, CamVid's `x_L`."""
    found = [word for word in words(stem) if not word.isdigit()]
    return bool(_ONE_LETTER.fullmatch(stem) or _MASKS.intersection(found[:1] + found[-1:]))


def holds_no_classes(path: PurePath) -> bool:
    """Whether a file lies among masks and shows colors, instances or edges, by the words of its name and folders."""
    return any(
        _NO_CLASSES.intersection(found) or ("rgb" in found and _MASKS.intersection(found))
        for found in map(words, path.parts)
    )


def affix_of(stem: str, others: frozenset[str]) -> tuple[str, str, str] | None:
    """The longest of `others` that `stem` begins or ends with, and the prefix and suffix around it; None if none.

    A number is never cut in two, nor a word.
    """
    for length in range(len(stem) - 1, 0, -1):
        if stem[:length] in others and _is_bound(stem, length):
            return stem[:length], "", stem[length:]
        if stem[-length:] in others and _is_bound(stem, len(stem) - length):
            return stem[-length:], stem[:-length], ""
    return None


def without_common(stems: Sequence[str]) -> dict[str, str]:
    """Each stem without the words that all of them begin and end with; as they are where nothing would be left."""
    pieces = {stem: re.findall(r"[^\W\d_]+|\d+|[\W_]", stem) for stem in stems}
    head = shared_length([*pieces.values()])
    tail = shared_length([piece[::-1] for piece in pieces.values()])
    if min(len(piece) for piece in pieces.values()) <= head + tail:
        return {stem: stem for stem in stems}
    return {stem: "".join(piece[head : len(piece) - tail]) for stem, piece in pieces.items()}


def shared_length(lists: Sequence[Sequence[str]]) -> int:
    """How many first elements all lists have in common."""
    columns = zip(*lists, strict=False)
    return sum(1 for _ in takewhile(lambda column: len({*column}) == 1, columns))


def _is_bound(text: str, place: int) -> bool:
    before, after = text[place - 1], text[place]
    return not (before.isdigit() and after.isdigit()) and not (before.isalpha() and after.isalpha() and after.islower())
