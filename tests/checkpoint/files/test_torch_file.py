"""What training code saves is read by the restricted unpickler, and written again as it was."""

import argparse
import collections
import pathlib
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from equalize.checkpoint.files.torch_file import read_torch
from equalize.errors import CheckpointError


def with_attribute() -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(2))
    parameter._is_initialized = True
    return parameter


def stepped() -> torch.optim.Optimizer:
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    optimizer.step()
    return optimizer


SAVED = {
    "parameter": lambda: nn.Parameter(torch.ones(2)),
    "attribute": with_attribute,
    "optimizer": lambda: stepped().state_dict(),
    "scheduler": lambda: torch.optim.lr_scheduler.MultiStepLR(stepped(), [3, 3, 5]).state_dict(),
    "module": lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)).state_dict(),
    "dtypes": lambda: [torch.ones(2, dtype=getattr(torch, name)) for name in ("bfloat16", "int8", "bool", "complex64")],
    "unsigned": lambda: torch.ones(2, dtype=torch.uint16),
    "float8": lambda: torch.ones(2).to(torch.float8_e4m3fn),
    "conjugate": lambda: torch.ones(2, dtype=torch.complex64).conj(),
    "views": lambda: torch.arange(64.0).reshape(8, 8)[1:3, ::2],
    "shared": lambda: [torch.arange(64.0)] * 3,
    "empty": lambda: [torch.ones(0), torch.ones(3, 0, 2)],
    "scalar": lambda: torch.tensor(3),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "compressed": lambda: torch.eye(4).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
    "per_channel": lambda: torch.quantize_per_channel(torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.qint8),
    "meta": lambda: torch.empty(1 << 20, device="meta"),
    "size": lambda: torch.ones(2, 3).shape,
    "dtype": lambda: {torch.float32: torch.device("cpu")},
    "layout": lambda: torch.strided,
    "numbers": lambda: [0, -1, 255, 1 << 40, -(1 << 70), 0.5, float("inf"), True, None, 1 + 2j],
    "texts": lambda: ["", "a" * 300, "ü\n", b"", b"\x00\xff" * 300, bytearray(b"ab"), bytearray()],
    "containers": lambda: ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], [1], {}, {1: 2}, set(), {1, "a", (1, 2)}),
    "keys": lambda: {None: 0, 1.5: 0, b"a": 0, (128, 64, 128): "road", 1 << 63: 0, True: 0},
    "ordered": lambda: collections.OrderedDict([("a", 1), (2, collections.Counter("abca"))]),
    "random": lambda: [torch.get_rng_state(), np.random.RandomState(0).get_state(), tuple(range(625))],
    "arguments": lambda: argparse.Namespace(lr=0.1, out=pathlib.PosixPath("a/b"), depths=[1, 2]),
    "numpy": lambda: [
        np.zeros(0),
        np.arange(9.0).reshape(3, 3),
        np.float32(1),
        np.int64(3),
        np.array(True),
        {np.int64(3): "a"},
    ],
    "losses": lambda: [0.25] * 100_000,
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.quantize_per")
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", SAVED)
def test_what_training_code_saves_is_read(tmp_path, name, legacy):
    path = tmp_path / "model.pth"
    content = {"state_dict": {"weight": torch.arange(4.0)}, "beside": SAVED[name]()}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    if legacy and name in ("unsigned", "float8"):
        with pytest.raises(AttributeError):
            torch.load(path, weights_only=True)
        return
    assert torch.equal(read_torch(path).state["weight"], torch.arange(4.0))


@pytest.mark.parametrize("name", ["arguments", "numpy", "texts"])
def test_notes_are_written_as_what_they_were_read_from(tmp_path, name):
    torch.save({"weight": torch.ones(1), "beside": SAVED[name]()}, tmp_path / "model.pth")
    torch.save(read_torch(tmp_path / "model.pth").content, tmp_path / "again.pth")
    assert repr(torch.load(tmp_path / "again.pth", weights_only=False)["beside"]) == repr(SAVED[name]())


def test_thousands_of_tensors_with_an_optimizer_are_read(tmp_path):
    state = {f"layers.{number}.weight": torch.ones(1) for number in range(2000)}
    moments = {number: {"step": torch.ones(1), "exp_avg": torch.ones(1)} for number in range(2000)}
    torch.save({"state_dict": state, "optimizer": {"state": moments}}, tmp_path / "model.pth")
    assert len(read_torch(tmp_path / "model.pth").state) == 2000


def test_what_python_2_pickled_is_read(tmp_path):
    """It gave OrderedDict a list of pairs, and named the modules of its time."""
    pairs = b"](](U\x05countK\x01e](U\x01sc__builtin__\nset\n](K\x01K\x02e\x85Ree"
    raw = b"\x80\x02ccollections\nOrderedDict\n" + pairs + b"\x85R."
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    path = tmp_path / "model.pth"
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in head) + raw + pickle.dumps([], 2))
    with pytest.raises(CheckpointError, match=r"holds no state dict, got the keys 'count', 's'"):
        read_torch(path)


@pytest.mark.parametrize("key", ["a\nerror: b\x1b[31m", "\ud800"])
def test_keys_may_hold_any_character(tmp_path, key):
    torch.save({key: torch.ones(2)}, tmp_path / "model.pth")
    assert list(read_torch(tmp_path / "model.pth").state) == [key]
