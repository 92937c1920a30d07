"""One safetensors file -> tensors, its header checked against the file's real size first."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from equalize.errors import CheckpointError

__all__ = ["read_header", "read_safetensors"]

_MOST_AXES = 64  # no operator takes more
_LONGEST_HEADER, _MOST_TENSORS = 1 << 23, 1 << 15  # ten times what the largest models have
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64,
    "I64": 64, "U64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, memory-mapped.

    Raises:
        CheckpointError: the file is damaged.
    """
    read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(path, f"is not a readable safetensors file ({_first_line(error)})") from error


def read_header(path: Path) -> dict[str, dict[str, object]]:
    """The header of a safetensors file after checking it: ``__metadata__`` and one entry a tensor.

    Raises:
        CheckpointError: truncated, not safetensors, or offsets that overlap, leave holes or leave the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length.to_bytes(8, "little").startswith((b"PK", b"\x80\x02")) and file.read(1) != b"{":
            raise CheckpointError(path, "is a PyTorch file, not safetensors", remedy="give it the suffix .pth")
        if size < 8 or length > _LONGEST_HEADER:
            raise CheckpointError(path, "is not a safetensors file", got=f"a header of {length} bytes")
        if 8 + length > size:
            raise _truncated(path, size, f"at least {8 + length}")
        file.seek(8)
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"is not a safetensors file (header: {_first_line(error)})") from error
    if not isinstance(header, dict):
        raise CheckpointError(path, "is not a safetensors file (header is not an object)")
    _check_offsets(path, header, size - 8 - length)
    return header


def _check_offsets(path: Path, header: Mapping[str, object], room: int) -> None:
    """Tensors must fill the data part exactly: one after the other, each as long as dtype and shape say."""
    if len(header) > _MOST_TENSORS:
        raise CheckpointError(path, f"promises {len(header)} tensors", expected=f"at most {_MOST_TENSORS}")
    spans: list[tuple[int, int, str]] = []
    for key, entry in header.items():
        if key != "__metadata__":
            spans.append((*_span(path, key, entry), key))
    end = 0
    for start, stop, key in sorted(spans):
        if start != end:
            raise CheckpointError(path, f"tensor {key!r} {'overlaps another' if start < end else 'follows a hole'}")
        end = stop
    if end > room:
        raise _truncated(path, os.path.getsize(path), os.path.getsize(path) - room + end)
    if end < room:
        raise CheckpointError(path, f"has {room - end} bytes that belong to no tensor")


def _span(path: Path, key: str, entry: object) -> tuple[int, int]:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)]} if (
            len(shape) <= _MOST_AXES and all(type(n) is int and 0 <= n < 1 << 63 for n in shape) and 0 <= start <= stop
        ):
            if dtype not in _BITS:
                raise CheckpointError(path, f"tensor {key!r} has the unknown dtype {dtype[:20]!r}")
            if (stop - start) * 8 != math.prod(shape) * _BITS[dtype]:
                raise CheckpointError(path, f"tensor {key!r} has {stop - start} bytes", expected=f"{dtype} {shape}")
            return start, stop
    raise CheckpointError(path, f"tensor {key!r} has a broken header entry")


def _truncated(path: Path, size: int, promised: object) -> CheckpointError:
    return CheckpointError(
        path, "is truncated", got=f"{size} bytes", expected=f"{promised}", remedy="download it again"
    )


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a key appears twice")
    return unique


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
