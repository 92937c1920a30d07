"""Pickles that torch's restricted unpickler would go through, and that take far more than they hold. No tests.

They are put together opcode by opcode: no pickler writes them. Each lies beside, or in, a state dict of one tensor.
"""

import pickle
import struct
from collections.abc import Callable

_MILLION = 1_000_000
_VIEW = "torch._utils._rebuild_tensor_v2"


def _text(content: str | bytes) -> bytes:
    raw = content.encode() if isinstance(content, str) else content
    return b"X" + struct.pack("<I", len(raw)) + raw


def _int(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)


def _name(dotted: str) -> bytes:
    module, _, name = dotted.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _list(items: bytes) -> bytes:
    return b"](" + items + b"e"


def _call(dotted: str, *arguments: bytes) -> bytes:
    return _name(dotted) + _tuple(*arguments) + b"R"


def _storage(kind: str = "FloatStorage", elements: int = 4) -> bytes:
    return _tuple(_text("storage"), _name(f"torch.{kind}"), _text("0"), _text("cpu"), _int(elements)) + b"Q"


def _tensor_arguments(*shape: int) -> list[bytes]:
    sizes, strides = _tuple(*map(_int, shape)), _tuple(*[_int(1)] * len(shape))
    return [_storage(), _int(0), sizes, strides, b"\x89", _call("collections.OrderedDict")]


def _tensor(*shape: int) -> bytes:
    return _call(_VIEW, *_tensor_arguments(*shape or (4,)))


def _repeated(dotted: str, arguments: bytes, times: int, operation: bytes = b"R") -> bytes:
    """A list of calls, of which all but the first take five bytes."""
    first = _name(dotted) + b"q\x00" + arguments + b"q\x01" + operation
    return _list(first + (b"h\x00h\x01" + operation) * (times - 1))


def _beside(extra: bytes) -> bytes:
    """A pickle with a state dict and something else."""
    state = b"}" + _text("weight") + _tensor() + b"s"
    return b"\x80\x02}(" + _text("state_dict") + state + _text("extra") + extra + b"u."


def _state(weight: bytes) -> bytes:
    return b"\x80\x02}" + _text("weight") + weight + b"s."


def _colliding(number: int) -> bytes:
    """Keys that Python hashes alike: whole multiples of 2**61 - 1."""
    longs = (pickle.encode_long((index + 1) * ((1 << 61) - 1)) for index in range(number))
    return b"".join(b"\x8a" + bytes([len(each)]) + each + b"N" for each in longs)


def _doubled_tuple(depth: int) -> bytes:
    """Tuples of the one before, twice: of the last, a hash takes 2**depth steps."""
    pairs = b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(depth))
    return _list(b")q\x00" + pairs + b"}h%cNs" % depth)


def _attributes(*names: str) -> bytes:
    return b"}" + b"".join(_text(name) + b"Ns" for name in names)


_NUMBERS = _list(b"K\x01" * 100_000) + b"\x85"
_PAIRS = _list(b"".join(_int(n) + b"N\x86" for n in range(50_000))) + b"\x85"
_COUNTS = b"}(" + b"".join(_int(n) + b"N" for n in range(50_000)) + b"u\x85"
_WIDE = _tuple(b"N" * 100_000)


def pickle_bombs() -> dict[str, Callable[[], bytes]]:
    """Name -> a pickle to be put into a checkpoint with a storage of 16 bytes."""
    four = _tensor_arguments(4)
    wide_axes = _tuple(b"K\x01" * 20_000)
    dense = _tuple(_tensor(), _name("torch.float64"), _text("cpu"), b"\x89")
    sparse = _tuple(_tensor(1, 4), _tensor(), _tuple(_int(1 << 30)), b"\x89")
    layout = _call("torch.serialization._get_layout", _text("torch.sparse_coo"))
    scale = _tuple(_name("torch.per_tensor_affine"), b"G" + struct.pack(">d", 1.0), b"K\x00")
    quantized = [_storage("QInt8Storage"), b"K\x00", _tuple(_int(1 << 30)), _tuple(b"K\x00"), scale, b"\x89N"]
    text = _text("a" * _MILLION)
    return {
        "encode": lambda: _beside(_repeated("_codecs.encode", _tuple(text, _text("latin1")), 3000)),
        "encode_wide": lambda: _beside(_repeated("_codecs.encode", _tuple(text, _text("utf-32")), 1000)),
        "encode_slow": lambda: _beside(_call("_codecs.encode", _text("é" * _MILLION), _text("idna"))),
        "encode_errors": lambda: _beside(_call("_codecs.encode", text, _text("ascii"), _text("xmlcharrefreplace"))),
        "bytearrays": lambda: _beside(_repeated("__builtin__.bytearray", _tuple(text, _text("latin-1")), 3000)),
        "sets": lambda: _beside(_repeated("__builtin__.set", _NUMBERS, 3000)),
        "dicts": lambda: _beside(_repeated("collections.OrderedDict", _PAIRS, 3000)),
        "counters": lambda: _beside(_repeated("collections.Counter", _COUNTS, 3000)),
        "sizes": lambda: _beside(_repeated("torch.Size", _tuple(b"K\x01" * 100_000) + b"\x85", 5000)),
        "notes": lambda: _beside(_repeated("numpy.core.multiarray._reconstruct", _WIDE, 5000)),
        "new_notes": lambda: _beside(_repeated("numpy.core.multiarray._reconstruct", _WIDE, 5000, b"\x81")),
        "states": lambda: _beside(
            _list(_attributes("a") + b"q\x00" + (_call("collections.OrderedDict") + b"h\x00b") * 200_000)
        ),
        "tensors": lambda: _beside(_repeated("torch.Tensor", _NUMBERS, 3000)),
        "storages": lambda: _beside(_repeated("torch.storage.UntypedStorage", _int(1 << 30) + b"\x85", 50)),
        "axes": lambda: _beside(_repeated(_VIEW, _tuple(*four[:2], wide_axes, wide_axes, *four[4:]), 3000)),
        "casts": lambda: _beside(_repeated("torch._utils._rebuild_device_tensor_from_cpu_tensor", dense, 5000)),
        "sparse": lambda: _beside(_repeated("torch._utils._rebuild_sparse_tensor", _tuple(layout, sparse), 5000)),
        "quantized": lambda: _beside(_repeated("torch._utils._rebuild_qtensor", _tuple(*quantized), 50)),
        "collisions": lambda: _beside(b"}(" + _colliding(60_000) + b"u"),
        "slow_hash": lambda: _beside(_doubled_tuple(60)),
        "slow_set": lambda: _beside(_list(_doubled_tuple(40)[2:-1]) + _call("__builtin__.set", _list(b"h\x28"))),
        "calls": lambda: _beside(_repeated("collections.OrderedDict", b")", 1_500_000)),
        "steps": lambda: _beside(_list(b"N" * 12_000_000)),
        "hidden_items": lambda: b"\x80\x02" + _call("collections.OrderedDict") + _attributes("items", "get") + b"b.",
        "hidden_clone": lambda: _state(
            _call(
                "torch._utils._rebuild_parameter_with_state",
                *(_tensor(), b"\x89", _call("collections.OrderedDict"), _attributes("clone", "numel")),
            )
        ),
        "hidden_detach": lambda: _state(
            _call(
                "torch._tensor._rebuild_from_type_v2",
                *(_name(_VIEW), _name("torch.Tensor"), _tuple(*four), _attributes("detach")),
            )
        ),
        "subclass": lambda: _state(
            _call(
                "torch._utils._rebuild_wrapper_subclass",
                *(_name("torch.Tensor"), _name("torch.float32"), _tuple(_int(4)), _tuple(_int(1)), b"K\x00"),
                *(_call("torch.serialization._get_layout", _text("torch.strided")), _text("cpu"), b"\x89"),
            )
        ),
        "many_axes": lambda: _state(_call(_VIEW, *four[:2], wide_axes, wide_axes, *four[4:])),
        "zero_elements": lambda: _state(
            _call(_VIEW, *four[:2], _tuple(b"K\x00", *[_int(2**31 - 1)] * 3), _tuple(*[b"K\x01"] * 4), *four[4:])
        ),
        "key_of_lines": lambda: b"\x80\x02}" + _text("a\nerror: b\x1b[31m") + _tensor() + b"s.",
        "key_of_no_text": lambda: b"\x80\x02}" + _text(b"\xed\xa0\x80") + _tensor() + b"s.",
    }
