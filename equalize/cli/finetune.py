"""`equalize finetune`."""

from typing import Annotated

import typer

from equalize.cli import options as o
from equalize.cli.flag_groups import ArchFlags, PreprocessFlags
from equalize.cli.next_command import OF_A_PASS, OF_DRAWING, command_line, next_command
from equalize.cli.panels import equalization_option, output_option
from equalize.cli.training_options import TrainingFlags

__all__ = ["finetune"]


def finetune(
    context: typer.Context,
    model: o.Model,
    data: o.Data,
    out: o.Out,
    *,
    training: TrainingFlags,
    calibrate: Annotated[
        bool, equalization_option("--calibrate", help="Equalize first, on the training split.")
    ] = False,
    strategy: Annotated[
        o.StrategyName | None,
        equalization_option(show_default="auto", help="Of --calibrate; see equalize calibrate --help."),
    ] = None,
    keep_norm: o.KeepNorm = None,
    init_missing: o.InitMissing = False,
    preprocess: PreprocessFlags,
    arch: ArchFlags,
    resume: Annotated[bool, output_option("--resume", help="Go on where OUT stopped, with the same flags.")] = False,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    json: o.Json = False,
) -> None:
    """Train MODEL on images with masks and write OUT.

    OUT has MODEL's format. It holds the best model by mIoU of the validation split, metrics.jsonl, finetune.yaml with
    every setting, and last/ for --resume. Scale equalization of MODEL stays in effect: see --train-as.

    Examples:
        # equalize and train in one go
        equalize finetune openmmlab/upernet-swin-tiny --data camvid -o OUT \\
            --calibrate --epochs 20

        # the decoder alone, behind a frozen backbone that runs once an image
        equalize finetune nvidia/mit-b0 --init-missing --data camvid -o OUT \\
            --freeze-backbone --cache-backbone --max-steps 500
    """
    if strategy and not calibrate:
        raise typer.BadParameter("needs --calibrate", param_hint="--strategy")
    from equalize.cli.terminal import open_terminal

    with open_terminal(context, as_json=json) as terminal:
        given = training.settings() | ({"calibrate": strategy or "auto"} if calibrate else {})
        from equalize.cli.reports.training import training_report
        from equalize.commands.finetune.config import TrainConfig
        from equalize.commands.finetune.finetune import finetune as train
        from equalize.distributed import leave

        config = TrainConfig.make(given, training.config)
        name = arch.name(model, init_missing=init_missing, seed=config.seed, preprocess=preprocess.override())
        if dry_run:
            from equalize.cli.reports.dry_run import training_forecast
            from equalize.commands.finetune.dry_run import forecast_training

            which = {"resume": resume, "overwrite": overwrite}
            found = forecast_training(name, data, out, config, **which, notify=terminal.note, warn=terminal.warn)
            terminal.result(found.to_json(), training_forecast(found))
            again = "".join(f" --{flag}" for flag, given in which.items() if given)
            terminal.hint(f"{next_command(context, 'finetune', model, out=out)}{again}")
            leave()
            return
        with terminal.progress("training") as progress:
            done = train(
                *(name, data, out, config),
                resume=resume,
                overwrite=overwrite,
                command=command_line(context),
                progress=progress,
                notify=terminal.note,
                warn=terminal.warn,
            )
        terminal.result(done.to_json(), training_report(done))
        terminal.hint(next_command(context, "evaluate", out, leave=OF_A_PASS | OF_DRAWING))
        leave()
