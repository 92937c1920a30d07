"""Flags of a training, one for each field of `TrainConfig`; None everywhere means: as the configuration has it."""

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import typer

from equalize.cli import options as o

__all__ = ["CommonTrainingFlags", "TrainingFlags"]


def _flag(name: str, *aliases: str, **options: Any) -> Any:
    return typer.Option(f"--{name}", *aliases, **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonTrainingFlags:
    """Those that `finetune` and `compare` share."""

    config: Annotated[
        str | None, _flag("config", metavar="FILE", help="YAML with any of these settings; flags win.")
    ] = None
    epochs: Annotated[int | None, _flag("epochs", metavar="E", help="20 if left away.")] = None
    max_steps: Annotated[int | None, _flag("max-steps", "--steps", metavar="K", help="Instead of --epochs.")] = None
    batch_size: Annotated[int | None, _flag("batch-size", metavar="N", help="Pairs a step and process; 8.")] = None
    accumulate: Annotated[int | None, _flag("accumulate", metavar="N", help="Batches that make a step.")] = None
    optimizer: Annotated[
        Literal["adamw", "sgd"] | None, _flag("optimizer", help="adamw if left away; sgd has momentum 0.9.")
    ] = None
    lr: Annotated[float | None, _flag("lr", help="Peak learning rate; 1e-4 for adamw, 0.01 for sgd if left away.")] = (
        None
    )
    head_lr_mult: Annotated[
        float | None, _flag("head-lr-mult", help="How much faster all but the backbone learns; 1.")
    ] = None
    precision: Annotated[Literal["fp32", "bf16", "fp16"] | None, _flag("precision", help="fp32 if left away.")] = None
    freeze_backbone: Annotated[bool | None, _flag("freeze-backbone/--no-freeze-backbone")] = None
    freeze_norms: Annotated[bool | None, _flag("freeze-norms/--no-freeze-norms")] = None
    size: o.Size = None
    crop: Annotated[str | None, _flag("crop", metavar="H[xW]", help="What training sees; --size if left away.")] = None
    num_classes: Annotated[
        int | None, _flag("num-classes", metavar="N", help="The classifier is drawn anew if it has others.")
    ] = None
    class_names: o.ClassNames = None
    ignore_index: Annotated[int | None, _flag("ignore-index", help="Label that does not count; 255.")] = None
    reduce_labels: Annotated[
        Literal["auto", "yes", "no"] | None, _flag("reduce-labels", help="Label 0 does not count, 1 is class 0.")
    ] = None
    train_split: Annotated[str | None, _flag("train-split", metavar="NAME")] = None
    val_split: Annotated[str | None, _flag("val-split", metavar="NAME")] = None
    samples: Annotated[int | None, _flag("samples", metavar="N", help="Images that sigmas are measured on; 256.")] = (
        None
    )
    train_as: Annotated[
        Literal["explicit", "folded"] | None,
        _flag(
            "train-as",
            help="Whether the optimizer sees equalized weights; explicit where the plan is preserve if left away.",
        ),
    ] = None
    seed: Annotated[int | None, _flag("seed", min=0, metavar="N", help="Of all that is random; 0.")] = None
    workers: Annotated[int | None, _flag("workers", metavar="N", help="Processes that read pairs.")] = None
    device: Annotated[str | None, _flag("device", metavar="NAME", help="auto, cpu, cuda or mps.")] = None

    def settings(self) -> dict[str, Any]:
        """The flags that were given, as fields of `TrainConfig`."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "config"}
        given = {name: value for name, value in values.items() if value not in (None, [])}
        for name in given.keys() & {"size", "crop"}:
            given[name] = o.read_size(given[name])
        for name in given.keys() & {"class_weights", "scale"}:
            given[name] = o.read_numbers(given[name], f"--{name.replace('_', '-')}")
        if "report_to" in given:
            given["report_to"] = tuple(given["report_to"])
        return given


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFlags(CommonTrainingFlags):
    """Those of `finetune`."""

    weight_decay: Annotated[float | None, _flag("weight-decay", help="0.01 for adamw, 5e-4 for sgd.")] = None
    power: Annotated[float | None, _flag("power", help="Of the polynomial decay; 0.9.")] = None
    warmup: Annotated[float | None, _flag("warmup", help="Share of the steps with a rising rate; 0.05.")] = None
    clip: Annotated[float | None, _flag("clip", help="Largest norm of the gradient; 1; 0 for none.")] = None
    label_smoothing: Annotated[float | None, _flag("label-smoothing")] = None
    class_weights: Annotated[
        str | None, _flag("class-weights", metavar="W,W,...", help="Of the loss, one a class.")
    ] = None
    aux_weight: Annotated[float | None, _flag("aux-weight", help="Of an auxiliary head's loss; 0.4.")] = None
    scale: Annotated[str | None, _flag("scale", metavar="LOW,HIGH", help="Of the random resize; 0.5,2.")] = None
    flip: Annotated[float | None, _flag("flip", help="Probability; 0.5.")] = None
    cat_max_ratio: Annotated[
        float | None, _flag("cat-max-ratio", help="Largest share of one class in a crop; 0.75.")
    ] = None
    photometric: Annotated[
        bool | None, _flag("photometric/--no-photometric", help="Vary brightness, contrast, colors.")
    ] = None
    eval_every: Annotated[
        int | None, _flag("eval-every", metavar="STEPS", help="Score and save; each epoch if left away.")
    ] = None
    log_every: Annotated[int | None, _flag("log-every", metavar="STEPS")] = None
    patience: Annotated[
        int | None, _flag("patience", metavar="N", help="Stop after N evaluations without a better mIoU.")
    ] = None
    keep_norm: Annotated[bool | None, _flag("keep-norm/--no-keep-norm", help="Of --calibrate.")] = None
    report_to: Annotated[
        list[str] | None, _flag("report-to", metavar="NAME", help="tensorboard or trackio; repeatable.")
    ] = None
