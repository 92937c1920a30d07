"""`equalize demo`."""

import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from equalize.cli import options as o
from equalize.cli import panels as p

_BEFORE = {
    "scan": (
        "1. equalize scan --data: what does this network fuse, and at which scales?",
        "A fusion layer mixes branches that were resampled to one size. Each comes in at a scale of its own, which "
        "training gave it and resampling shrank; the larger it is, the larger the gradients of the weights that read "
        "it. sigma is that scale: the standard deviation of a branch over all images.",
    ),
    "calibrate": (
        "2. equalize calibrate --strategy migrate: bring the branches to one scale, keep what is computed.",
        "The scale of each branch moves from the layers that make it into the fusion weights that read it. Without a "
        "--strategy, fusion layers that have nothing to gain, as the scan says of these, are left alone.",
    ),
    "verify": (
        "3. equalize verify: is what lies on disk still the same network?",
        "The directory is read by transformers' own loader and compared with the original: tensor by tensor, and in "
        "what every fusion layer gives.",
    ),
}


def demo(
    context: typer.Context,
    out: Annotated[
        str | None, p.output("Keep what is written, in this directory.", "OUT", names=("-o", "--out"))
    ] = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
) -> None:
    """Scan, calibrate and verify a small embedded model.

    A UPerNet trained on drawn street scenes, and scenes it has not seen, come with the package: nothing is downloaded.
    """
    from equalize.cli.terminal import open_terminal

    start = time.perf_counter()
    with (
        open_terminal(context, as_json=json) as terminal,
        tempfile.TemporaryDirectory(prefix="equalize-demo-") as folder,
    ):
        from equalize.checkpoint.loading import ModelName
        from equalize.cli.reports.plan import plan_report, scan_report, verification_json, verification_report
        from equalize.commands.calibrate import calibrate_checkpoint
        from equalize.commands.scan import scan_checkpoint
        from equalize.commands.verify import verify_checkpoint
        from equalize.demo import DATA, MODEL

        name, target = ModelName(source=str(MODEL)), out or str(Path(folder, "equalized"))
        terminal.step(*_BEFORE["scan"])
        with terminal.progress("measuring") as progress:
            found = scan_checkpoint(name, data=DATA, progress=progress, notify=terminal.note, warn=terminal.warn)
        terminal.show(scan_report(found))
        terminal.step(*_BEFORE["calibrate"])
        with terminal.progress("measuring") as progress:
            plan = calibrate_checkpoint(
                *(name, DATA, target), strategy="migrate", overwrite=overwrite, progress=progress, warn=terminal.warn
            )
        terminal.show(plan_report(plan))
        terminal.step(*_BEFORE["verify"])
        plan, check = verify_checkpoint(target, name, DATA)
        terminal.show(verification_report(target, str(MODEL), plan, check))
        seconds = time.perf_counter() - start
        kept = f"{target} is kept" if out else "what was written is deleted again (-o OUT keeps it)"
        terminal.step(f"Done in {seconds:.0f} s; {kept}. Your turn: equalize calibrate MODEL --data IMAGES -o OUT")
        proven = verification_json(target, str(MODEL), plan, check)
        content = {"scan": found.to_json(), "calibrate": plan.to_json(), "verify": proven}
        terminal.result({**content, "seconds": seconds})
