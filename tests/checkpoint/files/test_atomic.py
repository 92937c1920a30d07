"""OUT is whole or absent, whatever happens on the way."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from equalize.checkpoint.checkpoint import Checkpoint
from equalize.checkpoint.files.atomic import atomic_directory
from equalize.checkpoint.loading import load
from equalize.errors import OutputError, ResourceError


class Plan:
    maps: dict = {}  # noqa: RUF012

    def to_json(self):
        return {"schema": 1, "strategy": "größer", "path": "caf\udce9"}  # as a path that is no UTF-8 is read


@pytest.fixture
def checkpoint(tmp_path, lraspp_state) -> Checkpoint:
    (tmp_path / "in").mkdir()
    save_file(lraspp_state, tmp_path / "in" / "model.safetensors")
    return load(tmp_path / "in" / "model.safetensors")


def leftovers(directory):
    return sorted(path.name for path in directory.iterdir() if path.name != "in")


def test_the_plan_lies_beside_the_weights(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "out", Plan())
    assert json.loads((tmp_path / "out" / "equalize.json").read_text()) == Plan().to_json()
    assert load(tmp_path / "out").plan_json == Plan().to_json()
    assert checkpoint.plan_json is None


def test_an_old_receipt_does_not_survive(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "out", Plan())
    load(tmp_path / "out").save(tmp_path / "again")
    assert not (tmp_path / "again" / "equalize.json").exists()


def test_parents_are_made_and_modes_are_ordinary(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "a" / "b" / "out")
    umask = os.umask(0)
    os.umask(umask)
    out = tmp_path / "a" / "b" / "out"
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~umask}


def test_existing_directory_needs_overwrite(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "out")
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="--overwrite"):
        checkpoint.save(tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"
    checkpoint.save(tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine.txt").exists()
    assert leftovers(tmp_path) == ["out"]


def test_a_file_is_never_overwritten(checkpoint, tmp_path):
    (tmp_path / "out").write_text("keep")
    with pytest.raises(OutputError, match="not a directory"):
        checkpoint.save(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("out", ["in", "in/out", "in/../in/deeper/out", "link/out", "."])
def test_the_source_is_safe_from_its_output(smp_dir, tmp_path, out):
    import shutil

    shutil.copytree(smp_dir, tmp_path / "in")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    checkpoint = load(tmp_path / "in")
    with pytest.raises(OutputError):
        checkpoint.save(tmp_path / out, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == sorted(path.name for path in smp_dir.iterdir())


def test_an_output_that_is_a_link_is_not_followed(checkpoint, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="is a link"):
        checkpoint.save(tmp_path / "out", overwrite=True)
    assert not any((tmp_path / "elsewhere").iterdir())


def test_the_directory_of_a_state_dict_cannot_be_replaced(checkpoint, tmp_path):
    with pytest.raises(OutputError, match=r"holds .*, which is read"):
        checkpoint.save(tmp_path / "in", overwrite=True)
    assert (tmp_path / "in" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ResourceError),
        (PermissionError(errno.EACCES, "Permission denied"), ResourceError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("bug"), RuntimeError),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_left_behind_when_writing_fails(checkpoint, tmp_path, monkeypatch, failure, expected, overwrite):
    def fail(*_, **__):
        raise failure

    if overwrite:
        checkpoint.save(tmp_path / "out", Plan())
    before = leftovers(tmp_path)
    monkeypatch.setattr("equalize.checkpoint.files.atomic._flush", fail)
    with pytest.raises(expected):
        checkpoint.save(tmp_path / "out", overwrite=overwrite)
    assert leftovers(tmp_path) == before
    if overwrite:
        assert load(tmp_path / "out").plan_json == Plan().to_json()


def test_a_full_disk_is_a_resource_error(checkpoint, tmp_path, monkeypatch):
    """safetensors reports it in an exception of its own."""
    from safetensors import SafetensorError

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("equalize.checkpoint.files.rewrite.save_file", full)
    with torch.no_grad():
        checkpoint.model.classifier.high_classifier.weight.mul_(2)
    with pytest.raises(ResourceError, match="disk is full"):
        checkpoint.save(tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_a_full_disk_while_torch_writes(lraspp_state, tmp_path, monkeypatch):
    """torch reports it as a RuntimeError about positions in the file."""

    def full(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598")

    torch.save(lraspp_state, tmp_path / "in.pth")
    checkpoint = load(tmp_path / "in.pth")
    with torch.no_grad():
        checkpoint.model.classifier.high_classifier.weight.mul_(2)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ResourceError):
        checkpoint.save(tmp_path / "out")
    assert leftovers(tmp_path) == ["in.pth"]


def test_when_the_rename_fails_the_old_directory_stays(checkpoint, tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "out", Plan())
    rename = os.rename

    def only_away(source, target):
        if ".tmp-" in str(source):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr("equalize.checkpoint.files.atomic._exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", only_away)
    with pytest.raises(ResourceError):
        checkpoint.save(tmp_path / "out", overwrite=True)
    assert leftovers(tmp_path) == ["out"]
    assert load(tmp_path / "out").plan_json == Plan().to_json()


def test_links_out_of_a_checkpoint_are_not_followed(smp_dir, tmp_path):
    import shutil

    shutil.copytree(smp_dir, tmp_path / "in")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "in" / "link.txt").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "in" / "links").symlink_to(tmp_path / "secrets")
    (tmp_path / "in" / "inner.md").symlink_to("README.md")
    (tmp_path / "in" / "dangling").symlink_to("nowhere")
    load(tmp_path / "in").save(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in smp_dir.iterdir()} | {"inner.md"}
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_a_hub_snapshot_is_made_of_links_and_still_copied(smp_dir, tmp_path):
    blobs, snapshot = tmp_path / "model" / "blobs", tmp_path / "model" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in smp_dir.iterdir():
        (blobs / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    load(snapshot).save(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in smp_dir.iterdir()}


def test_the_directory_appears_at_once(tmp_path):
    with atomic_directory(tmp_path / "out") as work:
        (work / "file").write_text("x")
        assert not (tmp_path / "out").exists()
        assert work.parent == tmp_path
    assert (tmp_path / "out" / "file").read_text() == "x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_parent(checkpoint, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(ResourceError):
        checkpoint.save(tmp_path / "closed" / "out")
