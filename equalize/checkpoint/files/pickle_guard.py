"""Which globals a pickle asks for, found by reading its opcodes: nothing is unpickled."""

import io
import pickletools
import re
from pathlib import Path

from equalize.errors import CheckpointError

__all__ = ["asks_for_code", "foreign_global"]

_HARMLESS = ("torch", "collections", "_codecs")  # modules that torch.save's own files name
_STREAMS = 5  # a legacy torch.save file is that many pickles in a row
_NAME = re.compile(r"[A-Za-z_][\w.]*")
_PUSHES = ("SHORT_BINUNICODE", "BINUNICODE", "UNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING")


def foreign_global(data: bytes) -> str | None:
    """The first global that a pickle names outside torch, or None.

    What cannot be read as a pickle names none: text that happens to start like one must read as one to its end.
    """
    stream = io.BytesIO(data)
    for _ in range(_STREAMS):
        strings: list[str] = []
        found: str | None = None
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in _PUSHES:
                    strings.append(str(argument))
                elif opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
                    pair = " ".join(strings[-2:]) if opcode.name == "STACK_GLOBAL" else str(argument)
                    module, _, name = pair.partition(" ")
                    if found is None and module.partition(".")[0] not in _HARMLESS:
                        found = f"{module}.{name}" if _NAME.fullmatch(f"{module}.{name}") else None
        except Exception:  # broken opcodes raise many types; a broken pickle has no more to say
            return None
        if found is not None:
            return found
    return None


def asks_for_code(path: Path, name: str) -> CheckpointError:
    """The refusal of a pickle that names a global which is not a part of tensors."""
    return CheckpointError(
        path,
        f"its pickle asks for {name!r}, which is code and not weights; nothing was run",
        remedy="save the state dict alone: torch.save(model.state_dict(), 'weights.pth')",
    )
