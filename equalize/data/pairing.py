"""Tells pictures from masks in a list of files, and finds the mask of each picture, by names.

Contents are looked at, in a few files, only where files go by one name and no word says which is the mask.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

from equalize.data import naming
from equalize.data.images import looks_like_mask
from equalize.errors import DataError
from equalize.messages import first_of

_LOOKED_AT = 3
_KINDS_LOOKED_AT = 64
_TRAIN_IDS = "_labelTrainIds"  # of GTA V and Synthia, beside masks of the plain name

_Folders = Mapping[Path, naming.Folder]
"""Paths relative to the root, with what their folders say."""

_Family = tuple[str, str, str]
"""Folder but for numbers and names of files, suffix, and what the stems have beside those of others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """Files, told apart.

    Attributes:
        pairs: every picture, in order, and its mask or None.
        alone: masks that belong to no picture.
        conflict: two masks of one picture, of which neither is to be preferred.
        all_masks: whether all lie in folders named as those of masks are.
        aside: what lies beside pictures and is neither a picture nor a mask: arrays, maps of depth or instances.
    """

    pairs: Sequence[tuple[Path, Path | None]] = ()
    alone: Sequence[Path] = ()
    conflict: DataError | None = None
    all_masks: bool = False
    aside: Sequence[Path] = ()

    @property
    def has_masks(self) -> bool:
        """Whether any file is a mask."""
        return bool(self.alone or self.conflict) or any(mask is not None for _, mask in self.pairs)


def match(root: Path, files: Sequence[Path]) -> Matched:
    """Tell the pictures and masks among `files`, which lie under `root`, and pair them."""
    paths = [path.relative_to(root) for path in files]
    shared = naming.shared_length([path.parts[:-1] for path in paths])
    folders = {path: naming.read_folder(path.parts[:-1], shared) for path in paths}
    masks = {path for path, folder in folders.items() if folder.role == "masks"}
    masks |= _named_masks([path for path in paths if path not in masks], whole=not masks)
    masks |= _seen_masks(root, [path for path in paths if path not in masks])
    pictures = {path: folder for path, folder in folders.items() if path not in masks}
    if not pictures:
        masks = _seen_masks(root, paths)
        pictures = {path: folder for path, folder in folders.items() if path not in masks}
    aside = _set_aside([*pictures])
    pictures = {path: folder for path, folder in pictures.items() if path not in aside}
    masks = {path for path in masks if not naming.holds_no_classes(path)} or masks
    masks -= {path.with_name(path.name.replace("TrainIds", "Ids")) for path in masks if "TrainIds" in path.name}
    masks -= {path.with_name(path.name.replace(_TRAIN_IDS, "")) for path in masks if _TRAIN_IDS in path.name}
    found = _candidates(pictures, {path: folder for path, folder in folders.items() if path in masks})
    best = {picture: _preferred(found.get(picture, [])) for picture in pictures}
    unused = masks.difference(*found.values())
    alone = [path for path in paths if path in unused]
    others = _candidates({path: pictures[path] for path in found}, {path: folders[path] for path in alone}, levels=2)
    return Matched(
        pairs=[(root / path, root / options[0] if len(options) == 1 else None) for path, options in best.items()],
        alone=[root / mask for mask in alone],
        aside=[root / path for path in paths if path in aside],
        all_masks=not masks and all(naming.read_folder(path.parts[:-1]).role == "masks" for path in paths),
        conflict=_conflict(root, best, others),
    )


def _set_aside(paths: Sequence[Path]) -> set[Path]:
    """Arrays among pictures, and what folders name as depth or so while pictures elsewhere have the same names."""
    arrays = {path for path in paths if path.suffix.lower() == ".npy"}
    others = {path for path in paths if naming.holds_no_classes(path.parent)} - arrays
    stems = {path.stem for path in {*paths} - arrays - others}
    return (arrays | {path for path in others if path.stem in stems}) if stems else set()


def _conflict(
    root: Path, best: Mapping[Path, Sequence[Path]], others: Mapping[Path, Sequence[Path]]
) -> DataError | None:
    """Of pictures that have several masks, or whose other masks would fit them as well if theirs were not there."""
    picture = next((path for path, options in best.items() if len(options) > 1), None)
    if picture is None and 2 * len(others) > sum(map(len, best.values())):
        picture = next(iter(others))
    if picture is None:
        return None
    masks = [path.as_posix() for path in (*best[picture], *others.get(picture, ()))]
    what = f"may have several masks: {first_of(masks)}"
    return DataError(root / picture, what, remedy="leave one kind of masks in the data")


def _named_masks(paths: Sequence[Path], *, whole: bool) -> set[Path]:
    """Files that a word in their names makes masks, beside pictures of the same name but for such words.

    `whole`: whether masks may lie in other folders than their pictures.
    """
    for folder_of in (lambda path: path.parent, lambda path: None)[: 1 + whole]:
        groups: dict[Path | None, list[Path]] = defaultdict(list)
        for path in paths:
            groups[folder_of(path)].append(path)
        found: set[Path] = set()
        for group in groups.values():
            named = [path for path in group if naming.names_mask(path.stem)]
            plain = {naming.core(path.stem) for path in group if not naming.names_mask(path.stem)} if named else set()
            if any(naming.core(path.stem) in plain for path in named):
                found.update(named)
        if found:
            return found
    return set()


def _seen_masks(root: Path, paths: Sequence[Path]) -> set[Path]:
    """Files that go by the names of pictures, in other folders, formats or with something added, and look like masks.

    Only where all that are looked at do so, and none of the pictures does.
    """
    families, pairs = _families(paths)
    found: set[_Family] = set()
    for (mask, picture), examples in sorted(pairs.items(), key=lambda item: -len(item[1]))[:_KINDS_LOOKED_AT]:
        if mask in found or picture in found or 2 * len(examples) < len(families[mask]):
            continue
        looked_at = [(root / one, root / other) for one, other in examples[:_LOOKED_AT]]
        if all(looks_like_mask(one) and not looks_like_mask(other) for one, other in looked_at):
            found.add(mask)
    return {path for family in found for path in families[family]}


def _families(
    paths: Sequence[Path],
) -> tuple[dict[_Family, list[Path]], dict[tuple[_Family, _Family], list[tuple[Path, Path]]]]:
    """Files by folder, suffix and addition to the names of others; and which of them go by one name, by families."""
    known = frozenset(path.stem for path in paths)
    by_name: dict[str, list[tuple[_Family, Path]]] = defaultdict(list)
    families: dict[_Family, list[Path]] = defaultdict(list)
    for path in paths:
        name, prefix, suffix = naming.affix_of(path.stem, known) or (path.stem, "", "")
        if (prefix + suffix).strip("_-. ()").isdigit():  # `x_2` is another picture
            name, prefix, suffix = path.stem, "", ""
        folder = re.sub(r"\d+", "#", path.parent.as_posix().replace(name, "#"))
        family = (folder, path.suffix.lower(), f"{prefix}*{suffix}")
        families[family].append(path)
        by_name[name.lower()].append((family, path))
    pairs: dict[tuple[_Family, _Family], list[tuple[Path, Path]]] = defaultdict(list)
    for members in by_name.values():
        for (one, mask), (other, picture) in permutations(members[:_KINDS_LOOKED_AT], 2):
            if one != other:
                pairs[one, other].append((mask, picture))
    return families, pairs


def _candidates(pictures: _Folders, masks: _Folders, levels: int = 4) -> dict[Path, list[Path]]:
    """The masks that each picture may have, by the strictest reading of folders that finds any."""
    for level in range(levels):
        best: dict[Path, list[Path]] = {}
        for found in _by_stem(pictures, masks, level) if pictures and masks else ():
            best = found if len(found) > len(best) else best
            if len(best) == min(len(pictures), len(masks)):
                break
        if best:
            return best
    return {}


def _by_stem(pictures: _Folders, masks: _Folders, level: int) -> Iterator[dict[Path, list[Path]]]:
    """The same by one reading of folders and several of names: equal, but for words, for common ends, for one end."""
    yield _equal(pictures, masks, level, lambda path: path.stem.lower(), several=level == 0)
    yield _equal(pictures, masks, level, lambda path: naming.core(path.stem))
    bare = naming.without_common([path.stem for path in masks])
    own = naming.without_common([path.stem for path in pictures])
    yield _equal(pictures, masks, level, lambda path: (own if path in pictures else bare)[path.stem].lower())
    yield _with_affix(pictures, masks, level)
    found: dict[Path, list[Path]] = {}
    for mask, (picture, *more) in _with_affix(masks, pictures, level).items():
        if not more:
            found.setdefault(picture, []).append(mask)
    yield found


def _equal(
    pictures: _Folders, masks: _Folders, level: int, name_of: Callable[[Path], Hashable], *, several: bool = False
) -> dict[Path, list[Path]]:
    """Pictures and masks of equal names; none if two pictures have one name, unless `several` may."""
    keys = {path: (folder.keys[level], name_of(path)) for path, folder in pictures.items()}
    if not several and len(set(keys.values())) < len(keys):
        return {}
    by_key: dict[Hashable, list[Path]] = defaultdict(list)
    for path, folder in masks.items():
        by_key[folder.keys[level], name_of(path)].append(path)
    return {path: by_key[key] for path, key in keys.items() if key in by_key}


def _with_affix(shorter: _Folders, longer: _Folders, level: int) -> dict[Path, list[Path]]:
    """Files of `shorter` with those of `longer` that add one beginning or end to their names; no rare ones."""
    named = {(folder.keys[level], path.stem): path for path, folder in shorter.items()}
    stems: dict[Hashable, set[str]] = defaultdict(set)
    for key, stem in named:
        stems[key].add(stem)
    known = {key: frozenset(each) for key, each in stems.items()}
    found: dict[tuple[str, str], list[tuple[Path, Path]]] = defaultdict(list)
    for path, folder in longer.items():
        if parts := naming.affix_of(path.stem, known.get(folder.keys[level], frozenset())):
            found[parts[1], parts[2]].append((named[folder.keys[level], parts[0]], path))
    most = max(map(len, found.values()), default=0)
    pairs: dict[Path, list[Path]] = defaultdict(list)
    for short, long in (pair for each in found.values() if 2 * len(each) > most for pair in each):
        pairs[short].append(long)
    return pairs


def _preferred(options: Sequence[Path]) -> list[Path]:
    """Of a mask in several formats, one: PNG if it is among them."""
    if len({path.with_suffix("") for path in options}) > 1:
        return [*options]
    return sorted(options, key=lambda path: (path.suffix.lower() != ".png", path))[:1]
