"""Flags of a training, one for each field of `TrainConfig`; None everywhere means: as the configuration has it."""

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from typer import Option

from equalize.cli import options as o

__all__ = ["CommonTrainingFlags", "TrainingFlags"]


_IN_EFFECT = ("config", "max_pixels")


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonTrainingFlags:
    """Those that `finetune` and `compare` share."""

    config: Annotated[str | None, Option(metavar="FILE", help="YAML with any of these settings; flags win.")] = None
    epochs: Annotated[int | None, Option(metavar="E", help="20 if left away.")] = None
    max_steps: Annotated[int | None, Option("--max-steps", "--steps", metavar="K", help="Instead of --epochs.")] = None
    batch_size: Annotated[int | None, Option(metavar="N", help="Pairs a step and process; 8.")] = None
    accumulate: Annotated[int | None, Option(metavar="N", help="Batches that make a step.")] = None
    optimizer: Annotated[Literal["adamw", "sgd"] | None, Option(help="adamw if left away; sgd has momentum 0.9.")] = (
        None
    )
    lr: Annotated[float | None, Option(help="Peak learning rate; 1e-4 for adamw, 0.01 for sgd if left away.")] = None
    head_lr_mult: Annotated[float | None, Option(help="How much faster all but the backbone learns; 1.")] = None
    fusion_lr_mult: Annotated[float | None, Option(help="How much faster the fusion layers' weights learn; 1.")] = None
    precision: Annotated[o.PrecisionName | None, Option(help="fp32 if left away.")] = None
    freeze_backbone: bool | None = None
    cache_backbone: Annotated[
        bool | None, Option(help="Run the frozen backbone once an image, and no augmentation but the flip.")
    ] = None
    cache_dir: Annotated[
        str | None, Option(metavar="DIR", help="Where its outputs are kept, for other trainings too; OUT if left away.")
    ] = None
    freeze_norms: bool | None = None
    size: o.Size = None
    crop: Annotated[
        Any, Option(metavar="H[xW]", parser=o.read_size, help="What training sees; --size if left away.")
    ] = None
    num_classes: Annotated[int | None, Option(metavar="N", help="The classifier is drawn anew if it has others.")] = (
        None
    )
    class_names: o.ClassNames = None
    ignore_index: Annotated[int | None, Option(help="Label that does not count; 255, if it is no class.")] = None
    reduce_labels: Annotated[
        Literal["auto", "yes", "no"] | None, Option(help="Label 0 does not count, 1 is class 0.")
    ] = None
    colors: o.Colors = None
    masks_drawn_on: o.MaybeDrawnOn = None
    train_split: Annotated[str | None, Option(metavar="NAME")] = None
    val_split: Annotated[str | None, Option(metavar="NAME")] = None
    samples: Annotated[int | None, Option(metavar="N", help="Images that sigmas are measured on; 256.")] = None
    train_as: Annotated[
        Literal["explicit", "folded"] | None,
        Option(
            help="Whether the optimizer sees the weights behind equalizers or those on disk; explicit if left away."
        ),
    ] = None
    seed: Annotated[int | None, Option(min=0, metavar="N", help="Of all that is random; 0.")] = None
    workers: Annotated[int | None, Option(metavar="N", help="Processes that read pairs.")] = None
    device: Annotated[str | None, Option(metavar="NAME", help="auto, cpu, cuda or mps.")] = None
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

    weight_decay: Annotated[float | None, Option(help="0.01 for adamw, 5e-4 for sgd.")] = None
    power: Annotated[float | None, Option(help="Of the polynomial decay; 0.9.")] = None
    warmup: Annotated[float | None, Option(help="Share of the steps with a rising rate; 0.05.")] = None
    clip: Annotated[float | None, Option(help="Largest norm of the gradient; 1; 0 for none.")] = None
    label_smoothing: float | None = None
    class_weights: Annotated[
        Any, Option(metavar="W,W,...", parser=o.read_numbers, help="Of the loss, one a class.")
    ] = None
    aux_weight: Annotated[float | None, Option(help="Of an auxiliary head's loss; 0.4.")] = None
    random_resize: Annotated[
        Any, Option(metavar="LOW,HIGH", parser=o.read_numbers, help="Range of its factor; 0.5,2.")
    ] = None
    flip: Annotated[float | None, Option(help="Probability; 0.5.")] = None
    cat_max_ratio: Annotated[float | None, Option(help="Largest share of one class in a crop; 0.75.")] = None
    photometric: Annotated[bool | None, Option(help="Vary brightness, contrast, colors.")] = None
    eval_every: Annotated[int | None, Option(metavar="STEPS", help="Score and save; each epoch if left away.")] = None
    log_every: Annotated[int | None, Option(metavar="STEPS")] = None
    patience: Annotated[int | None, Option(metavar="N", help="Stop after N evaluations without a better mIoU.")] = None
    scale: Annotated[Any, Option(metavar="step|paper", parser=o.read_scale, help=f"Of --calibrate. {o.SCALE_HELP}")] = (
        None
    )
    report_to: Annotated[list[str] | None, Option(metavar="NAME", help="tensorboard or trackio; repeatable.")] = None
