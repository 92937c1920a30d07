"""Weight files that are damaged, disguised or hostile: one sentence each, and nothing runs."""

import io
import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from equalize.checkpoint.files.weights import check_directory, directory_weights, state_on_disk, weight_files
from equalize.checkpoint.loading import load
from equalize.errors import CheckpointError, NumericsError, ResourceError


def refusal(path, kind=CheckpointError, **arguments) -> str:
    with pytest.raises(kind) as caught:
        load(path, **arguments)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_missing_path(tmp_path):
    assert "no such file or directory" in refusal(tmp_path / "absent.pth")
    assert "no such file or directory" in refusal("./absent")
    assert "no such file or directory" in refusal("somewhere/absent.pth")


def test_hub_id_without_network_is_a_resource_error():
    sentence = refusal("nobody/nothing@main", ResourceError)
    assert "nobody/nothing" in sentence
    assert "Hub" in sentence


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000, "a/b/c/d", "no spaces/here"])
def test_names_that_are_nothing(name):
    refusal(name, (CheckpointError, ResourceError))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin"])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><body>Not found</body></html>", "HTML"),
        (b"hello, I am no checkpoint\n", "text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n", "Git-LFS pointer"),
        (b"\x00\x01\x02\x03garbage\xff" * 9, "is "),
    ],
)
def test_files_that_are_no_weights(tmp_path, suffix, content, what):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    assert what in refusal(path)


@pytest.mark.parametrize("share", [0.02, 0.999])
@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_pth(tmp_path, share, legacy):
    buffer = io.BytesIO()
    state = {f"layer{i}.weight": torch.randn(8, 8) for i in range(20)}
    torch.save(state, buffer, _use_new_zipfile_serialization=not legacy)
    path = tmp_path / "model.pth"
    path.write_bytes(buffer.getvalue()[: int(len(buffer.getvalue()) * share)])
    assert ": is truncated" in refusal(path)


@pytest.mark.parametrize("keep", [4, 20, -1])
def test_truncated_safetensors(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.randn(32, 32)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    assert ": is truncated" in refusal(path)


def tensor(dtype="F32", shape=(2,), start=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": tensor(shape=[1], end=4)},
        {"a": tensor(), "b": 7},
        {"a": tensor("F6_E2M3", [4])},
        {"a": tensor(shape=[3])},
        {"a": tensor(shape=[-2])},
        {"a": tensor(shape=[1 << 60, 1 << 60])},
        {"a": tensor(shape=[200], end=800)},
        {"__metadata__": {"a": 1}, "a": tensor()},
        {"a": tensor(), "b": tensor(shape=[1], start=4)},
        {"a": tensor(shape=[1], start=4)},
        [1, 2],
    ],
)
def test_safetensors_headers_that_lie(tmp_path, header):
    assert "is truncated" in refusal(with_header(tmp_path, header))


def test_a_type_that_safetensors_does_not_have(tmp_path):
    assert "F99" in refusal(with_header(tmp_path, {"a": tensor("F99")}))


def with_header(folder, header):
    """A file of this header and eight bytes."""
    raw = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8))
    return path


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        (
            "a.pth",
            struct.pack("<Q", 0x280) + b'{"a":' + b" " * 999,
            "is not a PyTorch file; give what torch.save writes, or safetensors",
        ),
        ("a.safetensors", b"PK\x03\x04" + bytes(99), "no safetensors file"),
        ("a.safetensors", pickle.dumps([1], protocol=2), "torch.save's need the suffix .pth"),
        ("a.pth", pickle.dumps({"a": [1, 2]}, protocol=2), "is not a PyTorch file"),
        ("a.pth", b"\x89HDF\r\n\x1a\n" + bytes(99), "is not a PyTorch file"),
        ("a.pth", b"a/model.pth" + bytes(246) + b"ustar" + bytes(99), "is not a PyTorch file"),
        ("a.pth", b"<Error><Code>AccessDenied</Code></Error>", "text"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, name, content, what):
    (tmp_path / name).write_bytes(content)
    assert what in refusal(tmp_path / name)


def test_a_config_that_git_lfs_did_not_fetch(tmp_path):
    (tmp_path / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n")
    assert "git lfs pull" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_pipes_and_sockets_are_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    assert "holds no weights" in refusal(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_whole_module_is_refused_by_name(tmp_path, zipped):
    path = tmp_path / "model.pth"
    torch.save({"model": nn.Conv2d(1, 1, 1), "epoch": 1}, path, _use_new_zipfile_serialization=zipped)
    sentence = refusal(path)
    assert "its pickle asks for 'torch.nn.modules.conv.Conv2d', which is code and not weights" in sentence
    assert "save the state dict alone: torch.save(model.state_dict(), 'weights.pth')" in sentence


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "network_weights"])
def test_a_module_beside_a_state_dict_is_answered_with_the_line_that_takes_it_out(tmp_path, monkeypatch, key):
    """Lightning saves hyper_parameters as they are, a loss or a backbone among them; the line is run here."""
    module = nn.CrossEntropyLoss()
    content = {
        "pytorch-lightning_version": "2.5.0",
        "hyper_parameters": {"lr": 1e-3, "criterion": module},
        key: {"weight": torch.arange(4.0)},
    }
    torch.save(content, tmp_path / "epoch=3.ckpt")
    sentence = refusal(tmp_path / "epoch=3.ckpt")
    assert "its pickle asks for 'torch.nn.modules.loss.CrossEntropyLoss', which is code" in sentence
    line = sentence.partition("if you trust it, save its state dict alone: ")[2]
    monkeypatch.chdir(tmp_path)
    exec(line, {"torch": torch})
    assert torch.equal(state_on_disk("weights.pth")["weight"], torch.arange(4.0))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
def test_torchscript_is_refused_with_a_way_out(tmp_path):
    path = tmp_path / "model.pt"
    torch.jit.script(nn.Conv2d(1, 1, 1)).save(path)
    sentence = refusal(path)
    assert "TorchScript" in sentence
    assert "torch.jit.load" in sentence


def test_exported_program_is_refused_with_a_way_out(tmp_path):
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(nn.Conv2d(1, 1, 1), (torch.ones(1, 1, 2, 2),)), path)
    sentence = refusal(path)
    assert "no data.pkl" in sentence
    assert "torch.save" in sentence


def test_deflated_zip_is_refused(tmp_path):
    plain, packed = tmp_path / "plain.pth", tmp_path / "packed.pth"
    torch.save({"a": torch.zeros(1000, 1000)}, plain)
    with zipfile.ZipFile(plain) as read, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as write:
        for name in read.namelist():
            write.writestr(name, read.read(name))
    assert "compressed" in refusal(packed)


@pytest.mark.parametrize("content", [[torch.ones(1)], torch.ones(1), {}, {"epoch": 3}, {"state_dict": {"epoch": 3}}, 7])
def test_no_state_dict_inside(tmp_path, content):
    path = tmp_path / "model.pth"
    torch.save(content, path)
    assert "holds no" in refusal(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_non_finite_weights_are_named(tmp_path, lraspp_state, value, suffix):
    state = {key: tensor.clone() for key, tensor in lraspp_state.items()}
    state["backbone.0.0.weight"].view(-1)[3] = value
    path = tmp_path / f"model{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    sentence = refusal(path, NumericsError)
    assert "backbone.0.0.weight" in sentence


def test_unknown_state_dict_says_what_was_tried(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"my.weight": torch.ones(3)}, path)
    sentence = refusal(path)
    assert "keys such as my.weight" in sentence
    assert "--arch" in sentence


def test_index_with_a_missing_shard(tmp_path, upernet_dir):
    index = json.loads((upernet_dir / "model.safetensors.index.json").read_text())
    for path in upernet_dir.iterdir():
        if path.name != max(index["weight_map"].values()):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert "missing" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\0b", "\ud800"]
)
def test_index_that_leaves_its_directory(tmp_path, name):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="names the shard"):
        weight_files(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', "{}", '{"weight_map": {"a": 3}}'])
def test_broken_index(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError):
        weight_files(tmp_path)


def test_empty_directory_and_ambiguous_directory(tmp_path):
    assert "no weights" in refusal(tmp_path)
    for name in ("a.pth", "b.pth"):
        torch.save({"a": torch.ones(1)}, tmp_path / name)
    assert "name the file" in refusal(tmp_path)


def test_a_directory_of_another_kind_of_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    assert "regular file" in refusal(tmp_path / "pipe.pth")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(b"x")
    path.chmod(0)
    refusal(path, ResourceError)


def test_a_version_that_is_no_text(tmp_path):
    """Torch's reader quotes it in a message that is no text either."""
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.ones(2)}, path)
    content = path.read_bytes()
    assert content.count(b"3\nPK\x07\x08") == 1
    path.write_bytes(content.replace(b"3\nPK\x07\x08", b"\xae\nPK\x07\x08"))
    assert "damaged" in refusal(path)


@pytest.fixture
def written(tmp_path):
    """A directory as `save` writes it for a torch file: a record, and a copy as safetensors."""
    tensors = {"weight": torch.randn(64, 64)}
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "model.pth")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "architecture.json").write_text('{"arch": "net.py:Net"}')
    return tmp_path


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def zeroed(path):
    """The header of safetensors, or the first operations of a pickle."""
    content = path.read_bytes()
    start = 0 if path.suffix == ".safetensors" else content.index(b"\x80\x02}")
    path.write_bytes(content[:start] + bytes(8) + content[start + 8 :])


def pointed(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n")


@pytest.mark.parametrize("damage", [cut, zeroed, pointed])
@pytest.mark.parametrize("nested", [False, True])
def test_a_check_refuses_what_reading_refuses(written, damage, nested):
    """A directory with its torch file, and without."""
    path = written / ("model.pth" if nested else "model.safetensors")
    if not nested:
        (written / "model.pth").unlink()
    check_directory(written)
    damage(path)
    with pytest.raises(CheckpointError) as read:
        directory_weights(written)
    with pytest.raises(CheckpointError) as checked:
        check_directory(written)
    assert str(checked.value) == str(read.value)


def test_a_damaged_copy_is_refused_as_well(written):
    cut(written / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors: is truncated or damaged"):
        check_directory(written)


def test_without_checksums_or_a_copy_torch_decides(written, monkeypatch):
    read = []
    monkeypatch.setattr("equalize.checkpoint.files.weights.directory_weights", read.append)
    check_directory(written)
    assert read == []
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"state_dict": {"weight": torch.ones(2)}}, written / "model.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    check_directory(written)
    (written / "model.safetensors").unlink()
    check_directory(written)
    assert read == [written, written]
