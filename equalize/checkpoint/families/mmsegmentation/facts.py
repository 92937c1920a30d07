"""Reads preprocessing, class names and label rules from an mmsegmentation config and a checkpoint's ``meta``."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from equalize.checkpoint.families.mmsegmentation.config import Config, leaves
from equalize.checkpoint.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess

_REDUCES = "reduce_zero_label"
_REDUCE = re.compile(rf"\b({_REDUCES}['\"]?\s*[=:]\s*)(True|False)\b")
_MODEL = re.compile(r"^model\s*=", re.MULTILINE)


def config_text(meta: Mapping[str, Any]) -> str | None:
    """The config that mmengine (``cfg``) or, before it, mmcv (``config``) wrote into a checkpoint's ``meta``."""
    found = (meta.get(key) for key in ("cfg", "config"))
    return next((text for text in found if isinstance(text, str) and _MODEL.search(text)), None)


def class_names(meta: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Class names from ``dataset_meta`` (mmengine) or ``CLASSES`` (mmcv), None if there are none."""
    names = _of_data_set(meta).get("classes", meta.get("CLASSES"))
    if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None


def palette(meta: Mapping[str, Any]) -> tuple[tuple[int, int, int], ...] | None:
    """The colors of the classes from ``dataset_meta`` (mmengine) or ``PALETTE`` (mmcv), None if there are none."""
    colors = _of_data_set(meta).get("palette", meta.get("PALETTE"))
    listed: Sequence[Any] = colors if isinstance(colors, (list, tuple)) else ()
    if not listed or not all(map(_is_color, listed)):
        return None
    return tuple((red, green, blue) for red, green, blue in listed)


def _of_data_set(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    described = meta.get("dataset_meta")
    return described if isinstance(described, Mapping) else {}


def _is_color(color: object) -> bool:
    levels: Sequence[Any] = color if isinstance(color, (list, tuple)) else ()
    return len(levels) == 3 and all(isinstance(level, int) and 0 <= level <= 255 for level in levels)


def meta_with_classes(names: Sequence[str] | None) -> dict[str, object]:
    """Changes to ``meta`` for new class names; None removes an entry about the old ones."""
    described = None if names is None else {"classes": tuple(names)}
    return {"dataset_meta": described, "CLASSES": None, "PALETTE": None}


def with_reduced_labels(text: str, reduced: bool) -> str:
    """A config's text with all of its ``reduce_zero_label`` set."""
    return _REDUCE.sub(rf"\g<1>{reduced}", text)


def meta_with_reduced_labels(meta: Mapping[str, Any], reduced: bool) -> dict[str, object]:
    """Changes to ``meta`` for labels that are reduced or not; none where it does not describe a data set."""
    described = _of_data_set(meta)
    return {"dataset_meta": {**described, _REDUCES: reduced}} if described else {}


def renumbered_note(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """A note for the user where mmsegmentation gave the classes in the masks other numbers before training."""
    moved = _of_data_set(meta).get("label_map")
    if not isinstance(moved, Mapping) or all(old == new for old, new in moved.items()):
        return ()
    first = next(f"{old} as {new}" for old, new in moved.items() if old != new)
    return (f"its training took some labels as others (label_map: {first}, ...): masks have to be stored as these",)


def windows_note(config: Config) -> tuple[str, ...]:
    """A note for the user where mmsegmentation tests in windows, which is a choice of the command here."""
    if (windows := _windows(config)) is None:
        return ()
    (height, width), _ = windows
    flags = f"--size {height}x{width} --sliding-window"
    return (f"its config tests in windows (test_cfg): evaluate and predict do so with {flags}",)


def _windows(config: Config) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The size and the stride of the windows that a config tests in; None if it does not, or not by numbers."""
    rules = config["model"].get("test_cfg") or config.get("test_cfg")
    if not isinstance(rules, Mapping) or rules.get("mode") != "slide":
        return None
    found = []
    for sides in (rules.get("crop_size"), rules.get("stride")):
        pair = (sides, sides) if isinstance(sides, int) else sides
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(side, int) for side in pair):
            return None
        found.append((pair[0], pair[1]))
    size, stride = found
    return (size, stride) if all(0 < step <= side for step, side in zip(stride, size, strict=True)) else None


def preprocessing(config: Config, meta: Mapping[str, Any]) -> Preprocess:
    """The data preprocessor's mean and std, for pixels in 0..255, and its channel order.

    mmsegmentation reads images as BGR, so BGR is the default. Its test pipelines keep the aspect ratio, so no size is
    taken from them. Labels are reduced as the data set of the training did, which the checkpoint's ``meta`` describes:
    a config need not say what is the default of a data set's class.
    """
    reduce = _of_data_set(meta).get(_REDUCES)
    if reduce is None:
        reduce = next((value for key, value, _ in leaves(config) if key == _REDUCES), None)
    common: dict[str, Any] = {
        "rescale": 1.0,
        "reduce_labels": reduce if isinstance(reduce, bool) else None,
        "windows": _windows(config),
    }
    preprocessor = config["model"].get("data_preprocessor") or config.get("data_preprocessor")
    if preprocessor is None:  # mmcv's, whose ``to_rgb`` means the same
        steps = (step for key, value, step in leaves(config) if (key, value) == ("type", "Normalize"))
        preprocessor = next(steps, None)
    if not isinstance(preprocessor, Mapping):
        mean, std = (tuple(255 * value for value in values) for values in (IMAGENET_MEAN, IMAGENET_STD))
        origin = "ImageNet defaults, the config does not say"
        return Preprocess(mean=mean, std=std, origin=origin, assumed=True, **common)
    flipped = preprocessor.get("bgr_to_rgb", preprocessor.get("to_rgb", False))
    channels: Literal["RGB", "BGR"] = "RGB" if flipped else "BGR"
    return Preprocess(
        mean=_numbers(preprocessor.get("mean"), 0.0),
        std=_numbers(preprocessor.get("std"), 1.0),
        channels=channels,
        origin="the config's data_preprocessor" if "bgr_to_rgb" in preprocessor else "the config's normalization",
        **common,
    )


def _numbers(values: object, otherwise: float) -> tuple[float, ...]:
    """One number for each channel that the network takes, or one for all."""
    numbers = values if isinstance(values, (list, tuple)) else ()
    if numbers and all(isinstance(each, (int, float)) for each in numbers):
        return tuple(float(each) for each in numbers)
    return (otherwise,)
