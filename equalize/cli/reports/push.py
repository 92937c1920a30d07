"""A push as Rich renderables."""

from collections.abc import Iterator

from rich.console import ConsoleRenderable
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from equalize.cli.tables import indented
from equalize.commands.push.push import Push


def push_report(pushed: Push, *, show_card: bool = False) -> Iterator[ConsoleRenderable]:
    """The files that were or would be uploaded, those that were not and why, the address, and the card if wanted."""
    total = decimal(sum(file.size for file in pushed.files))
    verb = "would go" if pushed.dry_run else "went"
    head = f"{len(pushed.files)} files of {total} {verb} to {pushed.repo}, revision {pushed.revision}"
    yield Text(head, style="bold")
    files = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    files.add_column(overflow="fold")
    files.add_column(justify="right", no_wrap=True)
    for file in pushed.files:
        files.add_row(Text(file.path), decimal(file.size))
    yield indented(files)
    for path, reason in pushed.left_out.items():
        yield Text(f"  {path} stays: {reason}")
    visibility = {True: "private", False: "public", None: "as it was"}[pushed.private]
    if pushed.dry_run:
        yield Text(f"Nothing was sent. If {pushed.repo} does not exist, it will be made, {visibility}.")
    else:
        yield Text(f"{pushed.url} ({visibility})")
    if show_card:
        yield Text(f"\n{pushed.card}", no_wrap=True)
