"""`equalize push`."""

from typing import Annotated

import typer

from equalize.cli import options as o
from equalize.cli import panels as p

Directory = Annotated[
    str, typer.Argument(metavar="OUT", show_default=False, help="A directory that calibrate or finetune wrote.")
]
Repository = Annotated[
    str, typer.Argument(metavar="ORG/NAME", show_default=False, help="On the Hub; made if it does not exist.")
]


def push(
    context: typer.Context,
    out: Directory,
    repository: Repository,
    private: Annotated[
        bool | None,
        p.output(
            "Of a repository that is made; one that exists stays what it is.",
            default="private",
            names=("--private/--public",),
        ),
    ] = None,
    revision: Annotated[
        str | None, p.output("Commit there; made if it does not exist.", "BRANCH", "main", names=("--revision",))
    ] = None,
    create_pr: Annotated[bool, p.output("Open a pull request instead.", names=("--create-pr",))] = False,
    dry_run: Annotated[bool, p.output("List the files, send nothing; needs no login.", names=("--dry-run",))] = False,
    show_card: Annotated[bool, p.output("Print the model card too.", names=("--show-card",))] = False,
    with_panels: Annotated[
        bool, p.output("Send pictures of the validation split, and show them on the card.", names=("--with-panels",))
    ] = False,
    json: o.Json = False,
) -> None:
    """Upload OUT to the Hugging Face Hub, with a model card.

    Under the access token of `hf auth login` or HF_TOKEN. Symbolic links, hidden files and what only serves to resume
    a training stay behind, and so does report.html; panels.png, which shows the data, goes with --with-panels.
    """
    from equalize.cli.loading import without_collection
    from equalize.cli.terminal import open_terminal

    with without_collection(), open_terminal(context, as_json=json) as terminal:
        from equalize.cli.reports.push import push_report
        from equalize.commands.push.push import push as send

        pushed = send(
            *(out, repository),
            private=private,
            revision=revision,
            create_pr=create_pr,
            dry_run=dry_run,
            with_panels=with_panels,
            notify=terminal.note,
            warn=terminal.warn,
        )
        card = {"card": pushed.card} if show_card else {}
        terminal.result(pushed.to_json() | card, push_report(pushed, show_card=show_card))
