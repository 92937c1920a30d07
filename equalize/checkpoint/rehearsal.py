"""A pickle gone through before torch reads it, with names in place of functions: what would it call, at what cost?"""

import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from pickletools import genops
from typing import IO, Any

from equalize.checkpoint.pickle_calls import (
    NOTES,
    STEPS_OF_CALL,
    Attributed,
    Costs,
    Made,
    Name,
    call,
    check_attributes,
    expect,
)

__all__ = ["rehearse"]

_RENAMED = {"__builtin__": "builtins"}  # Python 2


def rehearse(path: Path, file: IO[bytes], pickles: int) -> None:
    """Go through pickles that torch is about to read.

    Args:
        path: the checkpoint, for errors.
        file: at the first of the pickles.
        pickles: how many there are, one after the other.

    Raises:
        CheckpointError: they would take far more memory or time than the checkpoint's size explains.
        pickle.UnpicklingError: they call what no tensor needs; begins with GLOBAL and its name.
        Exception: they are broken.
    """
    costs = Costs(path)
    for _ in range(pickles):
        stage = _Stage(costs)
        for opcode, argument, position in genops(file):
            costs.step()
            costs.position = position or 0
            act = _ACTS.get(opcode.name)
            if act is None:
                raise pickle.UnpicklingError(f"Unsupported operand {opcode.name}")
            act(stage, argument)


class _Stage:
    """The stack and the memo of a pickle, as torch's unpickler has them. Dicts keep their keys alone."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def name(self, argument: str) -> None:
        self.costs.step(STEPS_OF_CALL)
        module, _, name = argument.partition(" ")
        self.push(Name(f"{_RENAMED.get(module, module)}.{name}"))

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def last(self, number: int) -> list[Any]:
        items = self.stack[-number:]
        del self.stack[-number:]
        return items

    def append(self, items: list[Any]) -> None:
        expect(self.stack[-1], list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = expect(self.stack[-1], dict)
        for key in items[::2]:
            self.costs.key(key)
            target[key] = None

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def persistent(self) -> None:
        """``("storage", type, key, location, elements)``; in old files behind it a view, by a key of its own."""
        self.costs.step(STEPS_OF_CALL)
        role, kind, *described = expect(self.stack.pop(), tuple)
        if role == "module":  # old files hold the source code of a class beside its name
            raise pickle.UnpicklingError(f"GLOBAL {kind}")
        key, _, elements, *view = described
        if view and view[0] is not None:
            expect(expect(view[0], tuple)[0], str)
        self.costs.storage(expect(kind, Name), expect(key, str), expect(elements, int))
        self.push(Made(elements))

    def reduce(self) -> None:
        function, arguments = self.last(2)
        self.push(call(self.costs, function, expect(arguments, tuple)))

    def new(self) -> None:
        """``class.__new__(class, *arguments)``: what is no note takes none."""
        kind, arguments = self.last(2)
        if expect(arguments, tuple) and kind not in NOTES:
            raise pickle.UnpicklingError(f"GLOBAL {kind}")
        self.push(call(self.costs, kind, arguments))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        self.costs.step(STEPS_OF_CALL + (len(state) if isinstance(state, tuple) else 0))
        if isinstance(target, Attributed):
            check_attributes(self.costs, state, OrderedDict, Counter)
        elif not expect(target, Made).note:
            raise pickle.UnpicklingError("a state for what has none")


_ACTS: Mapping[str, Callable[[_Stage, Any], None]] = {
    **dict.fromkeys(("PROTO", "STOP"), lambda stage, _: None),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"), _Stage.push
    ),
    "NONE": lambda stage, _: stage.push(None),
    "NEWFALSE": lambda stage, _: stage.push(False),
    "NEWTRUE": lambda stage, _: stage.push(True),
    "EMPTY_LIST": lambda stage, _: stage.push([]),
    "EMPTY_DICT": lambda stage, _: stage.push({}),
    "EMPTY_SET": lambda stage, _: stage.push(call(stage.costs, Name("builtins.set"), ())),
    "EMPTY_TUPLE": lambda stage, _: stage.push(()),
    "TUPLE1": lambda stage, _: stage.push(tuple(stage.last(1))),
    "TUPLE2": lambda stage, _: stage.push(tuple(stage.last(2))),
    "TUPLE3": lambda stage, _: stage.push(tuple(stage.last(3))),
    "TUPLE": lambda stage, _: stage.push(tuple(stage.since_mark())),
    "MARK": lambda stage, _: stage.mark(),
    "APPEND": lambda stage, _: stage.append(stage.last(1)),
    "APPENDS": lambda stage, _: stage.append(stage.since_mark()),
    "SETITEM": lambda stage, _: stage.set_items(stage.last(2)),
    "SETITEMS": lambda stage, _: stage.set_items(stage.since_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Stage.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda stage, index: stage.push(stage.memo[index])),
    "GLOBAL": _Stage.name,
    "REDUCE": lambda stage, _: stage.reduce(),
    "NEWOBJ": lambda stage, _: stage.new(),
    "BUILD": lambda stage, _: stage.build(),
    "BINPERSID": lambda stage, _: stage.persistent(),
}
"""What torch's unpickler understands; it refuses all else."""
