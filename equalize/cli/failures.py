"""From an exception to the one line a user reads and the exit code a program reads.

One table, looked into once, in `main`. Types of heavy libraries stand in it by name: whoever raised them has imported
them, and this file need not.
"""

import errno
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import typer

from equalize.cli.process import Terminated
from equalize.errors import EqualizeError, PeerError

__all__ = ["Failure", "explain", "visible"]

_LONGEST_LINE = 4000
# What a terminal obeys instead of showing it: controls, and marks that turn the direction of writing.
_OBEYED = [*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_SHOWN = dict.fromkeys(_OBEYED, "\ufffd")


def visible(text: str) -> str:
    """Text that may hold names from a stranger's file, harmless to a terminal; line breaks and tabs stay."""
    return text.translate(_SHOWN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How a command ends that did not succeed.

    Attributes:
        sentence: one line for stderr; empty where another process has said it.
        is_bug: whether the traceback belongs to it.
    """

    sentence: str
    exit_code: int
    is_bug: bool = False


def explain(error: BaseException, signal_number: int | None = None) -> Failure:
    """The sentence and exit code of an exception.

    Args:
        error: whatever reached `main`.
        signal_number: the signal that had arrived before, which then is the reason, whatever the exception says.
    """
    if isinstance(error, PeerError):
        return Failure(sentence="", exit_code=error.code)
    if signal_number is not None or isinstance(error, KeyboardInterrupt | Terminated):
        default = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        return Failure(sentence="interrupted", exit_code=128 + (signal_number or default))
    if isinstance(error, EqualizeError):
        return _failure(str(error), error.exit_code)
    if hasattr(error, "format_message"):  # what Typer refuses; the class is Click's or Typer's, by version
        return _failure(_usage(error), 2)
    if isinstance(error, OSError) and not _names(error) & _SENTENCES.keys():
        return _failure(_system(error), 3)
    for name in _names(error):
        if name in _SENTENCES:
            return _failure(_SENTENCES[name](error), 3)
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
        return _failure(_memory(error), 3)
    kind = type(error).__name__
    return Failure(
        sentence=_line(f"equalize: a bug ({kind}: {error}); please report it with the traceback above"),
        exit_code=1,
        is_bug=True,
    )


def _failure(sentence: str, exit_code: int) -> Failure:
    return Failure(sentence=_line(sentence), exit_code=exit_code)


def _line(sentence: str) -> str:
    line = f"error: {visible(' '.join(sentence.split()))}"
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]} …"


def _names(error: BaseException) -> set[str]:
    return {f"{each.__module__}.{each.__qualname__}" for each in type(error).__mro__}


def _memory(error: BaseException) -> str:
    return "memory: there is not enough of it; use a smaller --batch-size or --size"


def _device_memory(error: BaseException) -> str:
    return "--device: its memory is full; use a smaller --batch-size or --size, or --device cpu"


def _network(error: BaseException) -> str:
    return f"network: the Hub cannot be used ({_first_line(error)}); try again, or name a local directory"


def _safetensors(error: BaseException) -> str:
    return f"safetensors: a file cannot be read or written ({_first_line(error)}); check the disk and the file"


_SENTENCES: dict[str, Callable[[BaseException], str]] = {
    "builtins.MemoryError": _memory,
    "torch.OutOfMemoryError": _device_memory,
    "torch.AcceleratorError": lambda error: f"--device: it failed ({_first_line(error)}); use --device cpu",
    "huggingface_hub.errors.HfHubHTTPError": _network,
    "huggingface_hub.errors.OfflineModeIsEnabled": _network,
    "httpx.HTTPError": _network,
    "httpx2.HTTPError": _network,
    "requests.exceptions.RequestException": _network,
    "safetensors._safetensors_rust.SafetensorError": _safetensors,
}


def _system(error: OSError) -> str:
    where = error.filename if error.filename is not None else "system"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}: the disk is full; make room and try again"
    if isinstance(error, PermissionError):
        return f"{where}: permission denied; change its permissions or use another path"
    return f"{where}: {error.strerror or _first_line(error)}"


def _usage(error: Any) -> str:
    """A refused command line; `error` is Click's UsageError or a subclass."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "equalize"
    parameter = getattr(error, "param", None)
    where, what = command, error.format_message()
    if isinstance(error, typer.BadParameter) and error.message:  # a value; it is None or "" where one is missing
        named = max(parameter.opts, key=len) if parameter is not None else command
        where, what = str(error.param_hint or named), error.message.removeprefix("Value error, ")
    return f"{where}: {what[:1].lower()}{what[1:].rstrip('.')}; see {command} --help"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
