"""From a written checkpoint to a repository on the Hugging Face Hub.

In this order: the arguments are checked, the files are chosen, the card is written; the repository is found or
made; then everything goes in one commit: whatever fails, no half of a checkpoint is visible.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

from equalize.checkpoint.files.weights import weight_files
from equalize.commands.push.card import model_card
from equalize.commands.push.files import OutgoingFile, choose_files, refuse_tokens, without_local_paths
from equalize.commands.push.hub_errors import LOG_IN, hub_errors
from equalize.errors import InputError, ResourceError
from equalize.hub import HUB_ID
from equalize.messages import Notify, ignore
from equalize.version import __version__

_CARD = "README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """What went to the Hub, or would go.

    Attributes:
        repo: ORG/NAME.
        revision: the branch, or `refs/pr/N` of a pull request.
        url: where to look at it.
        private: whether the repository is, or would be if it were made; None if the Hub does not tell.
        files: what went. left_out: path of what stayed -> why.
        commit: its id; None in a dry run.
        pull_request: its address, if one was opened.
    """

    repo: str
    revision: str
    url: str
    private: bool | None
    dry_run: bool
    files: tuple[OutgoingFile, ...]
    left_out: Mapping[str, str]
    commit: str | None = None
    pull_request: str | None = None

    @property
    def card(self) -> str:
        """The content of README.md."""
        return next(file.read().decode() for file in self.files if file.path == _CARD)

    def to_json(self) -> dict[str, Any]:
        """The object that `equalize push --json` prints."""
        return {
            "repo": self.repo,
            "revision": self.revision,
            "url": self.url,
            "private": self.private,
            "dry_run": self.dry_run,
            "commit": self.commit,
            "pull_request": self.pull_request,
            "files": [{"path": file.path, "size": file.size} for file in self.files],
            "bytes": sum(file.size for file in self.files),
            "left_out": [{"path": path, "reason": why} for path, why in self.left_out.items()],
        }


def push(
    out: str | Path,
    repository: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    with_panels: bool = False,
    notify: Notify = ignore,
    warn: Notify = ignore,
) -> Push:
    """`equalize push`: uploads a directory with a model card, under the access token of `hf auth login` or HF_TOKEN.

    Args:
        out: what `calibrate` or `finetune` wrote, or a directory saved by transformers or smp. It is not changed.
        repository: ORG/NAME; made if it does not exist.
        private: of a repository that is made; None means private. One that exists keeps what it is.
        revision: the branch to commit to, made if it does not exist.
        create_pr: open a pull request instead of committing to the branch.
        dry_run: only list the files; needs no network and no access token.
        with_panels: send pictures of the validation split too, and show them on the card.
        notify, warn: called with what a user should know, or may want to act on, a line at a time.

    Raises:
        InputError: `out` is no model, the name is malformed, or a file holds an access token.
        ResourceError: the Hub, the network or the access token.
    """
    if not HUB_ID.fullmatch(repository) or "@" in repository:
        raise InputError(repr(repository), "is no name of a repository", expected="ORG/NAME")
    token = get_token()
    branch = None if revision == constants.DEFAULT_REVISION else revision
    files, left_out = _files(Path(out).expanduser(), repository, branch, token, with_panels=with_panels)
    chosen = Push(
        repo=repository,
        revision=branch or constants.DEFAULT_REVISION,
        url=f"{constants.ENDPOINT}/{repository}" + (f"/tree/{branch}" if branch else ""),
        private=private is not False,
        dry_run=dry_run,
        files=tuple(files),
        left_out=left_out,
    )
    if dry_run:
        return chosen
    if token is None:
        raise ResourceError(repository, "no access token for the Hub was found", remedy=LOG_IN)
    with hub_errors(repository, token, warn):
        api = HfApi(token=token, library_name="equalize", library_version=__version__)
        chosen = replace(chosen, private=_prepare(api, repository, private, notify))
        return _commit(api, chosen, branch, create_pr)


def _files(
    out: Path, repository: str, branch: str | None, token: str | None, *, with_panels: bool
) -> tuple[list[OutgoingFile], dict[str, str]]:
    text = model_card(out, repository, branch, with_panels=with_panels)
    card = OutgoingFile(path=_CARD, source=text.encode(errors="replace"))  # paths in it may be no text
    files, left_out = choose_files(out, with_panels=with_panels)
    weights, index = weight_files(out)
    for path in (*weights, *([index] if index else [])):
        if path.name in left_out:
            remedy = "put the file itself there, under another name if it is one of a training state"
            raise InputError(path, f"would stay behind ({left_out[path.name]})", remedy=remedy)
    files = [card, *(without_local_paths(file) for file in files if file.path != _CARD)]
    refuse_tokens(files, token)
    return sorted(files, key=lambda file: file.path), left_out


def _prepare(api: HfApi, repository: str, private: bool | None, notify: Notify) -> bool | None:
    """Makes the repository if it does not exist. Returns whether it is private, None if the Hub does not tell."""
    wanted = private is not False
    api.create_repo(repository, private=wanted, exist_ok=True)
    found = api.model_info(repository).private
    if found is not None and found is not wanted:
        if private:
            remedy = "make it private in its settings, or drop --private"
            raise InputError(repository, "exists and is public", remedy=remedy)
        notify(f"{repository} exists and stays {'private' if found else 'public'}")
    return found


def _commit(api: HfApi, chosen: Push, branch: str | None, create_pr: bool) -> Push:
    if branch and not create_pr and not api.revision_exists(chosen.repo, branch):
        api.create_branch(chosen.repo, branch=branch)
    commit = api.create_commit(
        chosen.repo,
        [CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=file.source) for file in chosen.files],
        commit_message=f"Upload with equalize {__version__}",
        revision=branch,
        create_pr=create_pr,
    )
    return replace(
        chosen,
        revision=commit.pr_revision or chosen.revision,
        url=commit.pr_url or chosen.url,
        commit=commit.oid,
        pull_request=commit.pr_url,
    )
