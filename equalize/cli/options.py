"""Arguments and flags that several commands share.

Flags with a `parser` are annotated as `Any`: in a tuple Typer would see several words.
"""

from typing import Annotated, Any, Literal

from typer import Argument

from equalize.cli import values
from equalize.cli.panels import data_option, equalization_option, model_option, output_option

PrecisionName = Literal["fp32", "bf16", "fp16"]
StrategyName = Literal["auto", "migrate", "preserve", "reinit", "rescale"]
SCALE_HELP = (
    "step: equalize to the root mean square of a layer's sigmas, under which a learning rate means what it meant; "
    "paper: to 1, as published."
)
OF_CHECKPOINT = "the checkpoint's"

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
        "--arch-arg",
        metavar="KEY=VALUE",
        parser=values.read_arch_arg,
        help="An argument of --arch, JSON or text; repeatable.",
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
        parser=values.read_means,
        show_default=OF_CHECKPOINT,
        help="Taken from rescaled pixels: one a channel in the network's order, one for all, or none. Like --std, "
        "--rescale and --channel-order, it counts for more than the checkpoint's, and is kept in what is written.",
    ),
]
Std = Annotated[
    Any,
    data_option(
        metavar="S,S,S",
        parser=values.read_stds,
        show_default=OF_CHECKPOINT,
        help="Pixels are divided by it after the mean.",
    ),
]
Rescale = Annotated[
    Any,
    data_option(
        metavar="F",
        parser=values.read_factor,
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
        callback=values.check_report,
        help="Write report.html there, with pictures of each layer's branches. Needs equalize[plot].",
    ),
]
Overwrite = Annotated[bool, output_option("--overwrite", help="Replace OUT if it exists.")]
Size = Annotated[
    Any,
    data_option(
        metavar="H[xW]",
        parser=values.read_size,
        show_default=OF_CHECKPOINT,
        help="The size that images are brought to.",
    ),
]
SlidingWindow = Annotated[
    bool,
    data_option("--sliding-window", help="Leave images at their own size, slide a window of --size over them."),
]
ForwardBatchSize = Annotated[int, data_option(min=1, metavar="N", help="Images a forward pass.")]
ForwardWorkers = Annotated[int, data_option(min=0, metavar="N", help="Processes that read images.")]
Samples = Annotated[
    Any,
    data_option(
        metavar="N",
        parser=values.read_samples,
        help="How many images to draw from the data, and measure at most; or all.",
    ),
]
Tolerance = Annotated[
    float,
    equalization_option(
        metavar="T",
        callback=values.check_tolerance,
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
        min=1,
        metavar="N",
        callback=values.allow_pixels,
        show_default="178956970",
        help="Pixels of the largest picture.",
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
IgnoreIndex = Annotated[
    int | None,
    data_option(metavar="N", show_default="255, unless it is a class", help="The label that does not count."),
]
_REDUCE = "Whether label 0 does not count and 1 is class 0; auto asks the checkpoint, then the labels."
ReduceLabels = Annotated[Literal["auto", "yes", "no"], data_option(help=_REDUCE)]
MaybeReduceLabels = Annotated[Literal["auto", "yes", "no"] | None, data_option(show_default="auto", help=_REDUCE)]
Seed = Annotated[int, model_option(min=0, metavar="N", help="Of the images drawn and of drawn weights.")]
DryRun = Annotated[
    bool, output_option("--dry-run", help="Say what would run and how long it takes, from a few timed steps.")
]
Json = Annotated[bool, output_option("--json", help="One JSON object on stdout, and nothing else there.")]
