"""`equalize scan`."""

from typing import Annotated

import typer

from equalize.cli import options as o

__all__ = ["scan"]


def scan(
    context: typer.Context,
    model: o.Model,
    size: o.Size = None,
    input_shape: Annotated[
        str | None, typer.Option("--input-shape", metavar="N,C,...", help="Of the network's input; instead of --size.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="List those without a resampled branch too.")] = False,
    data: o.MaybeData = None,
    samples: o.Samples = None,
    split: o.Split = None,
    tolerance: o.Tolerance = None,
    batch_size: o.MaybeBatchSize = None,
    device: o.Device = "auto",
    precision: o.Precision = o.PrecisionName.FP32,
    workers: o.MaybeWorkers = None,
    skip_bad: o.SkipBad = 0.0,
    arch: o.Arch = None,
    arch_arg: o.ArchArgs = None,
    init_missing: o.InitMissing = False,
    num_classes: o.NumClasses = None,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Show the fusion layers of MODEL and their branches.

    Says what cannot be equalized, and why. With --data, the scale of each branch is measured as well; without, only
    the network's structure is read.
    """
    shape = o.read_shape(input_shape)
    if shape and (size or data):
        raise typer.BadParameter(f"cannot stand with {'--size' if size else '--data'}", param_hint="--input-shape")
    for option, value in {"--samples": samples, "--split": split, "--tolerance": tolerance}.items():
        if value is not None and data is None:
            raise typer.BadParameter("needs --data", param_hint=option)
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
        from equalize.cli.reports.plan import scan_report
        from equalize.commands.scan import survey

        with terminal.progress("measuring") as progress:
            found = survey(
                name,
                shape=shape,
                plain=every,
                data=data,
                how=how,
                progress=progress,
                say=terminal.note,
                warn=terminal.warn,
            )
        terminal.result(found.to_json())
        terminal.show(scan_report(found))
        if found.scan.sites and data is None:
            terminal.hint(f"next: equalize calibrate {model} --data IMAGES -o OUT")
