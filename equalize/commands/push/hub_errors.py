"""Failures of the Hub's client as one line that says what to do. No line holds the access token."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from equalize.errors import EqualizeError, InputError, ResourceError
from equalize.messages import Notify

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_AGAIN = "push again; what has arrived is not sent twice"
_WRITE = "use one with write permission (https://huggingface.co/settings/tokens), or another name"
_BY_STATUS: dict[int, tuple[str, str | None]] = {
    401: ("the Hub does not accept the access token", "log in again with `hf auth login`, or renew HF_TOKEN"),
    403: ("the access token may not write here", _WRITE),
    404: ("the Hub has no such repository, or hides it from this access token", "check the name and the permissions"),
    409: ("the Hub reports a conflict with another change", "push again in a moment"),
    429: ("the Hub limits the rate of requests", "wait a few minutes and push again"),
}
_TROUBLE = ("the Hub has trouble", "try again later")
_LONGEST = 160  # characters of what the server says

_HTTPError: type[Exception] = HfHubHTTPError.__mro__[1]  # of httpx or httpx2, as this version of the client uses


@contextmanager
def hub_errors(repository: str, token: str, warn: Notify) -> Iterator[None]:
    """Turns what the client raises into an `EqualizeError` about `repository`, and passes on what it warns of.

    Raises:
        ResourceError: the Hub, the network or the access token. InputError: the Hub refuses the card's metadata.
    """
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)  # the Hub's remarks on the card's metadata
            yield
    except EqualizeError:
        raise
    except (_HTTPError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise _explain(error, repository, token) from None  # the client's messages may repeat the token
    for warning in caught:
        warn(" ".join(str(warning.message).split()))


def _explain(error: BaseException, repository: str, token: str) -> EqualizeError:
    if isinstance(error, OfflineModeIsEnabled):
        return ResourceError(repository, "the Hub is switched off", remedy="unset HF_HUB_OFFLINE")
    if str(error).startswith("Invalid metadata in README.md"):
        reason = _line(str(error).partition(".md.")[2], token)
        return InputError("README.md", f"the Hub refuses its metadata ({reason})")
    chain = list(_chain(error))
    refusal = next((each for each in chain if isinstance(each, HfHubHTTPError)), None)
    if refusal is not None:
        status, said = refusal.response.status_code, _line(refusal.server_message or "", token)
        what, remedy = _BY_STATUS.get(status, _TROUBLE if status >= 500 else ("the Hub refuses the request", None))
        return ResourceError(repository, f"{what} (HTTP {status}{': ' + said if said else ''})", remedy=remedy)
    network = next((each for each in chain if isinstance(each, _HTTPError | ConnectionError | TimeoutError)), None)
    line = _line(network or chain[-1], token) or type(error).__name__
    if network is not None:
        what = f"the connection to {constants.ENDPOINT} failed ({line})"
        return ResourceError(repository, what, remedy=f"check the network and {_AGAIN}")
    return ResourceError(repository, f"the upload failed ({line})", remedy=_AGAIN)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _line(text: object, token: str) -> str:
    line = " ".join(str(text).split()).replace(token, "***")
    line = re.sub(r"\b(hf|api_org)_[A-Za-z0-9]{8,}", "***", line)
    return re.sub(r"(https?://[^\s?]*)\?\S*", r"\1", line)[:_LONGEST]  # signed addresses carry a key behind the ?
