"""Checks a sample of pairs before training or scoring: how labels are stored, and errors that would occur later."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from equalize.data.bands import picture_size, read_picture
from equalize.data.classes import ade20k_table
from equalize.data.colors import ColorMap
from equalize.data.dataset import DataSet, require_masks, sample
from equalize.data.images import Item, orientation
from equalize.data.masks import (
    DrawnOn,
    LabelRule,
    check_labels,
    demand_same_size,
    drawn_on_by_sides,
    make_upright,
    read_mask,
    read_stored,
    to_classes,
)
from equalize.errors import DataError, InputError
from equalize.messages import Notify, ignore

ReduceLabels = Literal["auto", "yes", "no"]

_ADE20K_CLASSES = 150
_ADE20K_LABELS = range(120, 151)
"""Among which the largest of a few masks is, as a rule."""
_BINARY = 2
_FEW_MASKS, _PAIRS = 8, 64  # that are looked at
_VOID = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSettings:
    """What the user and the checkpoint say of how masks are stored.

    Attributes:
        ignore_index: the label that is neither trained on nor scored; None for 255, unless that is class 1 of two.
        reduce_labels: whether 0 means ignored and class c is stored as c + 1; ``auto`` follows `reduced_before`, then
            says yes for ADE20K with its 150 classes, and where labels are 1 .. num_classes.
        reduced_before: whether labels were reduced when the network was trained; None if unknown.
        colors, drawn_on: see `LabelRule`; ``auto`` goes by the sides of all pairs that are read.
    """

    ignore_index: int | None = None
    reduce_labels: ReduceLabels = "auto"
    reduced_before: bool | None = None
    colors: ColorMap | None = None
    drawn_on: DrawnOn = "auto"

    def rule(self, dataset: DataSet, num_classes: int | None) -> LabelRule:
        """The rule as far as no mask was read. For any number of classes a color called void or so is none of them."""
        colors = self.colors
        if colors is not None:
            colors = colors.for_classes(len(colors.colors) - 1 if num_classes is None else num_classes)
        return LabelRule(
            ignore_index=_VOID if self.ignore_index is None else self.ignore_index,
            has_void=dataset.layout in ("voc", "cityscapes"),
            colors=colors,
            drawn_on=self.drawn_on,
        )


def stored_rule(dataset: DataSet, said: LabelSettings, channels: int = 3) -> tuple[LabelRule | None, str]:
    """How masks are stored as far as a few tell, for any number of classes, and a line about it; see `preflight`.

    The rule is None where most of them cannot be read.
    """
    pairs = sample(dataset.with_masks(), _FEW_MASKS, 0)
    rule, turned = _settle_drawn_on(said.rule(dataset, None), pairs)
    stored: dict[Item, set[int]] = {}
    failures: list[DataError] = []
    for image, mask in pairs:
        try:
            stored[mask] = _read_pair(image, mask, rule, channels)
        except DataError as error:
            failures.append(error)
    bad = f"; {len(failures)} of {len(pairs)} masks looked at do not count ({failures[0]})" if failures else ""
    if 2 * len(failures) > len(pairs):
        return None, bad.removeprefix("; ")
    stored |= _beyond_empty(stored, dataset, rule)
    rule, reason = _decide(rule, set().union(*stored.values()), None, dataset, said)
    return rule, f"{reason}{turned}{bad}"


def preflight(
    dataset: DataSet, num_classes: int, known: LabelSettings | LabelRule, *, channels: int = 3, warn: Notify = ignore
) -> tuple[LabelRule, str]:
    """Read a sample of pairs and check what training and scoring assume.

    Args:
        dataset: opened with labels.
        known: what is said of the masks; or the rule of another split, to be followed.
        channels: that pictures are read with.
        warn: gets a line where at most half of the network's classes can be meant.

    Returns:
        How stored values become classes, for `read_mask`; and what was found, one line for people.
    """
    require_masks(dataset)
    pairs = sample(dataset.with_masks(), _PAIRS, 0)
    given = known if isinstance(known, LabelRule) else known.rule(dataset, num_classes)
    rule, turned = _settle_drawn_on(given, pairs)
    stored = {mask: _read_pair(image, mask, rule, channels) for image, mask in pairs}
    reason = "labels as in the split that is trained on"
    if isinstance(known, LabelSettings):
        stored |= _beyond_empty(stored, dataset, rule)
        rule, reason = _decide(rule, set().union(*stored.values()), num_classes, dataset, known)
    elif not rule.foreground and set().union(*stored.values()) == {0, rule.ignore_index}:
        reason += f"; {rule.ignore_index} is ignored, as there, and all else is 0"
    seen = _seen_classes(stored, rule, num_classes)
    if not seen:
        what = f"has no label that counts, every pixel of {len(stored)} masks is ignored"
        raise DataError(dataset.root, what, remedy="see --ignore-index and --reduce-labels")
    _ask_for_fewer_classes(dataset, seen, rule, num_classes, warn)
    if 0 <= rule.ignore_index < num_classes:
        reason += f"; class {rule.ignore_index} is ignored: neither scored nor part of the means"
    return rule, f"{len(stored)} pairs checked, {len(seen)} classes seen, {reason}{turned}"


def _ask_for_fewer_classes(dataset: DataSet, seen: set[int], rule: LabelRule, num_classes: int, warn: Notify) -> None:
    meant = max(seen) + (0 if 0 not in seen and not rule.reduce else 1)
    if 2 * meant <= num_classes:
        found = f"{dataset.root}: seen {len(seen)} of {num_classes} classes, {min(seen)} to {max(seen)}"
        warn(f"{found}; did you mean --num-classes {meant}? finetune draws a head of that many")


def _seen_classes(stored: Mapping[Item, set[int]], rule: LabelRule, num_classes: int) -> set[int]:
    """The classes of what masks store; a DataError for what is none."""
    seen: set[int] = set()
    for mask, values in stored.items():
        classes = to_classes(torch.tensor(sorted(values)), rule, mask)
        if (((classes < 0) | (classes >= num_classes)) & (classes != rule.ignore_index)).any():
            check_labels(read_mask(mask, rule), num_classes, rule, mask)
        seen.update(classes.tolist())
    return seen - {rule.ignore_index}


def _settle_drawn_on(rule: LabelRule, pairs: Sequence[tuple[Item, Item]]) -> tuple[LabelRule, str]:
    """What masks are drawn on whose images alone have an EXIF orientation, if those that tell agree; and a line."""
    turned = [(image, mask) for image, mask in pairs if orientation(image) != 1 and orientation(mask) == 1]
    if not turned:
        return rule, ""
    found: set[DrawnOn] = set()
    for image, mask in turned:
        with contextlib.suppress(DataError):  # raised again when the pair is checked
            found |= {drawn_on_by_sides(read_stored(mask, rule).shape, image)} - {"auto"}
    if rule.drawn_on == "auto" and len(found) == 1:
        rule = replace(rule, drawn_on=found.pop())
    meant = {"upright": "drawn on the upright image", "stored": "turned as their images are"}
    which = meant.get(rule.drawn_on, "each as its sides say")
    return rule, f"; {len(turned)} masks lack the EXIF orientation of their images and are taken as {which}"


def _read_pair(image_path: Item, mask_path: Item, rule: LabelRule, channels: int) -> set[int]:
    """The stored values of a mask that has the size of its image."""
    mask_HW = make_upright(read_stored(mask_path, rule), mask_path, image_path, rule.drawn_on)
    demand_same_size(mask_HW, mask_path, picture_size(read_picture(image_path, channels)), image_path)
    return set(np.unique(mask_HW.numpy()).tolist())


def _beyond_empty(stored: Mapping[Item, set[int]], dataset: DataSet, rule: LabelRule) -> dict[Item, set[int]]:
    """The first other mask that is not empty if all that were read are, with what it stores: 1, or 255, for class 1."""
    if set().union(*stored.values()) == {0}:
        for _, mask in dataset.with_masks():
            with contextlib.suppress(DataError):  # raised again where the mask counts
                if mask not in stored and (values := set(np.unique(read_stored(mask, rule).numpy()).tolist())) != {0}:
                    return {mask: values}
    return {}


def _decide(
    raw: LabelRule, stored: set[int], num_classes: int | None, dataset: DataSet, said: LabelSettings
) -> tuple[LabelRule, str]:
    """How the stored values that were seen become classes, and why; `num_classes` is None where any number may be."""
    void = raw.colors and raw.colors.void_name
    two, is_free = stored - {0}, said.ignore_index is None and said.reduce_labels == "auto" and not void
    if is_free and (num_classes or 0) <= _BINARY and 0 in stored and two in ({255}, {65535}):
        why = f"labels are 0 and {max(two)} alone; --ignore-index {max(two)} leaves it out"
        return replace(raw, foreground=max(two), has_void=False), f"{max(two)} is class 1 ({why})"
    labels = {value for value in stored - {raw.ignore_index} if not (raw.has_void and (value == _VOID or value < 0))}
    reduce, reason = _reduces(raw, labels, num_classes, dataset, said, has_void=raw.ignore_index in stored)
    if reduce and 0 <= raw.ignore_index < (num_classes or 0):
        what = f"would be class {raw.ignore_index} once labels are reduced"
        raise InputError("ignore_index", what, remedy="leave it at 255, or set --reduce-labels no")
    if labels == {0} and said.ignore_index is None and _VOID in stored and (num_classes or 0) > _BINARY:
        reason += "; 255 is ignored: if it is a class, the network has to have two"
    if void and raw.ignore_index in stored:
        reason += f"; the color of {void} is ignored"
    meaning = "0 ignored, the rest moved down by one" if reduce else "labels as stored"
    return replace(raw, reduce=reduce), f"{meaning} ({reason})"


def _reduces(
    raw: LabelRule, labels: set[int], num_classes: int | None, dataset: DataSet, said: LabelSettings, *, has_void: bool
) -> tuple[bool, str]:
    """Whether 0 means ignored and class c is stored as c + 1, and why."""
    if said.reduce_labels != "auto":
        return said.reduce_labels == "yes", f"--reduce-labels {said.reduce_labels}"
    before = said.reduced_before
    seen = f"labels are {min(labels)} to {max(labels)}" if labels else "every pixel seen is ignored"
    if before is not None:
        reason = f"as the checkpoint was trained; {seen}"
        if before and has_void and 0 in labels and (num_classes is None or max(labels) < num_classes):
            reason += f", and {raw.ignore_index}, as if reduced before: then set --reduce-labels no"
        if not before and labels and max(labels) == num_classes:
            what = f"has labels {min(labels)} to {max(labels)}, while the checkpoint was trained on labels as stored"
            remedy = f"set --reduce-labels yes if 0 does not count, --ignore-index {max(labels)} if that does not"
            raise DataError(dataset.root, what, remedy=remedy)
        return before, reason
    if _is_ade20k(dataset, labels, num_classes) and not has_void:
        return True, "ADE20K stores class c as c + 1"
    # 0 .. num_classes is left to the user: the odd one may be the first (ADE20K) or the last (CamVid's "unlabelled").
    return bool(labels) and min(labels) == 1 and max(labels) == num_classes, seen


def _is_ade20k(dataset: DataSet, labels: set[int], num_classes: int | None) -> bool:
    """By its layout, which others have too, and the number of classes; else by its table or its labels."""
    if dataset.layout != "ade20k" or num_classes is not None:
        return dataset.layout == "ade20k" and num_classes == _ADE20K_CLASSES
    return ade20k_table(dataset) is not None or max(labels, default=0) in _ADE20K_LABELS
