"""`equalize finetune`."""

from typing import Annotated, Any, Literal

import typer

from equalize.cli import options as o
from equalize.cli import training_options as t

__all__ = ["finetune"]

_LENGTH, _RATE, _LOSS, _PICTURES, _EQUALIZATION = "Length", "Learning rate", "Loss", "Pictures", "Equalization"


def finetune(
    context: typer.Context,
    model: o.Model,
    data: o.Data,
    out: o.Out,
    config: Annotated[
        str | None, typer.Option("--config", metavar="FILE", help="YAML with any of these settings; flags win.")
    ] = None,
    epochs: t.Epochs = None,
    max_steps: Annotated[int | None, typer.Option("--max-steps", metavar="K", help="Instead of --epochs.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", metavar="N", help="Pairs a step and process; 8 if left away.")
    ] = None,
    accumulate: t.Accumulate = None,
    optimizer: t.Optimizer = None,
    lr: Annotated[
        float | None, typer.Option("--lr", help="Peak learning rate; 1e-4 for adamw, 0.01 for sgd if left away.")
    ] = None,
    head_lr_mult: t.HeadLrMult = None,
    weight_decay: Annotated[float | None, typer.Option("--weight-decay", help="0.01 for adamw, 5e-4 for sgd.")] = None,
    power: Annotated[float | None, typer.Option("--power", help="Of the polynomial decay; 0.9.")] = None,
    warmup: Annotated[
        float | None, typer.Option("--warmup", help="Share of the steps with a rising rate; 0.05.")
    ] = None,
    clip: Annotated[float | None, typer.Option("--clip", help="Largest norm of the gradient; 1; 0 for none.")] = None,
    precision: t.Precision = None,
    label_smoothing: Annotated[float | None, typer.Option("--label-smoothing")] = None,
    class_weights: Annotated[
        str | None, typer.Option("--class-weights", metavar="W,W,...", help="Of the loss, one a class.")
    ] = None,
    aux_weight: Annotated[float | None, typer.Option("--aux-weight", help="Of an auxiliary head's loss; 0.4.")] = None,
    freeze_backbone: t.FreezeBackbone = None,
    freeze_norms: t.FreezeNorms = None,
    size: o.Size = None,
    crop: t.Crop = None,
    scale: Annotated[
        str | None, typer.Option("--scale", metavar="LOW,HIGH", help="Of the random resize; 0.5,2.")
    ] = None,
    flip: Annotated[float | None, typer.Option("--flip", help="Probability; 0.5.")] = None,
    cat_max_ratio: Annotated[
        float | None, typer.Option("--cat-max-ratio", help="Largest share of one class in a crop; 0.75.")
    ] = None,
    photometric: Annotated[
        bool | None, typer.Option("--photometric/--no-photometric", help="Vary brightness, contrast, colours.")
    ] = None,
    num_classes: t.NumClasses = None,
    class_names: o.ClassNames = None,
    ignore_index: t.IgnoreIndex = None,
    reduce_labels: t.ReduceLabels = None,
    train_split: t.TrainSplit = None,
    val_split: t.ValSplit = None,
    eval_every: Annotated[
        int | None, typer.Option("--eval-every", metavar="STEPS", help="Score and save; each epoch if left away.")
    ] = None,
    log_every: Annotated[int | None, typer.Option("--log-every", metavar="STEPS")] = None,
    patience: Annotated[
        int | None, typer.Option("--patience", metavar="N", help="Stop after N evaluations without a better mIoU.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Equalize first, on the training split, with --strategy or auto.")
    ] = False,
    strategy: Annotated[
        Literal["auto", "migrate", "preserve", "reinit", "rescale"] | None,
        typer.Option("--strategy", help="Of --calibrate."),
    ] = None,
    keep_norm: Annotated[bool | None, typer.Option("--keep-norm/--no-keep-norm", help="Of --calibrate.")] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", metavar="N", help="Images of --calibrate; 256 if left away.")
    ] = None,
    train_as: Annotated[
        Literal["explicit", "folded"] | None,
        typer.Option(
            "--train-as",
            help="Whether the optimiser sees equalized weights; explicit where the plan is preserve if left away.",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, metavar="N", help="Of all that is random; 0.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", metavar="N", help="Processes that read pairs.")] = None,
    device: t.Device = None,
    report_to: Annotated[
        list[str] | None, typer.Option("--report-to", metavar="NAME", help="tensorboard or trackio; repeatable.")
    ] = None,
    init_missing: o.InitMissing = False,
    arch: o.Arch = None,
    arch_arg: o.ArchArgs = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where OUT stopped, with the same flags.")] = False,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Train MODEL on images with masks and write OUT, in MODEL's format.

    OUT holds the best model by mIoU of the validation split, metrics.jsonl, finetune.yaml with every setting, and
    last/ for --resume. Scale equalization of MODEL stays in effect: see --train-as.
    """
    if strategy and not calibrate:
        raise typer.BadParameter("needs --calibrate", param_hint="--strategy")
    given: dict[str, Any] = {key: value for key, value in locals().items() if key in _SETTINGS and value is not None}
    from equalize.cli.terminal import Terminal

    with Terminal(context, as_json=json) as terminal:
        given |= {key: o.read_size(value) for key, value in {"size": size, "crop": crop}.items() if value}
        given |= {
            key: o.read_numbers(value, f"--{key.replace('_', '-')}")
            for key, value in {"class_weights": class_weights, "scale": scale}.items()
            if value
        }
        given |= {"calibrate": strategy or "auto"} if calibrate else {}
        given |= {"report_to": tuple(report_to)} if report_to else {}
        name = o.read_name(model, arch=arch, arch_args=arch_arg, init_missing=init_missing)
        from dataclasses import replace

        from equalize.cli.reports.training import training_report
        from equalize.commands.finetune.config import Recipe
        from equalize.commands.finetune.finetune import finetune as train
        from equalize.distributed import is_main, leave

        recipe = Recipe.make(given, config)
        name = replace(name, seed=recipe.seed)
        with terminal.progress("training") as progress:
            done = train(
                name,
                data,
                out,
                recipe,
                resume=resume,
                overwrite=overwrite,
                progress=progress,
                say=terminal.note,
                warn=terminal.warn,
            )
        if is_main():
            terminal.result(done.to_json())
            terminal.show(training_report(done))
        leave()


_SETTINGS = {
    *("epochs", "max_steps", "batch_size", "accumulate", "optimizer", "lr", "head_lr_mult", "weight_decay", "power"),
    *("warmup", "clip", "precision", "label_smoothing", "aux_weight", "freeze_backbone", "freeze_norms", "flip"),
    *("cat_max_ratio", "photometric", "num_classes", "class_names", "ignore_index", "reduce_labels", "train_split"),
    *("val_split", "eval_every", "log_every", "patience", "keep_norm", "samples", "train_as", "seed", "workers"),
    "device",
}
