"""One ``torch.save`` file -> tensors, by torch's restricted unpickler: nothing in the file is ever run.

``weights_only=True`` is passed explicitly, so TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD cannot turn it off. A file can still
cost time and memory in proportion to the size of its pickle, which `archive` limits.
"""

import pickle
import re
import warnings
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equalize.checkpoint.files.pickle_guard import asks_for_code, foreign_global
from equalize.checkpoint.files.pickle_stubs import INERT
from equalize.checkpoint.files.zip_archive import read_pickle
from equalize.errors import CheckpointError

__all__ = ["NESTS", "TorchFile", "read_torch"]

NESTS = (
    *("state_dict", "model", "model_state_dict", "net", "network", "module", "params", "weights", "student"),
    *("ema", "model_ema", "ema_state_dict", "state_dict_ema", "params_ema", "teacher"),
)
"""Keys under which training code puts a state dict; where a file has several, the first of them counts."""
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_LEGACY_HEAD = 1 << 24
_LEGACY_MAGIC, _LEGACY_BEGINNING = (0x1950A86A20F9469CFC6C).to_bytes(10, "little"), 32
_UNPACK, _CONVERT = "unpack it first", "convert it to PyTorch first"
_OTHERS = (
    (8, b'{"', "a safetensors file", "give it the suffix .safetensors"),
    (0, b"\x89HDF", "an HDF5 file (.h5)", _CONVERT),
    (0, b"\x93NUMPY", "a NumPy array (.npy)", "save tensors by key with torch.save"),
    (0, b"GGUF", "a GGUF file", _CONVERT),
    (4, b"pytorch", "an ONNX model", "name the checkpoint that it was exported from"),
    (0, b"\x1f\x8b", "compressed (gzip)", _UNPACK),
    (0, b"BZh", "compressed (bzip2)", _UNPACK),
    (0, b"\xfd7zXZ", "compressed (xz)", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "compressed (zstd)", _UNPACK),
    (0, b"7z\xbc\xaf", "an archive (7z)", _UNPACK),
    (0, b"Rar!", "an archive (rar)", _UNPACK),
    (257, b"ustar", "an archive (tar)", _UNPACK),
)
"""Where a file of another kind has which bytes, what it is, and what to do."""
_MOST_NESTS = 100  # dicts in dicts; the search recurses


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchFile:
    """What a ``torch.save`` file holds."""

    content: Any
    """The unpickled object, to be saved again with other tensors in ``state``'s place."""
    nest: tuple[str, ...]
    """The keys that lead from ``content`` to the state dict."""
    others: tuple[tuple[str, ...], ...] = ()
    """Where further state dicts lie, which are left as they are: often the average of the weights, beside them."""

    @property
    def mapping(self) -> MutableMapping[str, Any]:
        """The state dict inside ``content``, itself: writing to it changes ``content``."""
        inner = self.content
        for key in self.nest:
            inner = inner[key]
        assert isinstance(inner, MutableMapping)
        return inner

    @property
    def meta(self) -> dict[str, Any]:
        """What stands beside the state dict under ``meta``; nothing where that is something else."""
        meta = self.content.get("meta") if self.nest else None
        if not isinstance(meta, dict) or _hides_methods(meta):
            return {}
        return {key: value for key, value in meta.items() if isinstance(key, str)}

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors of the state dict."""
        return {key: value for key, value in self.mapping.items() if isinstance(key, str) and isinstance(value, Tensor)}


def read_torch(path: Path) -> TorchFile:
    """Read a ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` file.

    Raises:
        CheckpointError: truncated, another format, or a pickle that asks for more than tensors.
    """
    content = _unpickled(path)
    nest, *others = _find_states(path, content)
    found = TorchFile(content=content, nest=nest, others=tuple(others))
    _check_tensors(found, path)
    return found


def _unpickled(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(len(_ZIP))
        zipped = start == _ZIP
        start = read_pickle(path) if zipped else start + file.read(_LEGACY_HEAD)
    if not zipped and _LEGACY_MAGIC not in start[:_LEGACY_BEGINNING]:
        raise _other_kind(path, start)
    try:
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(INERT):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except pickle.UnpicklingError as error:
        raise _refusal(path, error, start) from error
    except Exception as error:  # a hostile pickle can raise anything from inside torch.load
        raise _damaged(path, error) from error


def _other_kind(path: Path, start: bytes) -> CheckpointError:
    for at, mark, kind, remedy in _OTHERS:
        if start.startswith(mark, at):
            return CheckpointError(path, f"is {kind}, not a PyTorch file", remedy=remedy)
    if (name := foreign_global(start)) is not None:
        return asks_for_code(path, name)
    what = "is a pickle that torch.save did not write" if start.startswith(_PICKLE) else "is not a PyTorch file"
    return CheckpointError(path, what, expected="what torch.save writes, or safetensors")


def _refusal(path: Path, error: Exception, start: bytes) -> CheckpointError:
    """A pickle the restricted unpickler stopped: by the name of a global, or because it is broken."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    unsupported = "Unsupported operand" in str(error)
    name = named.group(1) if named else foreign_global(start) if unsupported else None
    if name is not None:
        return asks_for_code(path, name)
    if unsupported:
        return CheckpointError(
            path, "is a pickle that PyTorch cannot read safely", remedy="save it again with torch.save and its defaults"
        )
    return _damaged(path, error)


def _damaged(path: Path, error: BaseException) -> CheckpointError:
    found = re.search(r"WeightsUnpickler error: *(.+)", str(error))
    line = found.group(1) if found else next(iter(str(error).splitlines()), "")
    return CheckpointError(
        path, f"is truncated or damaged ({line.strip()[:120] or type(error).__name__})", remedy="download it again"
    )


def _check_tensors(file: TorchFile, path: Path) -> None:
    """Refuse tensors that are larger than the file they came from, or no plain tensors at all."""
    size = path.stat().st_size
    for key, tensor in file.state.items():
        plain = tensor.device.type == "cpu" and tensor.layout == torch.strided and not tensor.is_quantized
        if not plain or _hides_methods(tensor):
            raise CheckpointError(path, f"holds {key!r}, which is not a plain dense tensor")
        if tensor.numel() * tensor.element_size() > size:
            raise CheckpointError(
                path, f"tensor {key!r} is larger than the file", got=f"shape {tuple(tensor.shape)} in {size} bytes"
            )


def _hides_methods(value: object) -> bool:
    """Whether a pickle gave an object attributes in the place of its methods, as it can to OrderedDicts and tensors."""
    return any(hasattr(type(value), str(name)) for name in getattr(value, "__dict__", ()))


def _find_states(path: Path, content: object) -> list[tuple[str, ...]]:
    found = list(_states(content, set()))
    if found:
        return found
    got = f"a {type(content).__name__}"
    if isinstance(content, MutableMapping):
        got = "the keys " + ", ".join(repr(key) for key in list(content)[:5]) if content else "an empty dict"
    raise CheckpointError(
        path, "holds no state dict", got=got, expected=f"tensors by key, also under {', '.join(NESTS)}"
    )


def _states(mapping: object, seen: set[int]) -> Iterator[tuple[str, ...]]:
    """The ways to the state dicts in ``mapping``, innermost first: a dict with one in it is none itself."""
    if not isinstance(mapping, MutableMapping) or id(mapping) in seen or len(seen) > _MOST_NESTS:
        return
    if _hides_methods(mapping):
        return
    seen.add(id(mapping))
    inner = [(key, *way) for key in NESTS for way in _states(mapping.get(key), seen)]
    if inner:
        yield from inner
    elif any(isinstance(value, Tensor) for value in mapping.values()):
        yield ()
