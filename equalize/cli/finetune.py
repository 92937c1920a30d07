"""`equalize finetune`."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equalize.cli import options as o
from equalize.cli import panels as p
from equalize.cli.flag_groups import ArchFlags, PreprocessFlags
from equalize.cli.next_command import OF_A_PASS, OF_DRAWING, command_line, next_command, same_command
from equalize.cli.process import Terminated
from equalize.cli.training_options import MaybeModel, TrainingFlags, run_config

if TYPE_CHECKING:
    from equalize.checkpoint.loading import ModelName
    from equalize.cli.terminal import Terminal
    from equalize.commands.finetune.config import TrainConfig
    from equalize.commands.finetune.config_file import Subject
    from equalize.commands.finetune.finetune import Finetuned

    _Training = tuple[ModelName, str, str, TrainConfig]  # MODEL, data, OUT, settings

_LEFT = (OF_A_PASS - {"split"}) | OF_DRAWING  # for the next command

Calibrate = Annotated[bool, p.equalization("Equalize first, on the training split.", names=("--calibrate",))]
Strategy = Annotated[
    o.StrategyName | None, p.equalization("Of --calibrate; see equalize calibrate --help.", default="auto")
]
Resume = Annotated[
    bool,
    p.output(
        "Go on where OUT stopped, with the same flags; once it is complete, more --max-steps or --epochs.",
        names=("--resume",),
    ),
]


def finetune(
    context: typer.Context,
    model: MaybeModel = None,
    *,
    data: o.MaybeData = None,
    out: o.Out,
    training: TrainingFlags,
    calibrate: Calibrate = False,
    strategy: Strategy = None,
    keep_norm: o.KeepNorm = False,
    init_missing: o.InitMissing = False,
    preprocess: PreprocessFlags,
    arch: ArchFlags,
    resume: Resume = False,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    json: o.Json = False,
) -> None:
    """Train MODEL on images with masks and write OUT.

    OUT has MODEL's format. It holds the best model by mIoU of the validation split, metrics.jsonl, finetune.yaml with
    MODEL, data and every setting, from which --config repeats the training, and last/ for --resume. Scale equalization
    of MODEL stays in effect: see --train-as.
    """
    if strategy and not calibrate:
        raise typer.BadParameter("needs --calibrate", param_hint="--strategy")
    from equalize.cli.terminal import open_terminal

    with open_terminal(context, as_json=json) as terminal:
        from equalize.cli.reports.training import training_report
        from equalize.distributed import leave

        further = {"calibrate": strategy or "auto"} if calibrate else {}
        subject, settings = run_config(
            *(model, data, training), arch=arch, preprocess=preprocess, init_missing=init_missing, further=further
        )
        if overwrite:
            _keep_config(training.config, out)
        what = (subject.name(settings.seed), str(subject.data), out, settings)
        if dry_run:
            _forecast(terminal, what, resume=resume, overwrite=overwrite)
            terminal.hint(same_command(context, leave=("dry_run", "json")))
        else:
            done = _train(terminal, context, what, resume=resume, overwrite=overwrite)
            terminal.result(done.to_json(), training_report(done))
            terminal.hint(next_command(context, "evaluate", out, leave=_LEFT, settings=_settings(subject, settings)))
            terminal.hint(f"next: {shlex.join(['equalize', 'push', out, 'ORG/NAME'])}")
        leave()


def _keep_config(config: str | None, out: str) -> None:
    """Refuses to remove the --config file with OUT; OUT's own is written again."""
    from equalize.checkpoint.files.atomic import demand_apart
    from equalize.commands.training_record import SETTINGS_FILE

    if config and Path(config).expanduser().absolute() != Path(out).expanduser().absolute() / SETTINGS_FILE:
        demand_apart(out, [config], inside=True)


def _train(
    terminal: "Terminal", context: typer.Context, training: "_Training", *, resume: bool, overwrite: bool
) -> "Finetuned":
    from equalize.cli.training_bars import training_bars
    from equalize.commands.finetune.finetune import finetune as train

    with training_bars(terminal, training[2]) as bars:
        try:
            return train(
                *training,
                resume=resume,
                overwrite=overwrite,
                command=command_line(context),
                monitor=bars,
                notify=terminal.note,
                warn=terminal.warn,
            )
        except (KeyboardInterrupt, Terminated):
            if bars.has_begun:
                _say_how_to_resume(terminal, context, training[2])
            raise


def _forecast(terminal: "Terminal", training: "_Training", *, resume: bool, overwrite: bool) -> None:
    from equalize.cli.reports.dry_run import training_forecast
    from equalize.commands.finetune.dry_run import forecast_training

    found = forecast_training(*training, resume=resume, overwrite=overwrite, notify=terminal.note, warn=terminal.warn)
    terminal.result(found.to_json(), training_forecast(found))


def _settings(subject: "Subject", settings: "TrainConfig") -> dict[str, Any]:
    """What another command has to be told of a training, by parameter; None for what is not set."""
    return {
        "data": subject.data,  # it comes first
        **asdict(subject),
        "arch_args": list(subject.arch_args.items()) or None,
        "split": None if settings.val_split == "val" else settings.val_split,
        "size": settings.size,
        "ignore_index": settings.ignore_index,
        "reduce_labels": None if settings.reduce_labels == "auto" else settings.reduce_labels,
        "colors": settings.colors,
        "masks_drawn_on": None if settings.masks_drawn_on == "auto" else settings.masks_drawn_on,
    }


def _say_how_to_resume(terminal: "Terminal", context: typer.Context, out: str) -> None:
    """After an interruption: what is there, and the command that goes on."""
    from equalize.commands.finetune.run_directory import RunDirectory

    saved = RunDirectory(out, None, resume=True, overwrite=False).newest_step()
    state = (
        f"step {saved} is saved; repeat with --resume" if saved else "no step is saved yet; --resume starts at step 0"
    )
    terminal.hint(state, always=True)
    terminal.hint(same_command(context, "--resume", leave=("overwrite",)), always=True)
