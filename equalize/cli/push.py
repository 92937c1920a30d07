"""`equalize push`."""

from typing import Annotated

import typer

from equalize.cli import options as o
from equalize.cli.panels import output_option

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
        output_option(
            "--private/--public",
            show_default="private",
            help="Of a repository that is made; one that exists stays what it is.",
        ),
    ] = None,
    revision: Annotated[
        str | None,
        output_option(
            "--revision", metavar="BRANCH", show_default="main", help="Commit there; made if it does not exist."
        ),
    ] = None,
    create_pr: Annotated[bool, output_option("--create-pr", help="Open a pull request instead.")] = False,
    dry_run: Annotated[bool, output_option("--dry-run", help="List the files, send nothing; needs no login.")] = False,
    show_card: Annotated[bool, output_option("--show-card", help="Print the model card too.")] = False,
    with_panels: Annotated[
        bool, output_option("--with-panels", help="Send pictures of the validation split, and show them on the card.")
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
