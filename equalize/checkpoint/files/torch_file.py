"""One ``torch.save`` file -> tensors, by torch's restricted unpickler: no code in the file is run.

``weights_only=True`` is passed explicitly, so TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD cannot turn it off. A file can still
cost time and memory in proportion to the size of its pickle, which `zip_archive` limits.
"""

import pickle
import re
import warnings
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equalize.checkpoint.files.pickle_stubs import SAFE_GLOBALS
from equalize.checkpoint.files.zip_archive import check_archive
from equalize.errors import CheckpointError

NESTS = (
    *("state_dict", "model", "model_state_dict", "net", "network", "module", "params", "weights", "student"),
    *("ema", "model_ema", "ema_state_dict", "state_dict_ema", "params_ema", "teacher"),
)
"""Keys under which training code puts a state dict; where a file has several, the first of them counts."""
_TRAINING_STATE = re.compile(r"optimizer|scheduler|(^|_)(optim|sched|scaler|rng)s?(_|$)")
_DEEPEST_NEST = 4
_Way = tuple[str, ...]
"""The keys that lead to a state dict."""
_ZIP = b"PK\x03\x04"
_LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
_REMEDY = "save the state dict alone: torch.save(model.state_dict(), 'weights.pth')"


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchFile:
    """What a ``torch.save`` file holds."""

    content: Any
    """The unpickled object, to be saved again with other tensors in ``state``'s place."""
    nest: _Way
    """The keys that lead from ``content`` to the state dict."""
    others: tuple[_Way, ...] = ()
    """Key paths of further state dicts, such as averaged weights, which are left as they are."""

    @property
    def mapping(self) -> MutableMapping[str, Any]:
        """The state dict inside ``content`` (not a copy): writing to it changes ``content``."""
        inner = _at(self.content, self.nest)
        assert isinstance(inner, MutableMapping)
        return inner

    @property
    def meta(self) -> dict[str, Any]:
        """The mapping under ``meta`` beside the state dict; empty if there is none."""
        meta = self.content.get("meta") if self.nest else None
        return {key: value for key, value in meta.items() if isinstance(key, str)} if isinstance(meta, dict) else {}

    @property
    def training_state(self) -> list[str]:
        """Entries beside the state dict that belong to the training it was saved in."""
        beside = self.content if self.nest else ()
        return [key for key in beside if isinstance(key, str) and _TRAINING_STATE.search(key.lower())]

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors of the state dict."""
        return {key: value for key, value in self.mapping.items() if isinstance(key, str) and isinstance(value, Tensor)}


def read_torch(path: Path, key: str | None = None) -> TorchFile:
    """Read a ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` file; ``key``: see `Request`.

    A CheckpointError if it is truncated, of another format, a pickle with more than tensors and known objects, or
    leaves it open which of several state dicts is meant.
    """
    content = _unpickled(path)
    nest, *others = _find_states(path, content, key)
    found = TorchFile(content=content, nest=nest, others=tuple(others))
    _check_tensors(found, path)
    return found


def _unpickled(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(32)
    zipped = start.startswith(_ZIP)
    if zipped:
        check_archive(path)
    elif _LEGACY_MAGIC not in start:
        remedy = "give what torch.save writes, or safetensors under the suffix .safetensors"
        raise CheckpointError(path, "is not a PyTorch file", remedy=remedy)
    try:
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except Exception as error:  # a hostile pickle can raise anything from inside torch.load
        raise _refusal(path, error) from error


def _refusal(path: Path, error: Exception) -> CheckpointError:
    """The error for a pickle that the restricted unpickler refused: because of a global, or because it is broken."""
    if isinstance(error, pickle.UnpicklingError):
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            what = f"its pickle asks for {named[1]!r}, which is code and not weights; nothing was run"
            return CheckpointError(path, what, remedy=_remedy(path))
        if "Unsupported operand" in str(error):
            return CheckpointError(path, "is a pickle that PyTorch cannot read safely", remedy=_REMEDY)
    found = re.search(r"WeightsUnpickler error: *(.+)", str(error))
    line = found[1] if found else next(iter(str(error).splitlines()), "")
    what = f"is truncated or damaged ({line.strip()[:120] or type(error).__name__})"
    return CheckpointError(path, what, remedy="download it again")


def _remedy(path: Path) -> str:
    """How to get at the weights: for a file that holds a state dict beside the code, the line that takes it out."""
    with path.open("rb") as file:
        strings = file.read(1 << 20)  # with the first keys of the pickle, in a zip file as well
    for key in ("state_dict", "model_state_dict", "network_weights"):
        if b"X" + len(key).to_bytes(4, "little") + key.encode() in strings:  # BINUNICODE, as torch.save pickles keys
            line = f"torch.save(torch.load({path.name!r}, weights_only=False)[{key!r}], 'weights.pth')"
            return f"if you trust it, save its state dict alone: {line}"
    return _REMEDY


def _check_tensors(file: TorchFile, path: Path) -> None:
    """Refuse tensors that are larger than the file they came from, and those that are not plain and dense."""
    size = path.stat().st_size
    for key, tensor in file.state.items():
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(path, f"holds {key!r}, which is not a plain dense tensor")
        if tensor.nbytes > size:
            got = f"shape {tuple(tensor.shape)} in {size} bytes"
            raise CheckpointError(path, f"tensor {key!r} is larger than the file", got=got)


def _find_states(path: Path, content: object, key: str | None) -> list[_Way]:
    """The key path of the state dict that is read, and those of others that are left as they are."""
    every = _states(content, _DEEPEST_NEST)
    named = [way for way in every if {*way} <= {*NESTS}]
    named.sort(key=lambda way: [NESTS.index(name) for name in way])
    ways = named + [way for way in every if way not in named and _has_layers(_at(content, way))]
    chosen = ways[:1] if named else ways
    if key is not None:
        chosen = [way for way in ways if key in ("/".join(way), *way[-1:])]
    if len(chosen) == 1:
        return chosen + [way for way in ways if way not in chosen]
    if key is not None:
        what = f"holds {'several state dicts' if chosen else 'no state dict'} under --key {key}"
        raise CheckpointError(path, what, got=_names(ways, content) or None)
    if chosen:
        remedy = "choose one with --key NAME"
        raise CheckpointError(path, "holds several state dicts", got=_names(chosen, content), remedy=remedy)
    got = f"a {type(content).__name__}"
    if isinstance(content, MutableMapping):
        got = "the keys " + ", ".join(repr(key) for key in list(content)[:5]) if content else "an empty dict"
    raise CheckpointError(path, "holds no state dict", got=got, expected="tensors by key, also in one nested dict")


def _states(content: object, depth: int) -> list[_Way]:
    """The key paths of dicts that hold tensors and are no part of a training's state.

    Of a dict and those inside it, the one with more tensors counts, unless one inside has a known name.
    """
    inside = content.items() if isinstance(content, MutableMapping) and depth else ()
    named = [(key, value) for key, value in inside if isinstance(key, str) and not _TRAINING_STATE.search(key.lower())]
    found = [(key, *way) for key, value in named for way in _states(value, depth - 1)]
    most = max((_size(_at(content, way)) for way in found), default=1)
    return found if any(way[0] in NESTS for way in found) or _size(content) < most else [()]


def _has_layers(state: Mapping[str, Any]) -> bool:
    """Whether a dict has the weight of a layer, which has two axes or more."""
    return any(isinstance(value, Tensor) and value.ndim > 1 for value in state.values())


def _size(content: object) -> int:
    """The number of tensors that a dict holds itself, by name."""
    inside = content.items() if isinstance(content, MutableMapping) else ()
    return sum(isinstance(key, str) and isinstance(value, Tensor) for key, value in inside)


def _names(ways: Iterable[_Way], content: object) -> str:
    """Key paths with the number of tensors under each."""
    return ", ".join(f"{'/'.join(way)} ({_size(_at(content, way))} tensors)" for way in ways if way)


def _at(content: Any, way: _Way) -> Any:
    for key in way:
        content = content[key]
    return content
