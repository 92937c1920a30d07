"""From a written checkpoint to a repository on the Hugging Face Hub.

In this order: what is asked for is checked, the files are chosen, the card is written; the access token and the
repository are checked; then everything goes in one commit. Whatever fails, no half of a checkpoint is visible.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from equalize.checkpoint.files.weights import weight_files
from equalize.commands.push.card import model_card
from equalize.commands.push.client import hub_errors, quiet_client, status_of, warnings_to
from equalize.commands.push.facts import read_facts
from equalize.commands.push.outgoing import LeftOut, OutgoingFile, choose_files, refuse_tokens
from equalize.commands.push.places import without_places
from equalize.errors import InputError, ResourceError
from equalize.version import __version__

__all__ = ["Push", "push"]

_CARD = "README.md"
_MAIN = "main"
_REVISION = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """What went to the Hub, or would go.

    Attributes:
        repo: ORG/NAME.
        revision: the branch, or `refs/pr/N` of a pull request.
        url: where to look at it.
        private: whether the repository is, or would be if it were made; None if the Hub does not tell.
        files: what went. left_out: what stayed, and why.
        commit: its id; None in a dry run.
        pull_request: its address, if one was opened.
    """

    repo: str
    revision: str
    url: str
    private: bool | None
    dry_run: bool
    files: tuple[OutgoingFile, ...]
    left_out: tuple[LeftOut, ...]
    commit: str | None = None
    pull_request: str | None = None

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
            "left_out": [asdict(file) for file in self.left_out],
        }


def push(
    out: str | Path,
    repository: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    say: Say = lambda line: None,
    warn: Say = lambda line: None,
) -> Push:
    """`equalize push`: uploads a directory with a model card, under the access token of `hf auth login` or HF_TOKEN.

    Files go out as they are, but for those that record paths on this machine: of these only the last names go.

    Args:
        out: what `calibrate` or `finetune` wrote, or a directory saved by transformers or smp. It is not changed.
        repository: ORG/NAME; made if it does not exist.
        private: of a repository that is made; None means private. One that exists keeps what it is.
        revision: the branch to commit to, made if it does not exist.
        create_pr: open a pull request instead of committing to the branch.
        dry_run: list the files and ask nobody; needs no network and no access token.
        say: called with what a user should know, a line at a time.
        warn: with what a user may want to act on.

    Raises:
        InputError: `out` is no model, the names are malformed, or a file holds an access token.
        ResourceError: the Hub, the network or the access token.
    """
    _check_names(repository, revision)
    out = Path(out).expanduser()
    with hub_errors(repository):
        token = get_token()
    branch = None if revision == _MAIN else revision
    files, left_out = _files(out, repository, branch, token)
    chosen = Push(
        repo=repository,
        revision=revision or _MAIN,
        url=f"{constants.ENDPOINT}/{repository}" + (f"/tree/{branch}" if branch else ""),
        private=private is not False,
        dry_run=dry_run,
        files=tuple(files),
        left_out=tuple(left_out),
    )
    if dry_run:
        return chosen
    with hub_errors(repository, token), quiet_client(), warnings_to(warn):
        if token is None:
            raise LocalTokenNotFoundError
        api = HfApi(token=token, library_name="equalize", library_version=__version__)
        _check_token(api, repository)
        visible = _prepare(api, repository, private, say)
        commit = _commit(api, chosen, branch, create_pr)
    return replace(
        chosen,
        revision=commit.pr_revision or chosen.revision,
        url=commit.pr_url or chosen.url,
        private=visible,
        commit=commit.oid,
        pull_request=commit.pr_url,
    )


def _check_names(repository: str, revision: str | None) -> None:
    rule = "ORG/NAME of letters, digits and single - _ ."
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(repr(repository), "is no name of a repository", expected=rule) from error
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise InputError(repr(repository), "is no name of a repository", expected=rule)
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise InputError("--revision", "is no name of a branch", got=repr(revision))


def _files(
    out: Path, repository: str, branch: str | None, token: str | None
) -> tuple[list[OutgoingFile], list[LeftOut]]:
    facts = read_facts(out)
    files, left_out = choose_files(out)
    there = {file.path for file in files}
    weights, index = weight_files(out)
    missing = [path.name for path in (*weights, *([index] if index else [])) if path.name not in there]
    if missing:
        raise InputError(
            out / missing[0],
            "is a symbolic link or has the name of a training state",
            remedy="put the file itself there",
        )
    if _CARD not in there:  # a link is not followed, for its text neither
        facts = replace(facts, readme=None)
    card = model_card(facts, repository, branch).encode()
    files = [without_places(file) for file in files if file.path != _CARD]
    files.append(OutgoingFile(path=_CARD, size=len(card), source=card))
    refuse_tokens(files, token)
    return sorted(files, key=lambda file: file.path), left_out


def _check_token(api: HfApi, repository: str) -> None:
    """Demands an access token that is valid and may write. Fine-grained ones are judged by the Hub, name by name."""
    try:
        user = api.whoami()
    except HfHubHTTPError as error:
        if status_of(error) != 404:  # a Hub of one's own may not answer this
            raise
        return
    role = (user.get("auth") or {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ResourceError(
            repository,
            f"the access token of {user.get('name')} may only read",
            remedy="log in with one that may write: https://huggingface.co/settings/tokens",
        )


def _prepare(api: HfApi, repository: str, private: bool | None, say: Say) -> bool | None:
    """Makes the repository, or finds it. Returns whether it is private, None if the Hub does not tell."""
    wanted = private is not False
    try:
        api.create_repo(repository, private=wanted)
    except HfHubHTTPError as error:
        if status_of(error) not in (401, 402, 403, 409):
            raise
        found = _visibility(api, repository)
        if found is None and status_of(error) != 409:  # 409 says that it exists
            raise
    else:
        return wanted
    if found is False and private is True:
        raise InputError(
            repository, "exists and is public", remedy="make it private in its settings, or drop --private"
        )
    if found is not None and found is not private:
        say(f"{repository} exists and stays {'private' if found else 'public'}")
    return found


def _visibility(api: HfApi, repository: str) -> bool | None:
    try:
        return api.model_info(repository).private
    except HfHubHTTPError:
        return None


def _commit(api: HfApi, chosen: Push, branch: str | None, create_pr: bool) -> CommitInfo:
    """All files in one commit: the Hub grants or denies it before the first of them is sent."""

    def send() -> CommitInfo:
        return api.create_commit(
            chosen.repo,
            _operations(chosen.files),
            commit_message=f"Upload with equalize {__version__}",
            revision=branch,
            create_pr=create_pr,
        )

    try:
        return send()
    except RevisionNotFoundError:
        if branch is None or create_pr:
            raise
    api.create_branch(chosen.repo, branch=branch, exist_ok=True)
    return send()


def _operations(files: Sequence[OutgoingFile]) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=file.source) for file in files]
