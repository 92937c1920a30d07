"""Files made to harm: pickles that call, flipped bytes, sizes that lie. No tests."""

import io
import os
import pickle
import random
import shutil
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PROTOCOLS = range(6)
_MAGIC = 0x1950A86A20F9469CFC6C


class Call:
    """Unpickled, it calls `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


def gadgets(canary: Path) -> dict[str, Any]:
    """Objects that touch the canary, or end or hang the process, if anything in them is called."""
    import builtins
    import code
    import ctypes
    import functools
    import importlib
    import marshal
    import operator
    import runpy
    import subprocess
    import timeit
    import webbrowser

    import numpy as np
    import torch

    touch = f"touch {canary}"
    python = f"open({str(canary)!r}, 'w').close()"
    inner = pickle.dumps(Call(os.system, touch))
    return {
        "os.system": Call(os.system, touch),
        "os.popen": Call(os.popen, touch),
        "os.mkdir": Call(os.mkdir, str(canary)),
        "os.open": Call(os.open, str(canary), os.O_CREAT | os.O_WRONLY),
        "os.execv": Call(os.execv, "/bin/sh", ["sh", "-c", touch]),
        "os._exit": Call(os._exit, 0),
        "os.abort": Call(os.abort),
        "sys.exit": Call(sys.exit, 0),
        "time.sleep": Call(time.sleep, 1000),
        "subprocess.Popen": Call(subprocess.Popen, ["sh", "-c", touch]),
        "subprocess.check_output": Call(subprocess.check_output, ["sh", "-c", touch]),
        "eval": Call(builtins.eval, python),
        "exec": Call(builtins.exec, python),
        "open": Call(builtins.open, str(canary), "w"),
        "getattr": Call(getattr, Call(importlib.import_module, "os"), "system"),
        "timeit": Call(timeit.timeit, python, "pass", time.time, 1),
        "runpy": Call(runpy.run_path, str(canary.with_name("run.py"))),
        "code": Call(operator.methodcaller("runsource", python), Call(code.InteractiveInterpreter)),
        "functools.partial": Call(functools.partial(os.system, touch)),
        "marshal.loads": Call(marshal.loads, marshal.dumps(compile(python, "", "exec"))),
        "pickle.loads": Call(pickle.loads, inner),
        "torch.storage": Call(torch.storage._load_from_bytes, inner),
        "torch.load": Call(torch.load, str(canary.with_name("inner.pth"))),
        "torch.hub": Call(torch.hub.load, str(canary.parent), "model"),
        "torch.serialization": Call(torch.serialization.add_safe_globals, [os.system]),
        "ctypes": Call(ctypes.CDLL, str(canary.with_name("evil.so"))),
        "numpy.load": Call(np.load, str(canary.with_name("inner.npy")), None, True),
        "webbrowser": Call(webbrowser.open, f"file://{canary}"),
        "shutil.copy": Call(shutil.copyfile, __file__, str(canary)),
    }


def _archive(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def in_zip(pickled: bytes) -> bytes:
    """A pickle as torch.save packs it."""
    return _archive({"data.pkl": pickled, "version": b"3\n"})


def legacy(pickled: bytes, storages: list[str] | None = None, data: bytes = b"") -> bytes:
    """A pickle as torch.save wrote it before PyTorch 1.6."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = b"".join(pickle.dumps(part, protocol=2) for part in (_MAGIC, 1001, system))
    return head + pickled + pickle.dumps(storages or [], protocol=2) + data


def mutants(seed: bytes, number: int, generator: random.Random) -> Iterator[bytes]:
    """The seed with one to eight bytes changed, and now and then a piece cut out, doubled or cut off."""
    for _ in range(number):
        content = bytearray(seed)
        for _ in range(generator.choice((1, 1, 2, 8))):
            content[generator.randrange(len(content))] = generator.randrange(256)
        start = generator.randrange(len(content))
        stop = min(len(content), start + generator.randrange(64))
        match generator.randrange(12):
            case 0:
                del content[start:stop]
            case 1:
                content[start:start] = content[start:stop]
            case 2:
                del content[start:]
        yield bytes(content)


def _with_storage(size: tuple[int, ...], stride: tuple[int, ...], count: int) -> bytes:
    """A pickle of a state dict with one float tensor that claims a size, strides and a storage."""
    import torch

    class Storage:
        pass

    storage = Storage()

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", count) if obj is storage else None

    buffer = io.BytesIO()
    call = Call(torch._utils._rebuild_tensor_v2, storage, 0, size, stride, False, {})
    Pickler(buffer, protocol=2).dump({"weight": call})
    return buffer.getvalue()


def _torch_zip(pickled: bytes, data: bytes) -> bytes:
    return _archive({"data.pkl": pickled, "byteorder": b"little", "data/0": data, "version": b"3\n"})


def _safetensors(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header


def _lying_zip() -> bytes:
    content = bytearray(_torch_zip(_with_storage((4,), (1,), 4), bytes(16)))
    at = content.rfind(b"PK\x01\x02", 0, content.rfind(b"archive/version"))
    for where in (content.rfind(b"PK\x01\x02", 0, at), at):
        content[where + 20 : where + 28] = struct.pack("<II", 0xFFFFFF00, 0xFFFFFF00)
    return bytes(content)


def file_bombs() -> dict[str, Callable[[], bytes]]:
    """Name with suffix -> content of a file that claims, nests or expands more than it holds."""
    entry = '"{}":{{"dtype":"F32","shape":[{}],"data_offsets":[{},{}]}}'
    vast = 1 << 40
    return {
        "lying_directory.pth": _lying_zip,
        "vast_size.pth": lambda: _torch_zip(_with_storage((vast,), (1,), 4), bytes(16)),
        "vast_storage.pth": lambda: _torch_zip(_with_storage((vast,), (1,), vast), bytes(16)),
        "stride_0.pth": lambda: _torch_zip(_with_storage((1 << 20, 1 << 20), (0, 0), 4), bytes(16)),
        "overflow.pth": lambda: _torch_zip(_with_storage((1 << 62, 1 << 62), (1, 1), 4), bytes(16)),
        "negative.pth": lambda: _torch_zip(_with_storage((-4,), (-1,), -4), bytes(16)),
        "legacy_storage.pth": lambda: legacy(_with_storage((vast,), (1,), vast), ["0"], struct.pack("<q", vast)),
        "long_string.pth": lambda: b"\x80\x02X" + struct.pack("<I", 0xFFFFFFF0) + b"abc",
        "deep_lists.pth": lambda: in_zip(b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."),
        "deep_dicts.pth": lambda: in_zip(
            b"\x80\x02" + b"}X\x05\x00\x00\x00model" * 200_000 + b"}" + b"s" * 200_000 + b"."
        ),
        "doubling.pth": lambda: in_zip(
            b"\x80\x02]q\x00" + b"".join(b"]q%c(h%ch%ce" % (n, n - 1, n - 1) for n in range(1, 200)) + b"."
        ),
        "large_pickle.pth": lambda: in_zip(b"\x80\x02](" + b"N" * (1 << 26) + b"e."),
        "many_axes.pth": lambda: _torch_zip(_with_storage((1,) * 20_000, (1,) * 20_000, 4), bytes(16)),
        "no_elements.pth": lambda: _torch_zip(_with_storage((0, *[vast] * 3), (1,) * 4, 4), bytes(16)),
        "two_cases.pth": lambda: _archive(
            {"data.pkl": _with_storage((4,), (1,), 4), "DATA.pkl": b"N.", "data/0": bytes(16)}
        ),
        "long_header.safetensors": lambda: _safetensors(b"{}", length=(1 << 63) - 1),
        "deep_header.safetensors": lambda: _safetensors(b'{"a":' + b"[" * 5_000_000),
        "vast_shape.safetensors": lambda: _safetensors(("{" + entry.format("a", vast, 0, 4 * vast) + "}").encode()),
        "long_number.safetensors": lambda: _safetensors(("{" + entry.format("a", "9" * 100_000, 0, 4) + "}").encode()),
    }
