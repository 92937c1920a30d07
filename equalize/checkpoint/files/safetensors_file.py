"""One safetensors file -> tensors and metadata. The library checks the header; here its errors become one line."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from equalize.errors import CheckpointError

__all__ = ["read_metadata", "read_safetensors"]

_LONGEST_HEADER = 100_000_000  # the library's own limit
_TORCH_FILES = (b"PK\x03\x04", b"\x80\x02")  # a zip file, a pickle


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, memory-mapped.

    Raises:
        CheckpointError: the file is truncated, damaged or of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise _refusal(path, error) from error


def read_metadata(path: Path) -> dict[str, str] | None:
    """The ``__metadata__`` of a file that has been read before."""
    with safe_open(path, framework="pt") as file:
        metadata: dict[str, str] | None = file.metadata()
    return metadata


def _refusal(path: Path, error: BaseException) -> CheckpointError:
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith(_TORCH_FILES) and not head.endswith(b"{"):
        return CheckpointError(path, "is a PyTorch file, not safetensors", remedy="give it the suffix .pth")
    size, promised = path.stat().st_size, _promised_size(path)
    if size < promised:
        return CheckpointError(
            path, "is truncated", got=f"{size} bytes", expected=f"at least {promised}", remedy="download it again"
        )
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return CheckpointError(path, f"is not a readable safetensors file ({line[:160]})")


def _promised_size(path: Path) -> int:
    """How many bytes a file must have at least by what can be read of its header."""
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > _LONGEST_HEADER:
            return 8
        raw = file.read(length)
    try:
        entries = [entry for key, entry in json.loads(raw).items() if key != "__metadata__"]
        return 8 + length + max((int(entry["data_offsets"][1]) for entry in entries), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError):
        return 8 + length
