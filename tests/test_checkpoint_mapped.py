"""Models that stay in their files: nothing of them is copied into memory but what is written to."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from equalize.checkpoint import load
from equalize.checkpoint.reading import read_weights
from equalize.naming import ModelName


def file_at(tensor) -> str:
    """The file that is mapped where a tensor lies; nothing if it lies in memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *name = line.split(maxsplit=5)
        first, last = (int(each, 16) for each in span.split("-"))
        if first <= tensor.data_ptr() < last:
            return name[0] if name else ""
    raise AssertionError("lies nowhere")


def shifted(state, path: Path) -> Path:
    """A safetensors file whose tensors lie at addresses that no allocator gives."""
    for pad in range(0, 64, 8):
        save_file(state, path, metadata={"format": "pt", "pad": "x" * pad})
        if int.from_bytes(path.read_bytes()[:8], "little") % 64 == 16:
            return path
    raise AssertionError("the header takes no padding")


@pytest.fixture
def sources(segformer_dir, upernet_dir, smp_dir, lraspp_state, tmp_path):
    torch.save({"state_dict": lraspp_state}, tmp_path / "lraspp.pth")
    flat = shifted(load_file(segformer_dir / "model.safetensors"), tmp_path / "flat.safetensors")
    torch.save(load_file(segformer_dir / "model.safetensors"), tmp_path / "flat.pth")
    arch = f"transformers:{segformer_dir}"
    return {
        "directory": ModelName(source=str(segformer_dir)),
        "shards": ModelName(source=str(upernet_dir)),
        "smp": ModelName(source=str(smp_dir)),
        "state dict": ModelName(source=str(tmp_path / "lraspp.pth")),
        "flat safetensors": ModelName(source=str(flat), arch=arch),
        "flat pth": ModelName(source=str(tmp_path / "flat.pth"), arch=arch),
    }


@pytest.mark.parametrize("form", ["directory", "shards", "state dict", "flat safetensors", "flat pth"])
def test_parameters_lie_in_the_file_and_writing_to_them_leaves_it_alone(sources, form):
    checkpoint = sources[form].load(mapped=True)
    files = {str(path): path.read_bytes() for path in checkpoint.origin.weights.files}
    on_disk = {key: tensor.clone() for key, tensor in checkpoint.origin.weights.tensors.items()}
    copied = load(sources[form].source, arch=sources[form].arch).model.state_dict()
    assert all(torch.equal(tensor, copied[key]) for key, tensor in checkpoint.model.state_dict().items())
    for parameter in checkpoint.model.parameters():
        assert file_at(parameter) in files
        with torch.no_grad():
            parameter.add_(1)
    assert {path: Path(path).read_bytes() for path in files} == files
    assert all(torch.equal(tensor, on_disk[key]) for key, tensor in checkpoint.origin.weights.tensors.items())


def test_without_being_asked_nothing_lies_in_the_file(sources):
    checkpoint = sources["directory"].load()
    assert {file_at(parameter) for parameter in checkpoint.model.parameters()} <= {"", "[heap]"}


def test_tensors_that_share_memory_on_disk_are_taken_apart(tmp_path):
    one = torch.ones(4)
    torch.save({"a": one, "b": one, "c": one.view(2, 2), "d": torch.ones(1).expand(3)}, tmp_path / "in.pth")
    own = read_weights((tmp_path / "in.pth",)).for_model(mapped=True)
    for number, tensor in enumerate(own.values()):
        tensor.fill_(number)
    assert [set(tensor.flatten().tolist()) for tensor in own.values()] == [{0.0}, {1.0}, {2.0}, {3.0}]


@pytest.mark.parametrize("form", ["directory", "smp", "flat safetensors", "flat pth"])
def test_where_nothing_changes_the_proof_finds_not_even_a_last_bit(run_cli, photos, sources, tmp_path, form):
    name = sources[form]
    flags = ("--arch", name.arch) if name.arch else ()
    words = ("calibrate", name.source, "--data", photos, "-o", tmp_path / "out", "--strategy", "preserve", *flags)
    ran = run_cli(*words, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["check"] == {"max_abs_change": 0.0, "interior": 0.0, "border": 0.0}
