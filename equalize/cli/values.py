"""How the values of flags are read and checked."""

import functools
import json
import math
from collections.abc import Sequence
from typing import Literal

from typer import BadParameter, Context

ScaleName = Literal["step", "paper"]

# Below this a network's deepest level, most often 1/32 of the image, is less than a pixel.
_SMALLEST = 16


def read_size(text: str) -> tuple[int, int]:
    """`512` or `512x768` (height x width)."""
    numbers = _integers(text.lower().split("x"))
    if len(numbers) not in (1, 2):
        raise BadParameter(f"is no size, got {text!r}, expected H or HxW, such as 512 or 512x768")
    if min(numbers) < _SMALLEST:
        raise BadParameter(f"is too small for a segmentation network, got {text}, expected {_SMALLEST} or more")
    return numbers[0], numbers[-1]


def read_shape(text: str) -> tuple[int, ...]:
    """`2,3,512,512`."""
    numbers = _integers(text.split(","))
    if len(numbers) < 2 or min(numbers) < 1:
        raise BadParameter(f"is no shape, got {text!r}, expected N,C,... such as 2,3,512,512")
    return numbers


def read_samples(text: str) -> int | None:
    """A number of images, or None for `all`."""
    if text == "all":
        return None
    numbers = _integers([text])
    if not numbers or numbers[0] < 1:
        raise BadParameter(f"no image would be read, got {text!r}, expected 1 or more, or all")
    return numbers[0]


def check_tolerance(value: float) -> float:
    """A relative half width, such as 0.02."""
    if not 0 <= value < 1:
        raise BadParameter(f"is no relative precision, got {value:g}, expected 0 to 1, such as 0.02")
    return value


def check_report(directory: str | None) -> str | None:
    """Where a report can be written."""
    if directory is not None:
        from equalize.commands.report.page import demand_report

        demand_report(directory)
    return directory


def read_arch_arg(pair: str) -> tuple[str, object]:
    """`key=value`; the value is JSON if it reads as JSON, else a string."""
    key, equals, value = pair.partition("=")
    if not key.isidentifier() or not equals:
        raise BadParameter(f"is no argument, got {pair!r}, expected key=value")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def read_numbers(text: str) -> tuple[float, ...]:
    """`0.5,2`."""
    try:
        return tuple(float(each) for each in text.split(","))
    except ValueError:
        raise BadParameter(f"is no list of numbers, got {text!r}, expected such as 0.5,2") from None


def refuse_keep_norm(given: bool) -> None:
    """`--keep-norm` of development versions."""
    if given:
        raise BadParameter("was removed: --scale step, the default, keeps the size of a layer's steps; leave it away")


def read_means(text: str) -> tuple[float, ...]:
    """`none`, one number for all channels, or one for each."""
    return (0.0,) if text.lower() == "none" else _finite(read_numbers(text))


def read_stds(text: str) -> tuple[float, ...]:
    """`none`, one number for all channels, or one for each; not 0."""
    numbers = (1.0,) if text.lower() == "none" else _finite(read_numbers(text))
    if 0 in numbers:
        raise BadParameter(f"pixels would be divided by 0, got {text!r}")
    return numbers


def read_factor(text: str) -> float:
    """`0.5`, `1/255`, or `none`."""
    over, _, under = ("1" if text.lower() == "none" else text).partition("/")
    (numerator,), (denominator,) = _finite(read_numbers(over)), _finite(read_numbers(under or "1"))
    if not numerator or not denominator:
        raise BadParameter(f"is no factor, got {text!r}, expected such as 1, 1/255 or 0.0039")
    return numerator / denominator


def _finite(numbers: tuple[float, ...]) -> tuple[float, ...]:
    if not all(map(math.isfinite, numbers)):
        raise BadParameter(f"is not finite, got {numbers}")
    return numbers


def demand_data(context: Context, *flags: str) -> None:
    """Refuses flags about images without --data."""
    for name in flags:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise BadParameter("needs --data", param_hint=f"--{name.replace('_', '-')}")


def allow_pixels(context: Context, value: int | None) -> int | None:
    """Sets PIL's limit until the command ends; it raises above twice its limit."""
    if value is not None:
        from PIL import Image

        context.call_on_close(functools.partial(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS))
        Image.MAX_IMAGE_PIXELS = (value + 1) // 2
    return value


def _integers(texts: Sequence[str]) -> tuple[int, ...]:
    """The texts as integers; empty if one is no integer."""
    plain = all(text.isascii() and text.isdigit() for text in texts)
    return tuple(map(int, texts)) if plain else ()
