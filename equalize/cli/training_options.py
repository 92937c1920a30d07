"""Flags of a training, one for each field of `TrainConfig`; None everywhere means: as the configuration has it."""

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, BadParameter

from equalize.cli import options as o
from equalize.cli import panels as p
from equalize.cli import values
from equalize.cli.flag_groups import ArchFlags, PreprocessFlags

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

    config: Annotated[str | None, p.optimizer("YAML: any of these settings, model, data; flags win.", "FILE")] = None
    epochs: Annotated[int | None, p.optimizer("Passes over the training split.", "E", "20, without --max-steps")] = None
    max_steps: Annotated[
        int | None, p.optimizer("Steps, instead of --epochs.", "K", names=("--max-steps", "--steps"))
    ] = None
    batch_size: Annotated[int | None, p.optimizer("Pairs a step, in each process.", "N", "8")] = None
    accumulate: Annotated[int | None, p.optimizer("Batches that make a step.", "N", "1")] = None
    optimizer: Annotated[o.OptimizerName | None, p.optimizer("sgd has momentum 0.9.", default="adamw")] = None
    lr: Annotated[
        float | None, p.optimizer("Learning rate, at its peak.", "RATE", "0.0001 for adamw, 0.01 for sgd")
    ] = None
    weight_decay: Annotated[
        float | None, p.optimizer("Never on biases and normalizations.", "DECAY", "0.01 for adamw, 0.0005 for sgd")
    ] = None
    head_lr_mult: Annotated[
        float | None, p.optimizer("How much faster all but the backbone learns.", "FACTOR", "1.0")
    ] = None
    fusion_lr_mult: Annotated[
        float | None, p.optimizer("How much faster the fusion layers' weights learn.", "FACTOR", "1.0")
    ] = None
    precision: Annotated[
        o.PrecisionName | None,
        p.model("Of forward and backward pass.", default="Accelerate's configuration, else fp32"),
    ] = None
    freeze_backbone: Annotated[bool | None, p.optimizer("Leave the backbone's weights as they are.", default="no")] = (
        None
    )
    cache_backbone: Annotated[
        bool | None,
        p.optimizer("Run the frozen backbone once an image, and no augmentation but the flip.", default="no"),
    ] = None
    cache_dir: Annotated[
        str | None, p.optimizer("Where its outputs are kept, for other trainings too.", "DIR", "in OUT")
    ] = None
    freeze_norms: Annotated[
        bool | None, p.optimizer("Leave weights and statistics of normalizations as they are.", default="no")
    ] = None
    size: o.Size = None
    crop: Annotated[
        Any, p.augmentation("What training sees.", "H[xW]", "--size, else 512x512", parser=values.read_size)
    ] = None
    num_classes: Annotated[
        int | None,
        p.model("The classifier is drawn anew if it has others.", "N", "as the data names, else the checkpoint's"),
    ] = None
    class_names: o.ClassNames = None
    ignore_index: o.IgnoreIndex = None
    reduce_labels: o.MaybeReduceLabels = None
    colors: o.Colors = None
    masks_drawn_on: o.MaybeDrawnOn = None
    train_split: Annotated[str | None, p.data("What is trained on.", "NAME", "train")] = None
    val_split: Annotated[
        str | None, p.data("What is scored during training, where the data has it.", "NAME", "val")
    ] = None
    samples: Annotated[int | None, p.equalization("Images that sigmas are measured on.", "N", "256")] = None
    train_as: Annotated[
        Literal["explicit", "folded"] | None,
        p.equalization(
            "What the optimizer trains: the equalized weights (explicit), or those on disk (folded).",
            default="explicit",
        ),
    ] = None
    seed: Annotated[int | None, p.optimizer("Of all that is random.", "N", "0", min=0)] = None
    workers: Annotated[int | None, p.data("Processes that read images.", "N", "none on a CPU, some on a GPU")] = None
    device: Annotated[str | None, p.model("auto, cpu, cuda, cuda:0 or mps.", "NAME", "auto")] = None
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

    power: Annotated[float | None, p.optimizer("Of the polynomial decay of the rate.", "P", "0.9")] = None
    warmup: Annotated[float | None, p.optimizer("Share of the steps with a rising rate.", "SHARE", "0.05")] = None
    clip: Annotated[float | None, p.optimizer("Largest norm of the gradient; 0 for any.", "NORM", "1.0")] = None
    label_smoothing: Annotated[float | None, p.optimizer("Share of a label that all classes get.", "SHARE", "0.0")] = (
        None
    )
    class_weights: Annotated[
        Any, p.optimizer("Of the loss, one a class.", "W,W,...", "all alike", parser=values.read_numbers)
    ] = None
    aux_weight: Annotated[float | None, p.optimizer("Of an auxiliary head's loss.", "W", "0.4")] = None
    random_resize: Annotated[
        Any, p.augmentation("Range of its factor.", "LOW,HIGH", "0.5,2.0", parser=values.read_numbers)
    ] = None
    flip: Annotated[float | None, p.augmentation("Probability of a mirror image.", "P", "0.5")] = None
    cat_max_ratio: Annotated[float | None, p.augmentation("Largest share of one class in a crop.", "SHARE", "0.75")] = (
        None
    )
    photometric: Annotated[bool | None, p.augmentation("Vary brightness, contrast, colors.", default="yes")] = None
    eval_every: Annotated[int | None, p.output("When to score and save.", "STEPS", "an epoch")] = None
    log_every: Annotated[int | None, p.output("When to write to metrics.jsonl.", "STEPS", "a hundredth of them")] = None
    patience: Annotated[int | None, p.optimizer("Stop after N evaluations without a better mIoU.", "N", "never")] = None
    scale: Annotated[values.ScaleName | None, p.equalization(f"Of --calibrate. {o.SCALE_HELP}", default="step")] = None
    report_to: Annotated[list[str] | None, p.output("tensorboard or trackio; repeatable.", "NAME")] = None


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
    """The flags that were given over what stands in --config; `further` are settings of one command's own flags."""
    from equalize.commands.finetune.config_file import read_run

    subject = {"model": model, "data": data, **asdict(arch), **asdict(preprocess)}
    subject |= {"arch_args": dict(arch.arch_args or ()) or None, "init_missing": init_missing or None}
    given = {key: value for key, value in subject.items() if value is not None}
    found, settings = read_run(given | training.settings() | (further or {}), training.config)
    for flag, value in (("MODEL", found.model), ("--data", found.data)):
        if value is None:
            raise BadParameter("is missing: give it, or a --config that holds it", param_hint=flag)
    return found, settings
