"""Flags of a training, one for each field of `TrainConfig`; None everywhere means: as the configuration has it."""

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, BadParameter

from equalize.cli import options as o
from equalize.cli import values
from equalize.cli.flag_groups import ArchFlags, PreprocessFlags
from equalize.cli.panels import (
    augmentation_option,
    data_option,
    equalization_option,
    model_option,
    optimizer_option,
    output_option,
)

if TYPE_CHECKING:
    from equalize.commands.finetune.config import TrainConfig
    from equalize.commands.finetune.config_file import Subject

MaybeModel = Annotated[
    str | None,
    Argument(metavar="MODEL", show_default=False, help="As for the other commands; may stand in --config instead."),
]


_IN_EFFECT = ("config", "max_pixels")


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonTrainingFlags:
    """Those that `finetune` and `compare` share."""

    config: Annotated[
        str | None, optimizer_option(metavar="FILE", help="YAML: any of these settings, model, data; flags win.")
    ] = None
    epochs: Annotated[
        int | None,
        optimizer_option(metavar="E", show_default="20, without --max-steps", help="Passes over the training split."),
    ] = None
    max_steps: Annotated[
        int | None, optimizer_option("--max-steps", "--steps", metavar="K", help="Steps, instead of --epochs.")
    ] = None
    batch_size: Annotated[
        int | None, optimizer_option(metavar="N", show_default="8", help="Pairs a step, in each process.")
    ] = None
    accumulate: Annotated[
        int | None, optimizer_option(metavar="N", show_default="1", help="Batches that make a step.")
    ] = None
    optimizer: Annotated[
        Literal["adamw", "sgd"] | None, optimizer_option(show_default="adamw", help="sgd has momentum 0.9.")
    ] = None
    lr: Annotated[
        float | None,
        optimizer_option(
            metavar="RATE", show_default="0.0001 for adamw, 0.01 for sgd", help="Learning rate, at its peak."
        ),
    ] = None
    head_lr_mult: Annotated[
        float | None,
        optimizer_option(metavar="FACTOR", show_default="1.0", help="How much faster all but the backbone learns."),
    ] = None
    fusion_lr_mult: Annotated[
        float | None,
        optimizer_option(
            metavar="FACTOR", show_default="1.0", help="How much faster the fusion layers' weights learn."
        ),
    ] = None
    precision: Annotated[
        o.PrecisionName | None,
        model_option(show_default="Accelerate's configuration, else fp32", help="Of forward and backward pass."),
    ] = None
    freeze_backbone: Annotated[
        bool | None, optimizer_option(show_default="no", help="Leave the backbone's weights as they are.")
    ] = None
    cache_backbone: Annotated[
        bool | None,
        optimizer_option(
            show_default="no", help="Run the frozen backbone once an image, and no augmentation but the flip."
        ),
    ] = None
    cache_dir: Annotated[
        str | None,
        optimizer_option(
            metavar="DIR", show_default="in OUT", help="Where its outputs are kept, for other trainings too."
        ),
    ] = None
    freeze_norms: Annotated[
        bool | None,
        optimizer_option(show_default="no", help="Leave weights and statistics of normalizations as they are."),
    ] = None
    size: o.Size = None
    crop: Annotated[
        Any,
        augmentation_option(
            metavar="H[xW]", parser=values.read_size, show_default="--size, else 512x512", help="What training sees."
        ),
    ] = None
    num_classes: Annotated[
        int | None,
        model_option(
            metavar="N",
            show_default="as the data names, else the checkpoint's",
            help="The classifier is drawn anew if it has others.",
        ),
    ] = None
    class_names: o.ClassNames = None
    ignore_index: o.IgnoreIndex = None
    reduce_labels: o.MaybeReduceLabels = None
    colors: o.Colors = None
    masks_drawn_on: o.MaybeDrawnOn = None
    train_split: Annotated[
        str | None, data_option(metavar="NAME", show_default="train", help="What is trained on.")
    ] = None
    val_split: Annotated[
        str | None,
        data_option(metavar="NAME", show_default="val", help="What is scored during training, where the data has it."),
    ] = None
    samples: Annotated[
        int | None,
        equalization_option(metavar="N", show_default="256", help="Images that sigmas are measured on."),
    ] = None
    train_as: Annotated[
        Literal["explicit", "folded"] | None,
        equalization_option(
            show_default="explicit",
            help="What the optimizer trains: the equalized weights (explicit), or those on disk (folded).",
        ),
    ] = None
    seed: Annotated[
        int | None, optimizer_option(min=0, metavar="N", show_default="0", help="Of all that is random.")
    ] = None
    workers: Annotated[int | None, data_option(metavar="N", show_default="0", help="Processes that read images.")] = (
        None
    )
    device: Annotated[
        str | None, model_option(metavar="NAME", show_default="auto", help="auto, cpu, cuda, cuda:0 or mps.")
    ] = None
    max_pixels: o.MaxPixels = None

    def settings(self) -> dict[str, Any]:
        """The flags that were given, as fields of `TrainConfig`."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _IN_EFFECT}
        return {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
            if value not in (None, [])
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFlags(CommonTrainingFlags):
    """Those of `finetune`."""

    weight_decay: Annotated[
        float | None,
        optimizer_option(
            metavar="DECAY", show_default="0.01 for adamw, 0.0005 for sgd", help="Never on biases and normalizations."
        ),
    ] = None
    power: Annotated[
        float | None, optimizer_option(metavar="P", show_default="0.9", help="Of the polynomial decay of the rate.")
    ] = None
    warmup: Annotated[
        float | None,
        optimizer_option(metavar="SHARE", show_default="0.05", help="Share of the steps with a rising rate."),
    ] = None
    clip: Annotated[
        float | None,
        optimizer_option(metavar="NORM", show_default="1.0", help="Largest norm of the gradient; 0 for any."),
    ] = None
    label_smoothing: Annotated[
        float | None,
        optimizer_option(metavar="SHARE", show_default="0.0", help="Share of a label that all classes get."),
    ] = None
    class_weights: Annotated[
        Any,
        optimizer_option(
            metavar="W,W,...", parser=values.read_numbers, show_default="all alike", help="Of the loss, one a class."
        ),
    ] = None
    aux_weight: Annotated[
        float | None, optimizer_option(metavar="W", show_default="0.4", help="Of an auxiliary head's loss.")
    ] = None
    random_resize: Annotated[
        Any,
        augmentation_option(
            metavar="LOW,HIGH", parser=values.read_numbers, show_default="0.5,2.0", help="Range of its factor."
        ),
    ] = None
    flip: Annotated[
        float | None, augmentation_option(metavar="P", show_default="0.5", help="Probability of a mirror image.")
    ] = None
    cat_max_ratio: Annotated[
        float | None,
        augmentation_option(metavar="SHARE", show_default="0.75", help="Largest share of one class in a crop."),
    ] = None
    photometric: Annotated[
        bool | None, augmentation_option(show_default="yes", help="Vary brightness, contrast, colors.")
    ] = None
    eval_every: Annotated[
        int | None, output_option(metavar="STEPS", show_default="an epoch", help="When to score and save.")
    ] = None
    log_every: Annotated[
        int | None,
        output_option(metavar="STEPS", show_default="a hundredth of them", help="When to write to metrics.jsonl."),
    ] = None
    patience: Annotated[
        int | None,
        optimizer_option(metavar="N", show_default="never", help="Stop after N evaluations without a better mIoU."),
    ] = None
    scale: Annotated[
        values.ScaleName | None, equalization_option(show_default="step", help=f"Of --calibrate. {o.SCALE_HELP}")
    ] = None
    report_to: Annotated[
        list[str] | None, output_option(metavar="NAME", help="tensorboard or trackio; repeatable.")
    ] = None


def run_config(
    model: str | None,
    data: str | None,
    training: CommonTrainingFlags,
    *,
    arch: ArchFlags,
    preprocess: PreprocessFlags,
    init_missing: bool,
    further: dict[str, Any] | None = None,
) -> "tuple[Subject, TrainConfig]":
    """The flags that were given over what stands in --config; `further` are settings of one command's own flags.

    Raises:
        BadParameter: neither names MODEL, or data.
    """
    from equalize.commands.finetune.config_file import read_run

    subject = {"model": model, "data": data, **asdict(arch), **asdict(preprocess)}
    subject |= {"arch_args": dict(arch.arch_args or ()) or None, "init_missing": init_missing or None}
    given = {key: value for key, value in subject.items() if value is not None}
    found, settings = read_run(given | training.settings() | (further or {}), training.config)
    for flag, value in (("MODEL", found.model), ("--data", found.data)):
        if value is None:
            raise BadParameter("is missing: give it, or a --config that holds it", param_hint=flag)
    return found, settings
