"""Arguments and flags that several commands share.

Flags with a `parser` are annotated as `Any`: in a tuple Typer would see several words.
"""

from typing import Annotated, Any, Literal

from typer import Argument

from equalize.cli import panels as p
from equalize.cli import values

PrecisionName = Literal["fp32", "bf16", "fp16"]
StrategyName = Literal["auto", "migrate", "preserve", "reinit", "rescale"]
OptimizerName = Literal["adamw", "sgd"]
SCALE_HELP = (
    "step: equalize to the root mean square of a layer's sigmas, under which a learning rate means what it meant; "
    "paper: to 1, as published."
)
OF_CHECKPOINT = "the checkpoint's"
KeepNorm = Annotated[bool, p.equalization("", names=("--keep-norm",), hidden=True, callback=values.refuse_keep_norm)]

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
    p.model(
        "What builds the network of a state dict: torchvision:NAME, smp:NAME, transformers:DIR, "
        "mmseg:config.py, file.py:Factory or package.module:Factory. The last three run that code.",
        "ARCH",
        "what its keys or files say",
    ),
]
ArchArgs = Annotated[
    list[Any] | None,
    p.model(
        "An argument of --arch, JSON or text; repeatable.",
        "KEY=VALUE",
        names=("--arch-arg",),
        parser=values.read_arch_arg,
    ),
]
Key = Annotated[str | None, p.model("Which state dict of a file that holds several, such as model_ema.", "NAME")]
Output = Annotated[str | None, p.model("Which output of a network with several is scored and trained.", "INDEX|NAME")]
InitMissing = Annotated[
    bool, p.model("Draw what the checkpoint lacks, such as its decoder, under --seed.", names=("--init-missing",))
]
NumClasses = Annotated[int | None, p.model("Classes of a head that is drawn.", "N", OF_CHECKPOINT, min=1)]
Mean = Annotated[
    Any,
    p.data(
        "Taken from rescaled pixels: one a channel in the network's order, one for all, or none. Like --std, "
        "--rescale and --channel-order, it counts for more than the checkpoint's, and is kept in what is written.",
        "M,M,M",
        OF_CHECKPOINT,
        parser=values.read_means,
    ),
]
Std = Annotated[
    Any, p.data("Pixels are divided by it after the mean.", "S,S,S", OF_CHECKPOINT, parser=values.read_stds)
]
Rescale = Annotated[
    Any,
    p.data(
        "Pixels 0..255 are multiplied by it before the mean: 1/255 or 1.", "F", OF_CHECKPOINT, parser=values.read_factor
    ),
]
ChannelOrder = Annotated[
    Literal["rgb", "bgr"] | None, p.data("In which the network takes the colors.", default=OF_CHECKPOINT)
]
_DATA_HELP = (
    "A folder of images, a data set's root, a parquet or arrow file, or a data set on the Hub. Where a table leaves a "
    "choice: DATA:image=COLUMN,label=COLUMN,config=NAME."
)
Data = Annotated[str, p.data(_DATA_HELP, "DATA", False, names=("--data",))]
MaybeData = Annotated[str | None, p.data(_DATA_HELP, "DATA")]
Split = Annotated[str | None, p.data("Of the data set.", "NAME", "the training split")]
Out = Annotated[str, p.output("The directory to write.", "OUT", False, names=("-o", "--out"))]
Report = Annotated[
    str | None,
    p.output(
        "Write report.html there, with pictures of each layer's branches. Needs equalize[plot].",
        "DIR",
        names=("--report",),
        callback=values.check_report,
    ),
]
Overwrite = Annotated[bool, p.output("Replace OUT if it exists.", names=("--overwrite",))]
Size = Annotated[Any, p.data("The size that images are brought to.", "H[xW]", OF_CHECKPOINT, parser=values.read_size)]
SlidingWindow = Annotated[
    bool, p.data("Leave images at their own size, slide a window of --size over them.", names=("--sliding-window",))
]
ForwardBatchSize = Annotated[int, p.data("Images a forward pass.", "N", min=1)]
Samples = Annotated[
    Any, p.data("How many images to draw from the data, and measure at most; or all.", "N", parser=values.read_samples)
]
Tolerance = Annotated[
    float,
    p.equalization(
        "Stop before --samples when every sigma is known this well: half its 95 % interval, relative; 0: never.",
        "T",
        callback=values.check_tolerance,
    ),
]
Optimizer = Annotated[OptimizerName, p.equalization("What the network will be trained with: delta is computed for it.")]
Colors = Annotated[
    str | None,
    p.data(
        "Colors of the classes in colored masks: a line or JSON entry for each; or none.",
        "FILE",
        "a file in the data, if any",
    ),
]
_DRAWN_ON = "What masks without an EXIF orientation show, where their images have one."
DrawnOn = Annotated[Literal["auto", "upright", "stored"], p.data(_DRAWN_ON)]
MaybeDrawnOn = Annotated[Literal["auto", "upright", "stored"] | None, p.data(_DRAWN_ON, default="auto")]
MaxPixels = Annotated[
    int | None, p.data("Pixels of the largest picture.", "N", "178956970", min=1, callback=values.allow_pixels)
]
ClassNames = Annotated[str | None, p.data("Names of classes: text or JSON.", "FILE", "the data's or the checkpoint's")]
BatchSize = Annotated[int | None, p.data("Images a forward pass.", "N", "at most 8, by their size", min=1)]
Device = Annotated[str, p.model("auto, cpu, cuda, cuda:0 or mps.", "NAME")]
Precision = Annotated[PrecisionName, p.model("Of the forward pass.")]
Workers = Annotated[int | None, p.data("Processes that read images.", "N", "none on a CPU, some on a GPU", min=0)]
SkipBad = Annotated[float, p.data("Share of images that may be unreadable.", "SHARE", min=0, max=1)]
IgnoreIndex = Annotated[int | None, p.data("The label that does not count.", "N", "255, unless it is a class")]
_REDUCE = "Whether label 0 does not count and 1 is class 0; auto asks the checkpoint, then the labels."
ReduceLabels = Annotated[Literal["auto", "yes", "no"], p.data(_REDUCE)]
MaybeReduceLabels = Annotated[Literal["auto", "yes", "no"] | None, p.data(_REDUCE, default="auto")]
Seed = Annotated[int, p.model("Of the images drawn and of drawn weights.", "N", min=0)]
DryRun = Annotated[
    bool, p.output("Say what would run and how long it takes, from a few timed steps.", names=("--dry-run",))
]
Json = Annotated[bool, p.output("One JSON object on stdout, and nothing else there.", names=("--json",))]
