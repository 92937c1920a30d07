"""Arguments and flags that several commands share, and how their values are read."""

import json
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from equalize.checkpoint.load import ModelName
    from equalize.commands.images import CalibrationConfig

__all__ = [
    "Against",
    "Arch",
    "ArchArgs",
    "BatchSize",
    "ClassNames",
    "Data",
    "Device",
    "IgnoreIndex",
    "InitMissing",
    "Json",
    "MaybeBatchSize",
    "MaybeData",
    "MaybeWorkers",
    "Model",
    "NumClasses",
    "Out",
    "Overwrite",
    "Precision",
    "PrecisionName",
    "ReduceLabels",
    "Samples",
    "Seed",
    "Size",
    "SkipBad",
    "Split",
    "Tolerance",
    "Workers",
    "demand_data",
    "read_arch_args",
    "read_calibration",
    "read_name",
    "read_numbers",
    "read_samples",
    "read_shape",
    "read_size",
    "read_tolerance",
]

# Below this a network's deepest level, most often 1/32 of the image, is less than a pixel.
_SMALLEST = 16
_SAMPLES = "256"


def read_size(text: str | None) -> tuple[int, int] | None:
    """`512` or `512x768` (height x width)."""
    if text is None:
        return None
    numbers = _integers(text.lower().split("x"))
    if numbers is None or len(numbers) not in (1, 2):
        raise _refused("--size", f"is no size, got {text!r}, expected H or HxW, such as 512 or 512x768")
    if min(numbers) < _SMALLEST:
        raise _refused("--size", f"is too small for a segmentation network, got {text}, expected {_SMALLEST} or more")
    return numbers[0], numbers[-1]


def read_shape(text: str | None) -> tuple[int, ...] | None:
    """`2,3,512,512`."""
    if text is None:
        return None
    numbers = _integers(text.split(","))
    if numbers is None or len(numbers) < 2 or min(numbers) < 1:
        raise _refused("--input-shape", f"is no shape, got {text!r}, expected N,C,... such as 2,3,512,512")
    return numbers


def read_samples(text: str) -> int | None:
    """A number of images, or None for `all`."""
    if text == "all":
        return None
    numbers = _integers([text])
    if numbers is None or numbers[0] < 1:
        raise _refused("--samples", f"no image would be read, got {text!r}, expected 1 or more, or all")
    return numbers[0]


def read_tolerance(value: float | None) -> float | None:
    """A relative half width, such as 0.02."""
    if value is not None and not 0 < value < 1:
        raise _refused("--tolerance", f"is no relative precision, got {value:g}, expected 0 to 1, such as 0.02")
    return value


def read_arch_args(pairs: Sequence[str] | None) -> dict[str, object]:
    """`key=value` each; a value is JSON if it reads as JSON, else a string."""
    arguments: dict[str, object] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not key.isidentifier() or not equals:
            raise _refused("--arch-arg", f"is no argument, got {pair!r}, expected key=value")
        try:
            arguments[key] = json.loads(value)
        except ValueError:
            arguments[key] = value
    return arguments


def read_numbers(text: str, option: str) -> tuple[float, ...]:
    """`0.5,2`."""
    try:
        return tuple(float(each) for each in text.split(","))
    except ValueError:
        raise _refused(option, f"is no list of numbers, got {text!r}, expected such as 0.5,2") from None


def demand_data(**flags: object) -> None:
    """Refuses flags of images that were given although --data was not."""
    for name, value in flags.items():
        if value is not None:
            raise _refused(f"--{name.replace('_', '-')}", "needs --data")


def _integers(texts: Sequence[str]) -> tuple[int, ...] | None:
    plain = all(text.isascii() and text.isdigit() and len(text) < 10 for text in texts)
    return tuple(int(text) for text in texts) if plain else None


def _refused(option: str, what: str) -> typer.BadParameter:
    return typer.BadParameter(what, param_hint=option)


class PrecisionName(StrEnum):
    """Of the forward pass."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="A Hub id org/name[@revision], a directory, a state dict, or torchvision:NAME.",
    ),
]
Against = Annotated[str, typer.Option("--against", metavar="MODEL", help="The model that OUT was made of.")]
Arch = Annotated[
    str | None,
    typer.Option(
        "--arch",
        metavar="ARCH",
        help="What builds the network of a state dict: torchvision:NAME, smp:NAME, transformers:DIR, "
        "mmseg:config.py, file.py:Factory or package.module:Factory. The last three run that code.",
    ),
]
ArchArgs = Annotated[
    list[str] | None,
    typer.Option("--arch-arg", metavar="KEY=VALUE", help="An argument of --arch, as JSON or text; repeatable."),
]
InitMissing = Annotated[
    bool, typer.Option("--init-missing", help="Draw what the checkpoint lacks, such as its decoder, under --seed.")
]
NumClasses = Annotated[
    int | None, typer.Option("--num-classes", min=1, metavar="N", help="Classes of a head that is drawn.")
]
_DATA_HELP = (
    "A folder of images, a data set's root, a parquet or arrow file, or a data set on the Hub. Where a table leaves a "
    "choice: DATA:image=COLUMN,label=COLUMN,config=NAME."
)
Data = Annotated[str, typer.Option("--data", metavar="DATA", show_default=False, help=_DATA_HELP)]
MaybeData = Annotated[str | None, typer.Option("--data", metavar="DATA", help=_DATA_HELP)]
Split = Annotated[
    str | None, typer.Option("--split", metavar="NAME", help="Of the data set; the training split if left away.")
]
Out = Annotated[str, typer.Option("-o", "--out", metavar="OUT", show_default=False, help="The directory to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]
Size = Annotated[
    str | None,
    typer.Option("--size", metavar="H[xW]", help="Bring images to this size; the checkpoint's if left away."),
]
Samples = Annotated[
    str | None,
    typer.Option("--samples", metavar="N", help="How many images to draw from the data, or all; 256 if left away."),
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        "--tolerance",
        metavar="T",
        help="Stop when the 95 % interval of every sigma is this tight, relative to it.",
    ),
]
IgnoreIndex = Annotated[
    int, typer.Option("--ignore-index", metavar="N", help="The label that is neither trained on nor scored.")
]
ReduceLabels = Annotated[
    Literal["auto", "yes", "no"],
    typer.Option("--reduce-labels", help="Whether label 0 does not count and 1 is class 0; auto looks at the labels."),
]
ClassNames = Annotated[
    str | None, typer.Option("--class-names", metavar="FILE", help="Names of the classes: text or JSON.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, metavar="N", help="Images a forward pass.")]
MaybeBatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size", min=1, metavar="N", help="Images a forward pass; at most 8, by their size, if left away."
    ),
]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:0 or mps.")]
Precision = Annotated[PrecisionName, typer.Option("--precision", help="Of the forward pass.")]
Workers = Annotated[int, typer.Option("--workers", min=0, metavar="N", help="Processes that read images.")]
MaybeWorkers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=0,
        metavar="N",
        help="Processes that read images; if left away, none on a CPU and some on a GPU.",
    ),
]
SkipBad = Annotated[
    float, typer.Option("--skip-bad", min=0, max=1, metavar="SHARE", help="Share of images that may be unreadable.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Of the images drawn and of drawn weights.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else there.")]


def read_name(
    source: str,
    *,
    arch: str | None,
    arch_args: Sequence[str] | None,
    init_missing: bool = False,
    num_classes: int | None = None,
    seed: int = 0,
) -> "ModelName":
    """MODEL and the flags that go with it."""
    arguments = read_arch_args(arch_args)
    from equalize.checkpoint.load import ModelName

    return ModelName(
        source=source,
        arch=arch,
        arch_args=arguments,
        init_missing=init_missing,
        num_classes=num_classes,
        seed=seed,
    )


def read_calibration(
    *,
    samples: str | None = None,
    tolerance: float | None = None,
    size: str | None = None,
    precision: PrecisionName = PrecisionName.FP32,
    **others: Any,
) -> "CalibrationConfig":
    """Which images are measured, and how; `others` are fields of `CalibrationConfig` as they are."""
    values: dict[str, Any] = {
        "samples": read_samples(samples or _SAMPLES),
        "tolerance": read_tolerance(tolerance),
        "size": read_size(size),
        "precision": precision.value,
    }
    from equalize.commands.images import CalibrationConfig

    return CalibrationConfig(**values, **others)
