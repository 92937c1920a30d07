"""One safetensors file -> tensors and metadata. The library checks the header; here its errors become one line."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from equalize.errors import CheckpointError
from equalize.messages import one_line


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, memory-mapped; a CheckpointError if it is truncated, damaged or of another format."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        what = f"is truncated or damaged, or no safetensors file ({one_line(error)})"
        raise CheckpointError(path, what, remedy="download it again; torch.save's need the suffix .pth") from error


def read_metadata(path: Path) -> dict[str, str] | None:
    """The ``__metadata__`` of a file that has been read before."""
    with safe_open(path, framework="pt") as file:
        metadata: dict[str, str] | None = file.metadata()
    return metadata
