"""Maps an exception to one line for stderr and an exit code.

One table, used once, in `main`. Types of heavy libraries are listed by name, so that this file need not import them.
"""

import errno
import signal
from typing import Any, NamedTuple

import typer

from equalize.cli.process import Terminated
from equalize.errors import EqualizeError, PeerError

# Characters that control a terminal instead of being shown, and marks that change the direction of writing.
_OBEYED = [*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_SHOWN = dict.fromkeys(_OBEYED, "\ufffd")

_MEMORY = "memory: there is not enough of it; use a smaller --batch-size or --size"
_NETWORK = "network: the Hub cannot be used ({reason}); try again, or name a local directory"
_SENTENCES = {
    "builtins.MemoryError": _MEMORY,
    "torch.OutOfMemoryError": "--device: its memory is full; use a smaller --batch-size or --size, or --device cpu",
    "torch.AcceleratorError": "--device: it failed ({reason}); use --device cpu",
    "huggingface_hub.errors.OfflineModeIsEnabled": _NETWORK,
    "httpx.HTTPError": _NETWORK,
    "httpx2.HTTPError": _NETWORK,
    "safetensors._safetensors_rust.SafetensorError": "safetensors: a file cannot be read or written ({reason}); "
    "check the disk and the file",
}
"""Exception types that mean exit code 3."""


class Failure(NamedTuple):
    """How a command ends that did not succeed: one line for stderr, empty where another process has printed it."""

    sentence: str
    exit_code: int


def visible(text: str) -> str:
    """Text (possibly with names from untrusted files) without terminal controls; line breaks and tabs stay."""
    return text.translate(_SHOWN)


def explain(error: BaseException, signal_number: int | None = None) -> Failure:
    """The sentence and exit code of whatever reached `main`; a signal that came before is the reason for any of it."""
    if isinstance(error, PeerError):
        return Failure("", error.code)
    if signal_number is not None or isinstance(error, KeyboardInterrupt | Terminated):
        default = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        return Failure("interrupted", 128 + (signal_number or default))
    sentence, exit_code = _explain(error)
    return Failure(f"error: {visible(' '.join(sentence.split()))}", exit_code)


def _explain(error: BaseException) -> tuple[str, int]:
    if isinstance(error, EqualizeError):
        return str(error), error.exit_code
    if hasattr(error, "format_message"):  # a usage error, whose class Typer does not export
        return _usage(error), 2
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    for kind in type(error).__mro__:
        if sentence := _SENTENCES.get(f"{kind.__module__}.{kind.__qualname__}"):
            return sentence.format(reason=reason), 3
    if isinstance(error, OSError):
        return _system(error, reason), 3
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
        return _MEMORY, 3
    return f"equalize: a bug ({type(error).__name__}: {error}); please report it with the traceback above", 1


def _system(error: OSError, reason: str) -> str:
    where = error.filename if error.filename is not None else "system"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}: the disk is full; make room and try again"
    if isinstance(error, PermissionError):
        return f"{where}: permission denied; change its permissions or use another path"
    return f"{where}: {error.strerror or reason}"


def _usage(error: Any) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "equalize"
    parameter = getattr(error, "param", None)
    where, what = command, error.format_message()
    if isinstance(error, typer.BadParameter) and error.message:  # a value; it is None or "" where one is missing
        named = max(parameter.opts, key=len) if parameter is not None else command
        where, what = str(error.param_hint or named), error.message.removeprefix("Value error, ")
    return f"{where}: {what[:1].lower()}{what[1:].rstrip('.')}; see {command} --help"
