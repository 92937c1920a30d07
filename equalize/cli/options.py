"""Arguments and flags that several commands share, and how their values are read.

Flags with a `parser` are annotated as `Any`: in a tuple Typer would see several words.
"""

import functools
import json
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from typer import Argument, BadParameter, Context

from equalize.cli.panels import data_option, equalization_option, model_option, output_option

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


def read_scale(text: str) -> str:
    """`step` or `paper`."""
    if text not in get_args(ScaleName):
        raise BadParameter(f"is step or paper, got {text!r}; the range of the random resize is --random-resize")
    return text


def refuse_keep_norm(given: bool | None) -> None:
    """`--keep-norm` of earlier versions."""
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


PrecisionName = Literal["fp32", "bf16", "fp16"]
StrategyName = Literal["auto", "migrate", "preserve", "reinit", "rescale", "whiten"]
ScaleName = Literal["step", "paper"]
SCALE_HELP = (
    "step: equalize to the root mean square of a layer's sigmas, under which a learning rate means what it meant; "
    "paper: to 1, as published."
)
OF_CHECKPOINT = "the checkpoint's"
KeepNorm = Annotated[bool | None, equalization_option("--keep-norm", hidden=True, callback=refuse_keep_norm)]

Model = Annotated[
    str,
    Argument(
        metavar="MODEL",
        show_default=False,
        help="A Hub id org/name[@revision], a directory, a state dict, or torchvision:NAME.",
    ),
]
Arch = Annotated[
    str | None,
    model_option(
        metavar="ARCH",
        show_default="what its keys or files say",
        help="What builds the network of a state dict: torchvision:NAME, smp:NAME, transformers:DIR, "
        "mmseg:config.py, file.py:Factory or package.module:Factory. The last three run that code.",
    ),
]
ArchArgs = Annotated[
    list[Any] | None,
    model_option(
        "--arch-arg", metavar="KEY=VALUE", parser=read_arch_arg, help="An argument of --arch, JSON or text; repeatable."
    ),
]
Key = Annotated[
    str | None,
    model_option(metavar="NAME", help="Which state dict of a file that holds several, such as model_ema."),
]
Output = Annotated[
    str | None,
    model_option(metavar="INDEX|NAME", help="Which output of a network with several is scored and trained."),
]
InitMissing = Annotated[
    bool, model_option("--init-missing", help="Draw what the checkpoint lacks, such as its decoder, under --seed.")
]
NumClasses = Annotated[
    int | None,
    model_option(min=1, metavar="N", show_default=OF_CHECKPOINT, help="Classes of a head that is drawn."),
]
Mean = Annotated[
    Any,
    data_option(
        metavar="M,M,M",
        parser=read_means,
        show_default=OF_CHECKPOINT,
        help="Taken from rescaled pixels: one a channel in the network's order, one for all, or none. Like --std, "
        "--rescale and --channel-order, it counts for more than the checkpoint's, and is kept in what is written.",
    ),
]
Std = Annotated[
    Any,
    data_option(
        metavar="S,S,S", parser=read_stds, show_default=OF_CHECKPOINT, help="Pixels are divided by it after the mean."
    ),
]
Rescale = Annotated[
    Any,
    data_option(
        metavar="F",
        parser=read_factor,
        show_default=OF_CHECKPOINT,
        help="Pixels 0..255 are multiplied by it before the mean: 1/255 or 1.",
    ),
]
ChannelOrder = Annotated[
    Literal["rgb", "bgr"] | None,
    data_option(show_default=OF_CHECKPOINT, help="In which the network takes the colors."),
]
_DATA_HELP = (
    "A folder of images, a data set's root, a parquet or arrow file, or a data set on the Hub. Where a table leaves a "
    "choice: DATA:image=COLUMN,label=COLUMN,config=NAME."
)
Data = Annotated[str, data_option("--data", metavar="DATA", show_default=False, help=_DATA_HELP)]
MaybeData = Annotated[str | None, data_option(metavar="DATA", help=_DATA_HELP)]
Split = Annotated[str | None, data_option(metavar="NAME", show_default="the training split", help="Of the data set.")]
Out = Annotated[str, output_option("-o", "--out", metavar="OUT", show_default=False, help="The directory to write.")]
Report = Annotated[
    str | None,
    output_option(
        "--report",
        metavar="DIR",
        help="Write report.html there, with pictures of each layer's branches. Needs equalize[plot].",
    ),
]
Overwrite = Annotated[bool, output_option("--overwrite", help="Replace OUT if it exists.")]
Size = Annotated[
    Any,
    data_option(
        metavar="H[xW]", parser=read_size, show_default=OF_CHECKPOINT, help="The size that images are brought to."
    ),
]
Samples = Annotated[
    Any,
    data_option(
        metavar="N", parser=read_samples, help="How many images to draw from the data, and measure at most; or all."
    ),
]
Tolerance = Annotated[
    float,
    equalization_option(
        metavar="T",
        callback=check_tolerance,
        help="Stop before --samples when every sigma is known this well: half its 95 % interval, relative; 0: never.",
    ),
]
Colors = Annotated[
    str | None,
    data_option(
        metavar="FILE",
        show_default="a file in the data, if any",
        help="Colors of the classes in colored masks: a line or JSON entry for each; or none.",
    ),
]
_DRAWN_ON = "What masks without an EXIF orientation show, where their images have one."
DrawnOn = Annotated[Literal["auto", "upright", "stored"], data_option(help=_DRAWN_ON)]
MaybeDrawnOn = Annotated[Literal["auto", "upright", "stored"] | None, data_option(show_default="auto", help=_DRAWN_ON)]
MaxPixels = Annotated[
    int | None,
    data_option(
        min=1, metavar="N", callback=allow_pixels, show_default="178956970", help="Pixels of the largest picture."
    ),
]
ClassNames = Annotated[
    str | None,
    data_option(metavar="FILE", show_default="the data's or the checkpoint's", help="Names of classes: text or JSON."),
]
BatchSize = Annotated[
    int | None,
    data_option(min=1, metavar="N", show_default="at most 8, by their size", help="Images a forward pass."),
]
Device = Annotated[str, model_option(metavar="NAME", help="auto, cpu, cuda, cuda:0 or mps.")]
Precision = Annotated[PrecisionName, model_option(help="Of the forward pass.")]
Workers = Annotated[
    int | None,
    data_option(min=0, metavar="N", show_default="none on a CPU, some on a GPU", help="Processes that read images."),
]
SkipBad = Annotated[float, data_option(min=0, max=1, metavar="SHARE", help="Share of images that may be unreadable.")]
IgnoreIndex = Annotated[int | None, data_option(metavar="N", show_default="255", help="The label that does not count.")]
ReduceLabels = Annotated[
    Literal["auto", "yes", "no"],
    data_option(help="Whether label 0 does not count and 1 is class 0; auto looks at the data."),
]
Seed = Annotated[int, model_option(min=0, metavar="N", help="Of the images drawn and of drawn weights.")]
DryRun = Annotated[
    bool, output_option("--dry-run", help="Say what would run and how long it takes, from a few timed steps.")
]
Json = Annotated[bool, output_option("--json", help="One JSON object on stdout, and nothing else there.")]
