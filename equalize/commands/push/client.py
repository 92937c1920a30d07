"""The Hub's client on a leash: what it raises, logs and warns of becomes lines that say what to do.

No line ever holds the access token.
"""

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import JSONDecodeError

from huggingface_hub import constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging as client_logging

from equalize.errors import EqualizeError, InputError, ResourceError

__all__ = ["hub_errors", "quiet_client", "status_of", "warnings_to"]

# The root of the HTTP library's own errors, whichever library this version of the client is built on.
_HTTPError: type[Exception] = HfHubHTTPError.__mro__[1]
_TOKENS_PAGE = "https://huggingface.co/settings/tokens"
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_AGAIN = "push again; what has arrived is not sent twice"
_LONGEST = 160  # characters of what the server says

_BY_STATUS: dict[int, tuple[str, str]] = {
    401: ("the Hub does not accept the access token", "log in again with `hf auth login`, or renew HF_TOKEN"),
    402: ("the Hub asks for payment", "see the billing page of the account"),
    403: ("the access token may not write here", f"use one with write permission ({_TOKENS_PAGE}), or another name"),
    404: ("the Hub has no such repository, or hides it from this access token", "check the name and the permissions"),
    409: ("the Hub reports a conflict with another change", "push again in a moment"),
    412: ("the repository was changed at the same time", "push again"),
    413: ("a file is too large for the Hub", "write smaller shards"),
    429: ("the Hub limits the rate of requests", "wait a few minutes and push again"),
}


@contextmanager
def hub_errors(repository: str, token: str | None = None) -> Iterator[None]:
    """Turns whatever the client raises inside into an `EqualizeError` about `repository`.

    Args:
        repository: ORG/NAME.
        token: what must not be shown, whoever echoes it.

    Raises:
        ResourceError: the Hub, the network or the access token. InputError: the Hub refuses the card's metadata.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, EqualizeError) or not _is_the_clients(error):
            raise
        explained = _explain(error, repository, token)
        # A server that repeats the token would have it in its message: then the traceback has to go as well.
        raise explained from (None if _holds(error, token) else error)


@contextmanager
def quiet_client() -> Iterator[None]:
    """Keeps the client from logging its retries: they name signed addresses, and failures get a line of ours."""
    before = client_logging.get_verbosity()
    client_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        client_logging.set_verbosity(before)


@contextmanager
def warnings_to(warn: Callable[[str], None]) -> Iterator[None]:
    """What the client warns of, such as the Hub's remarks on the card's metadata, in our own lines."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")  # what the client does to its own libraries
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        warn(" ".join(str(warning.message).split()))


def _is_the_clients(error: Exception) -> bool:
    """Whether it comes from the client, its libraries or the system, and not from a mistake of our own."""
    library = type(error).__module__.partition(".")[0] in ("huggingface_hub", "hf_xet", "httpx", "httpx2")
    return library or isinstance(error, _HTTPError | OSError | RuntimeError | ValueError | KeyError)


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status that an error, or what caused it, came with."""
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return int(error.response.status_code)
        error = error.__cause__ or error.__context__
    return None


def _explain(error: Exception, repository: str, token: str | None) -> EqualizeError:
    if isinstance(error, LocalTokenNotFoundError):
        return ResourceError(repository, "no access token for the Hub was found", remedy=_LOG_IN)
    if isinstance(error, OfflineModeIsEnabled):
        return ResourceError(repository, "the Hub is switched off", remedy="unset HF_HUB_OFFLINE")
    if isinstance(error, ValueError) and str(error).startswith("Invalid metadata in README.md"):
        return InputError(
            "README.md", f"the Hub refuses its metadata ({_line(str(error).partition('.md.')[2], token)})"
        )
    status = status_of(error)
    if status is not None:
        return _refused(error, status, repository, token)
    if _is_of_network(error):
        return ResourceError(
            repository,
            f"the connection to {constants.ENDPOINT} failed ({_line(_root(error), token) or type(error).__name__})",
            remedy=f"check the network and {_AGAIN}",
        )
    told = _line(_root(error), token) or type(error).__name__
    if isinstance(error, JSONDecodeError | KeyError):  # some other server's page, such as a hotel's
        return ResourceError(repository, f"the Hub gave an answer that its client cannot use ({told})")
    return ResourceError(repository, f"the upload failed ({told})", remedy=_AGAIN)


def _refused(error: Exception, status: int, repository: str, token: str | None) -> ResourceError:
    said = _line(_said(error) or "", token)
    if isinstance(error, RevisionNotFoundError):
        return ResourceError(repository, "the Hub has no such revision of it", remedy="check --revision")
    default = "the Hub has trouble" if status >= 500 else "the Hub refuses the request"
    what, remedy = _BY_STATUS.get(status, (default, "try again later" if status >= 500 else None))
    return ResourceError(repository, f"{what} (HTTP {status}{': ' + said if said else ''})", remedy=remedy)


def _said(error: BaseException | None) -> str | None:
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return error.server_message
        error = error.__cause__ or error.__context__
    return None


def _is_of_network(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, _HTTPError | ConnectionError | TimeoutError):
            return True
        error = error.__cause__
    return False


def _root(error: BaseException) -> BaseException:
    """The HTTP library's own error below the client's."""
    while error.__cause__ is not None and not isinstance(error, _HTTPError):
        error = error.__cause__
    return error


def _line(text: object, token: str | None) -> str:
    line = " ".join(str(text).split())
    line = line.replace(token, "***") if token else line
    line = re.sub(r"\b(hf|api_org)_[A-Za-z0-9]{8,}", "***", line)
    return re.sub(r"(https?://[^\s?]*)\?\S*", r"\1", line)[:_LONGEST]  # signed addresses carry a key behind the ?


def _holds(error: BaseException, token: str | None) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        if token and token in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
