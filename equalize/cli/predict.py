"""`equalize predict`."""

from dataclasses import asdict, dataclass
from typing import Annotated

from typer import Argument, Context

from equalize.cli import options as o
from equalize.cli import panels as p
from equalize.cli.flag_groups import ArchFlags, ForwardFlags, PreprocessFlags
from equalize.cli.process import demand_one_process


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictFlags(ForwardFlags):
    """The fields of `PredictConfig`."""

    skip_bad: o.SkipBad = 0.0
    colors: Annotated[
        str | None,
        p.output(
            "Colors of the classes: a line or JSON entry for each.", "FILE", "the checkpoint's, else distinct ones"
        ),
    ] = None
    class_names: Annotated[str | None, p.output("Names of the classes: text or JSON.", "FILE", o.OF_CHECKPOINT)] = None
    overlays: Annotated[
        bool, p.output("Whether to write pictures with the classes over them.", names=("--overlays/--no-overlays",))
    ] = True


Images = Annotated[
    list[str],
    Argument(
        metavar="IMAGES",
        show_default=False,
        help="Pictures, folders at any depth, or a pattern in quotes such as 'drive/**/*.jpg'.",
    ),
]


def predict(
    context: Context,
    model: o.Model,
    images: Images,
    out: Annotated[str, p.output("The directory to write.", "DIR", False, names=("-o", "--out"))],
    *,
    flags: PredictFlags,
    preprocess: PreprocessFlags,
    arch: ArchFlags,
    num_classes: o.NumClasses = None,
    max_pixels: o.MaxPixels = None,
    overwrite: Annotated[bool, p.output("Replace DIR if it exists.", names=("--overwrite",))] = False,
    json: o.Json = False,
) -> None:
    """Write the class of each pixel, as masks and as overlays.

    DIR/masks has a PNG for each picture, of the picture's own size and upright, whose gray values are class indices
    from 0 on: 8 bits, or 16 for more than 256 classes. DIR/overlays has the pictures with the colors of the classes
    over them, DIR/legend.png what the colors mean. Names and subfolders are those of the pictures.
    """
    from equalize.cli.terminal import open_terminal

    with open_terminal(context, as_json=json) as terminal:
        demand_one_process("predictions are made in one process", "call equalize predict without it")
        from equalize.cli.reports.predictions import predictions_report
        from equalize.commands.predict.predict import PredictConfig
        from equalize.commands.predict.predict import predict as run

        name = arch.name(model, num_classes=num_classes, preprocess=preprocess.override())
        config = PredictConfig(**asdict(flags))
        with terminal.progress("predicting") as progress:
            done = run(
                *(name, images, out, config),
                overwrite=overwrite,
                progress=progress,
                notify=terminal.note,
                warn=terminal.warn,
            )
        terminal.result(done.to_json(), predictions_report(done))
