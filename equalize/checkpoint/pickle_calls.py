"""What each function that a checkpoint's pickle may call costs, told from what it is called with. Nothing is called.

torch's restricted unpickler knows which functions a pickle may call, but not how often or with what. Two bytes of a
pickle can copy a text of megabytes, a key can take years to hash, and a number can claim all memory.
"""

import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from equalize.checkpoint.files.pickle_stubs import INERT
from equalize.errors import CheckpointError

__all__ = ["NOTES", "STEPS_OF_CALL", "Attributed", "Costs", "Made", "Name", "call", "check_attributes", "expect"]

NOTES = frozenset(name for _, name in INERT)
"""The names that stand for notes: objects that keep what they are called with."""
_MOST_STEPS = 1 << 21  # lists in training states have tens of thousands of items
STEPS_OF_CALL = 8
"""What takes torch's unpickler as long as a call."""
_MOST_TUPLE_KEYS = 1 << 12  # the hashes of other keys cannot be made to collide
_COPIED_TEXT = 1 << 20  # bytes of text that may be copied beyond those in the pickle
_ENCODINGS = ("latin1", "latin-1")  # the only ones that pickles of bytes have
_SCALARS = (type(None), bool, str, bytes, float)


class Name(str):
    """A global that the pickle names."""

    __slots__ = ()


class Attributed(dict[Any, Any]):
    """What stands for an OrderedDict or a Counter: dicts that can be given attributes."""


class Made:
    """What a call would give."""

    __slots__ = ("elements", "note")

    def __init__(self, elements: int = 0, *, note: bool = False) -> None:
        self.elements = elements
        """Of a tensor or storage."""
        self.note = note


class Costs:
    """What the pickles of a checkpoint have taken so far, and the error beyond what files hold."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, path.stat().st_size
        self.position = 0
        """How far the pickle has been read."""
        self._steps = self._text = self._elements = self._tuple_keys = 0
        self._storages: set[tuple[object, ...]] = set()

    def step(self, number: int = 1) -> None:
        """Count steps of the pickle, and items that a call copies."""
        self._steps += number
        if self._steps > _MOST_STEPS:
            raise self._excess(f"takes more than {_MOST_STEPS} steps")

    def copy(self, text: str) -> None:
        """Count text that a call copies: all of it has been read once."""
        self._text += len(text)
        if self._text > self.position + _COPIED_TEXT:
            raise self._excess("copies the same text again and again")

    def fill(self, elements: int) -> None:
        """Count elements that a call reads or makes: files have a byte for each, or for two of four bits."""
        self._elements += elements
        if elements < 0 or self._elements > 2 * self.size:
            raise self._excess(f"promises {self._elements} elements of tensors in a file of {self.size} bytes")

    def storage(self, kind: Name, key: str, elements: int) -> None:
        """Count a storage that is read from the file, once."""
        if (kind, key, elements) not in self._storages:
            self._storages.add((kind, key, elements))
            self.fill(elements)

    def key(self, key: object) -> None:
        """Let pass keys of dicts that are hashed in no time and that nobody can make collide."""
        if isinstance(key, tuple):
            self.step(len(key))
            self._tuple_keys += 1
            fine = self._tuple_keys <= _MOST_TUPLE_KEYS and all(map(_is_scalar, key))
        else:
            fine = _is_scalar(key) or (isinstance(key, Made) and key.note)
        if not fine:
            raise self._excess("has keys that no training writes")

    def _excess(self, what: str) -> CheckpointError:
        return CheckpointError(
            self.path,
            f"holds a pickle that {what}",
            remedy="save the state dict alone: torch.save(model.state_dict(), 'weights.pth')",
        )


def _is_scalar(value: object) -> bool:
    return isinstance(value, _SCALARS) or (isinstance(value, int) and abs(value) < 1 << 64)


def expect(value: Any, *kinds: type) -> Any:
    """The value, if it is one of these.

    Raises:
        pickle.UnpicklingError: it is not, and torch would fail on it.
    """
    if not isinstance(value, kinds):
        raise pickle.UnpicklingError(f"{type(value).__name__} in place of {kinds[0].__name__}")
    return value


def check_attributes(costs: Costs, state: object, *kinds: type) -> None:
    """Let pass attributes that hide none which the object has by itself.

    Raises:
        pickle.UnpicklingError: one does.
    """
    for part in state if isinstance(state, tuple) else (state,):
        names = {} if part is None else expect(part, dict)
        costs.step(len(names))
        for name in names:
            if not isinstance(name, str) or any(hasattr(kind, name) for kind in kinds):
                raise pickle.UnpicklingError(f"an attribute in place of {str(name)[:40]!r}")


def call(costs: Costs, name: object, arguments: Sequence[Any]) -> Any:
    """What a call would give.

    Raises:
        CheckpointError: it would take far more than the file explains.
        pickle.UnpicklingError: the function is none that tensors need; begins with GLOBAL and its name.
    """
    cost = _CALLS.get(expect(name, Name))
    if cost is None:
        raise pickle.UnpicklingError(f"GLOBAL {name}")
    costs.step(STEPS_OF_CALL + len(arguments))
    try:
        return cost(costs, *arguments)
    except (TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise pickle.UnpicklingError(f"a call of {name} with what it does not take") from error


def _mapping(costs: Costs, items: Any = ()) -> Attributed:
    """``OrderedDict([[key, value], ...])``, as Python 2 wrote it, or ``Counter({key: number})``."""
    pairs = items.items() if isinstance(items, dict) else expect(items, list, tuple)
    costs.step(2 * len(pairs))
    found = Attributed()
    for pair in pairs:
        key, value = expect(pair, list, tuple)
        costs.key(key)
        found[key] = value
    return found


def _set(costs: Costs, items: Any = ()) -> Made:
    costs.step(len(expect(items, list, tuple)))
    for item in items:
        costs.key(item)
    return Made()


def _bytes(costs: Costs, text: Any = "", encoding: Any = "latin1") -> str:
    """Bytes, or a bytearray of them: what stands for them is the text that spells them."""
    if encoding not in _ENCODINGS:
        raise pickle.UnpicklingError(f"GLOBAL _codecs.encode of {str(encoding)[:20]}")
    costs.copy(expect(text, str))
    return str(text)


def _scalar(costs: Costs, *values: Any) -> Made:
    """A device, a layout or a complex number."""
    for value in values:
        if isinstance(expect(value, str, int, float), str):
            costs.copy(value)
    return Made()


def _size(costs: Costs, items: Any = ()) -> tuple[Any, ...]:
    costs.step(len(expect(items, tuple, list)))
    return tuple(items)


def _view(costs: Costs, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Made:
    """A tensor in a storage; torch sees to its lying within."""
    expect(storage, Made)
    return Made(_elements(costs, size, stride))


def _elements(costs: Costs, size: Any, stride: Any = ()) -> int:
    costs.step(len(expect(size, tuple)) + len(expect(stride, tuple)))
    number = 1
    for length in size:
        number *= expect(length, int)
        if not 0 <= number < 1 << 63:
            raise pickle.UnpicklingError("a tensor of an impossible size")
    return number


def _quantized(costs: Costs, storage: Any, offset: Any, size: Any, *_: Any) -> Made:
    made = Made(_elements(costs, size))
    costs.fill(made.elements)
    return made


def _sparse(costs: Costs, layout: Any, parts: Any) -> Made:
    for part in expect(parts, tuple):
        costs.fill(part.elements if isinstance(part, Made) else 0)
    return Made()


def _meta(costs: Costs, dtype: Any, size: Any, stride: Any, *_: Any) -> Made:
    return Made(_elements(costs, size, stride))


def _from_device(costs: Costs, tensor: Any, *_: Any) -> Made:
    """A copy: how tensors of devices that torch does not write itself are saved."""
    costs.fill(expect(tensor, Made).elements)
    return Made(tensor.elements)


def _parameter(costs: Costs, tensor: Any, *_: Any) -> Any:
    return expect(tensor, Made)


def _parameter_with_state(costs: Costs, tensor: Any, needs_grad: Any, hooks: Any, state: Any) -> Any:
    check_attributes(costs, state, nn.Parameter)
    return expect(tensor, Made)


def _with_type(costs: Costs, function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    check_attributes(costs, state, nn.Parameter)
    return expect(call(costs, function, expect(arguments, tuple)), Made)


_CALLS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "builtins.set": _set,
    "builtins.bytearray": lambda costs, *arguments: Made(len(_bytes(costs, *arguments))),  # no key
    "builtins.complex": _scalar,
    "_codecs.encode": _bytes,
    "torch.Size": _size,
    "torch.device": _scalar,
    "torch.serialization._get_layout": _scalar,
    "torch.nn.parameter.Parameter": _parameter,
    "torch._utils._rebuild_tensor": _view,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_tensor_v3": _view,
    "torch._utils._rebuild_qtensor": _quantized,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_meta_tensor_no_storage": _meta,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _from_device,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter_with_state,
    "torch._tensor._rebuild_from_type_v2": _with_type,
    **{name: lambda costs, *_: Made(note=True) for name in NOTES},
}
"""Of what torch lets pass, what tensors and training states need; the constructors of tensors and storages are not."""
