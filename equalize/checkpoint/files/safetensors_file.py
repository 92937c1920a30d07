"""One safetensors file -> tensors and metadata. The library checks the header; here its errors become one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from equalize.errors import CheckpointError
from equalize.messages import one_line

if TYPE_CHECKING:
    from torch import Tensor


def read_safetensors(path: Path) -> dict[str, "Tensor"]:
    """All tensors of a file, memory-mapped; a CheckpointError if it is truncated, damaged or of another format."""
    with _opened(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping


def read_keys(path: Path) -> list[str]:
    """The keys of a file, without torch; errors as of `read_safetensors`: the header says how long the file must be."""
    with _opened(path, "np") as file:
        return list(file.keys())


def read_metadata(path: Path) -> dict[str, str] | None:
    """The ``__metadata__`` of a file that has been read before."""
    with safe_open(path, framework="np") as file:
        metadata: dict[str, str] | None = file.metadata()
    return metadata


@contextmanager
def _opened(path: Path, framework: str) -> Iterator[Any]:
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        what = f"is truncated or damaged, or no safetensors file ({one_line(error)})"
        raise CheckpointError(path, what, remedy="download it again; torch.save's need the suffix .pth") from error
