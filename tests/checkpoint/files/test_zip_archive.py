"""Zip files that are almost what torch.save writes: one line each."""

import io
import zipfile

import numpy as np
import pytest
import torch

from equalize.checkpoint.files.torch_file import read_torch
from equalize.errors import CheckpointError


def saved(**members: bytes) -> bytes:
    """A checkpoint as Python's zipfile packs it, and further members."""
    buffer = io.BytesIO()
    torch.save({"weight": torch.arange(4.0)}, buffer)
    packed = io.BytesIO()
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(packed, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
        for name, content in members.items():
            new.writestr(name, content)
    return packed.getvalue()


def encrypted() -> bytes:
    content = bytearray(saved())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.find(mark) + at] |= 1
    return bytes(content)


def numpy_archive() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, weight=np.ones(3))
    return buffer.getvalue()


REFUSED = {
    "encrypted": (encrypted, "damaged"),
    "numpy": (numpy_archive, r"no data.pkl.*weight.npy"),
    "other": (lambda: saved().replace(b"data.pkl", b"date.pkl"), "no data.pkl"),
    "no_members": (lambda: b"PK\x03\x04" + b"PK\x05\x06" + bytes(18), "damaged|no data.pkl"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_save_never_writes_is_refused(tmp_path, name):
    make, what = REFUSED[name]
    path = tmp_path / "model.pth"
    path.write_bytes(make())
    with pytest.raises(CheckpointError, match=what):
        read_torch(path)


@pytest.mark.parametrize("name", ["archive/../../outside.txt", "archive/notes.txt", "archive/ü"])
def test_further_members_are_left_where_they_are(tmp_path, name):
    path = tmp_path / "model.pth"
    path.write_bytes(saved(**{name: b"hello"}))
    assert torch.equal(read_torch(path).state["weight"], torch.arange(4.0))
    assert [each.name for each in tmp_path.iterdir()] == ["model.pth"]


def test_members_beside_the_one_folder_are_refused(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(saved(**{"/etc/outside": b"hello"}))
    with pytest.raises(CheckpointError, match="not in a subdirectory"):
        read_torch(path)


def test_a_comment_and_wrong_checksums_are_no_matter(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(saved())
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"from the laboratory"
    assert list(read_torch(path).state) == ["weight"]
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.arange(4.0)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_torch(path).state["weight"], torch.arange(4.0))
