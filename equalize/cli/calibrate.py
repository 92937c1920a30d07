"""`equalize calibrate`."""

from typing import Annotated, Literal

import typer

from equalize.cli import options as o

__all__ = ["calibrate"]


def calibrate(
    context: typer.Context,
    model: o.Model,
    data: o.Data,
    out: o.Out,
    strategy: Annotated[
        Literal["auto", "migrate", "preserve", "reinit", "rescale"],
        typer.Option(
            "--strategy",
            help="auto: drawn weights are rescaled, trained ones migrated or preserved. migrate and preserve keep "
            "what the network computes; rescale and reinit (weights drawn anew) change it.",
        ),
    ] = "auto",
    keep_norm: Annotated[
        bool, typer.Option("--keep-norm", help="Rescale each equalized weight to the norm it had.")
    ] = False,
    init_missing: o.InitMissing = False,
    num_classes: o.NumClasses = None,
    sites: Annotated[
        str | None, typer.Option("--sites", metavar="GLOB", help="Fusion layers to equalize, by module path.")
    ] = None,
    samples: o.Samples = None,
    tolerance: o.Tolerance = None,
    size: o.Size = None,
    split: o.Split = None,
    batch_size: o.MaybeBatchSize = None,
    device: o.Device = "auto",
    precision: o.Precision = o.PrecisionName.FP32,
    seed: o.Seed = 0,
    workers: o.MaybeWorkers = None,
    skip_bad: o.SkipBad = 0.0,
    arch: o.Arch = None,
    arch_arg: o.ArchArgs = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and report; write nothing.")] = False,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Measure MODEL on images and write OUT, equalized.

    OUT has the format of MODEL and loads in its own library; OUT/equalize.json is the receipt. What was written is
    loaded again and compared with MODEL before OUT appears.
    """
    from equalize.cli.terminal import Terminal

    with Terminal(context, as_json=json) as terminal, terminal.among_peers():
        how = o.read_measuring(
            samples=samples,
            tolerance=tolerance,
            size=size,
            split=split,
            batch_size=batch_size,
            device=device,
            precision=precision,
            workers=workers,
            skip_bad=skip_bad,
            seed=seed,
        )
        name = o.read_name(
            model, arch=arch, arch_args=arch_arg, init_missing=init_missing, num_classes=num_classes, seed=seed
        )
        from equalize.cli.reports.plan import plan_report
        from equalize.commands.calibrate import embed

        with terminal.progress("measuring") as progress:
            plan = embed(
                name,
                data,
                out,
                strategy=strategy,
                keep_norm=keep_norm,
                pattern=sites,
                how=how,
                dry_run=dry_run,
                overwrite=overwrite,
                progress=progress,
                say=terminal.note,
                warn=terminal.warn,
            )
        terminal.result(plan.to_json())
        terminal.show(plan_report(plan))
