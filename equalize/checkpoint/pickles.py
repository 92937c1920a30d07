"""One ``torch.save`` file -> tensors, by the restricted unpickler alone: nothing in the file is ever run.

``weights_only=True`` is given explicitly, so TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD has no say.
"""

import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equalize.checkpoint.inert import INERT
from equalize.checkpoint.pickle_scan import asks_for_code, foreign_global
from equalize.errors import CheckpointError

__all__ = ["NESTS", "TorchFile", "read_torch"]

NESTS = ("state_dict", "model", "model_state_dict", "net", "ema")
"""Keys under which training code puts a state dict; where a file has several, the first of them counts."""
_ALLOCATOR = b"bytearray"
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_LEGACY_HEAD = 1 << 24
_MOST_NESTS = 100  # a pickle may hold dicts in dicts without end


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
        return {key: value for key, value in meta.items() if isinstance(key, str)} if isinstance(meta, dict) else {}

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors of the state dict."""
        return {key: value for key, value in self.mapping.items() if isinstance(key, str) and isinstance(value, Tensor)}


def read_torch(path: Path) -> TorchFile:
    """Read a ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` file.

    Raises:
        CheckpointError: truncated, another format, or a pickle that asks for more than tensors.
    """
    with path.open("rb") as file:
        head = file.read(4)
    zipped = head == _ZIP
    if zipped:
        _check_archive(path)
    elif not head.startswith(_PICKLE):
        if (name := foreign_global(_pickle_bytes(path))) is not None:
            raise asks_for_code(path, name)
        raise CheckpointError(path, "is not a PyTorch file", expected="what torch.save writes, or safetensors")
    if _ALLOCATOR in _pickle_bytes(path):  # of what PyTorch lets a pickle call, the one that fills memory at will
        raise asks_for_code(path, _ALLOCATOR.decode())
    try:
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(INERT):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except pickle.UnpicklingError as error:
        raise _refusal(path, error) from error
    except (EOFError, MemoryError, OSError) as error:
        raise _damaged(path, error) from error
    except Exception as error:  # a hostile pickle can raise anything from inside torch.load
        raise _damaged(path, error) from error
    nest, *others = _find_states(path, content)
    found = TorchFile(content=content, nest=nest, others=tuple(others))
    _check_tensors(found, path)
    return found


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(path, "is truncated or damaged (no zip directory)", remedy="download it again") from error
    names = {member.filename.partition("/")[2] for member in members}
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise CheckpointError(
            path,
            "is a TorchScript archive, which holds code",
            remedy="save its weights instead: torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')",
        )
    bare = {member.filename for member in members} | names
    if len(names) != len(members):
        raise CheckpointError(path, "is a zip file with two members of one name, which torch.save never writes")
    if "data.pkl" not in names:
        if any("exported_program" in name or name.endswith("archive_format") for name in bare):
            raise CheckpointError(
                path,
                "is an exported program (.pt2), which holds code",
                remedy="save its weights instead: torch.save(torch.export.load(FILE).state_dict, 'weights.pth')",
            )
        raise CheckpointError(path, "is a zip file but not a PyTorch file (no data.pkl)")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(path, "is a zip file with compressed members, which torch.save never writes")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise CheckpointError(path, "promises more bytes than it has", remedy="download it again")


def _refusal(path: Path, error: Exception) -> CheckpointError:
    """A pickle the restricted unpickler stopped: by the name of a global, or because it is broken."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    name = named.group(1) if named else foreign_global(_pickle_bytes(path))
    if name is not None:
        return asks_for_code(path, name)
    if "Unsupported operand" in str(error):
        return CheckpointError(
            path, "is a pickle that PyTorch cannot read safely", remedy="save it again with torch.save and its defaults"
        )
    return _damaged(path, error)


def _pickle_bytes(path: Path) -> bytes:
    """The part of a file that is a pickle: of a legacy file, its beginning; nothing if the archive is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("data.pkl")]
            return archive.read(names[0]) if names else b""
    except zipfile.BadZipFile:
        with path.open("rb") as file:
            return file.read(_LEGACY_HEAD)
    except (OSError, ValueError, NotImplementedError, RuntimeError, EOFError, zlib.error):
        return b""


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
        if not plain:
            raise CheckpointError(path, f"holds {key!r}, which is not a plain dense tensor")
        if tensor.numel() * tensor.element_size() > size:
            raise CheckpointError(
                path, f"tensor {key!r} is larger than the file", got=f"shape {tuple(tensor.shape)} in {size} bytes"
            )


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
    seen.add(id(mapping))
    inner = [(key, *way) for key in NESTS for way in _states(mapping.get(key), seen)]
    if inner:
        yield from inner
    elif any(isinstance(value, Tensor) for value in mapping.values()):
        yield ()
