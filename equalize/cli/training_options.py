"""Flags of a training, one for each field of `TrainConfig`; None everywhere means: as the configuration has it."""

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

import typer

from equalize.cli import options as o

Epochs = Annotated[int | None, typer.Option("--epochs", metavar="E", help="20 if left away.")]
Accumulate = Annotated[int | None, typer.Option("--accumulate", metavar="N", help="Batches that make a step.")]
Optimizer = Annotated[
    Literal["adamw", "sgd"] | None, typer.Option("--optimizer", help="adamw if left away; sgd has momentum 0.9.")
]
HeadLrMult = Annotated[
    float | None, typer.Option("--head-lr-mult", help="All but the backbone learns this many times faster.")
]
Precision = Annotated[Literal["fp32", "bf16", "fp16"] | None, typer.Option("--precision", help="fp32 if left away.")]
FreezeBackbone = Annotated[bool | None, typer.Option("--freeze-backbone/--no-freeze-backbone")]
FreezeNorms = Annotated[bool | None, typer.Option("--freeze-norms/--no-freeze-norms")]
Crop = Annotated[str | None, typer.Option("--crop", metavar="H[xW]", help="What training sees; --size if left away.")]
NumClasses = Annotated[
    int | None, typer.Option("--num-classes", metavar="N", help="The classifier is drawn anew if it has others.")
]
IgnoreIndex = Annotated[int | None, typer.Option("--ignore-index", help="Label that does not count; 255.")]
ReduceLabels = Annotated[
    Literal["auto", "yes", "no"] | None,
    typer.Option("--reduce-labels", help="Label 0 does not count, 1 is class 0."),
]
TrainSplit = Annotated[str | None, typer.Option("--train-split", metavar="NAME")]
ValSplit = Annotated[str | None, typer.Option("--val-split", metavar="NAME")]
Device = Annotated[str | None, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or mps.")]

_Int, _Float, _Bool, _Text = int | None, float | None, bool | None, str | None


def _flag(name: str, **options: Any) -> Any:
    return typer.Option(f"--{name}", **options)


FLAGS: dict[str, Any] = {
    "epochs": Epochs,
    "max_steps": Annotated[_Int, _flag("max-steps", metavar="K", help="Instead of --epochs.")],
    "batch_size": Annotated[_Int, _flag("batch-size", metavar="N", help="Pairs a step and process; 8 if left away.")],
    "accumulate": Accumulate,
    "optimizer": Optimizer,
    "lr": Annotated[_Float, _flag("lr", help="Peak learning rate; 1e-4 for adamw, 0.01 for sgd if left away.")],
    "head_lr_mult": HeadLrMult,
    "weight_decay": Annotated[_Float, _flag("weight-decay", help="0.01 for adamw, 5e-4 for sgd.")],
    "power": Annotated[_Float, _flag("power", help="Of the polynomial decay; 0.9.")],
    "warmup": Annotated[_Float, _flag("warmup", help="Share of the steps with a rising rate; 0.05.")],
    "clip": Annotated[_Float, _flag("clip", help="Largest norm of the gradient; 1; 0 for none.")],
    "precision": Precision,
    "label_smoothing": Annotated[_Float, _flag("label-smoothing")],
    "class_weights": Annotated[_Text, _flag("class-weights", metavar="W,W,...", help="Of the loss, one a class.")],
    "aux_weight": Annotated[_Float, _flag("aux-weight", help="Of an auxiliary head's loss; 0.4.")],
    "freeze_backbone": FreezeBackbone,
    "freeze_norms": FreezeNorms,
    "size": o.Size,
    "crop": Crop,
    "scale": Annotated[_Text, _flag("scale", metavar="LOW,HIGH", help="Of the random resize; 0.5,2.")],
    "flip": Annotated[_Float, _flag("flip", help="Probability; 0.5.")],
    "cat_max_ratio": Annotated[_Float, _flag("cat-max-ratio", help="Largest share of one class in a crop; 0.75.")],
    "photometric": Annotated[_Bool, _flag("photometric/--no-photometric", help="Vary brightness, contrast, colours.")],
    "num_classes": NumClasses,
    "class_names": o.ClassNames,
    "ignore_index": IgnoreIndex,
    "reduce_labels": ReduceLabels,
    "train_split": TrainSplit,
    "val_split": ValSplit,
    "eval_every": Annotated[
        _Int, _flag("eval-every", metavar="STEPS", help="Score and save; each epoch if left away.")
    ],
    "log_every": Annotated[_Int, _flag("log-every", metavar="STEPS")],
    "patience": Annotated[_Int, _flag("patience", metavar="N", help="Stop after N evaluations without a better mIoU.")],
    "keep_norm": Annotated[_Bool, _flag("keep-norm/--no-keep-norm", help="Of --calibrate.")],
    "samples": Annotated[_Int, _flag("samples", metavar="N", help="Images of --calibrate; 256 if left away.")],
    "train_as": Annotated[
        Literal["explicit", "folded"] | None,
        _flag(
            "train-as",
            help="Whether the optimizer sees equalized weights; explicit where the plan is preserve if left away.",
        ),
    ],
    "seed": Annotated[_Int, _flag("seed", min=0, metavar="N", help="Of all that is random; 0.")],
    "workers": Annotated[_Int, _flag("workers", metavar="N", help="Processes that read pairs.")],
    "device": Device,
    "report_to": Annotated[
        list[str] | None, _flag("report-to", metavar="NAME", help="tensorboard or trackio; repeatable.")
    ],
}

_Command = TypeVar("_Command", bound=Callable[..., None])


def with_training_flags(command: _Command) -> _Command:
    """A command with `**settings` takes them as these flags."""
    own = [each for each in inspect.signature(command).parameters.values() if each.kind is not each.VAR_KEYWORD]
    flags = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in FLAGS.items()
    ]
    first = next((place for place, each in enumerate(own) if each.kind is each.KEYWORD_ONLY), len(own))
    command.__signature__ = inspect.Signature([*own[:first], *flags, *own[first:]])  # type: ignore[attr-defined]
    return command


def read_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that were given, as fields of `TrainConfig`."""
    given = {name: value for name, value in settings.items() if value not in (None, [])}
    for name in given.keys() & {"size", "crop"}:
        given[name] = o.read_size(given[name])
    for name in given.keys() & {"class_weights", "scale"}:
        given[name] = o.read_numbers(given[name], f"--{name.replace('_', '-')}")
    if "report_to" in given:
        given["report_to"] = tuple(given["report_to"])
    return given
