"""Models that stay in their files: nothing of them is copied into memory but what is written to."""

import json
import mmap
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from equalize.checkpoint import load
from equalize.checkpoint.build import construct
from equalize.checkpoint.files.weights import read_weights
from equalize.checkpoint.model_name import ModelName
from equalize.mapped import MappedFiles, brought_as_needed, own


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
    # both networks are run from memory that is aligned alike
    assert json.loads(ran.out)["check"] == {"max_abs_change": 0.0, "interior": 0.0, "border": 0.0}


def resident(tensor) -> int:
    """Bytes of the mapping that a tensor lies in that are in memory, as the system counts them."""
    blocks = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    for block in blocks[1:]:
        first, last = (int(each, 16) for each in block.split(maxsplit=1)[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return int(re.search(r"(?m)^Rss:\s+(\d+) kB", block).group(1)) * 1024
    raise AssertionError("lies nowhere")


@pytest.fixture
def mapped(tmp_path):
    """A mapped tensor of 24 MB, at an odd address, and its values in memory."""
    values = torch.rand(3, 1 << 21, generator=torch.Generator().manual_seed(0))
    path = shifted({"a": values}, tmp_path / "large.safetensors")
    return read_weights((path,)).tensors["a"], values


def test_what_is_let_go_leaves_memory_and_is_read_again(mapped):
    tensor, values = mapped
    assert torch.equal(tensor, values)
    assert resident(tensor) >= tensor.nbytes
    MappedFiles().let_go(tensor)
    assert resident(tensor) <= 2 * mmap.PAGESIZE
    assert torch.equal(tensor, values)


@pytest.mark.parametrize("view", [lambda t: t[1], lambda t: t.t(), lambda t: t[:, ::2]], ids=["row", "turned", "steps"])
def test_views_are_let_go_as_far_as_they_reach(mapped, view):
    tensor, values = mapped
    tensor.sum()
    MappedFiles().let_go(view(tensor))
    assert resident(tensor) < tensor.nbytes * 0.7
    assert torch.equal(tensor, values)


def test_what_was_written_to_stays(mapped):
    tensor, values = mapped
    tensor[1, 5] = 7.0
    MappedFiles().let_go(tensor, tensor[1])
    assert tensor[1, 5] == 7.0
    values[1, 5] = 7.0
    assert torch.equal(tensor, values)


def test_memory_that_is_no_file_stays():
    tensor = torch.rand(1 << 20)
    before = tensor.clone()
    MappedFiles().let_go(tensor)
    assert torch.equal(tensor, before)


def test_comparing_and_copying_leave_nothing_in_memory(mapped):
    tensor, values = mapped
    files = MappedFiles()
    assert files.equal(tensor, values)
    assert torch.equal(files.copy(tensor, torch.float64), values.double())
    assert resident(tensor) <= 1 << 20  # what the system reads around a page
    values[2, -1] += 1
    assert not files.equal(tensor, values)


class Attention(nn.Module):
    """Reads the weight of its child itself, as `torch.nn.MultiheadAttention` does."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8))
        self.inner = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return self.norm(nn.functional.linear(x * self.scale, self.inner.weight, self.inner.bias)) + self.inner(x)


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def in_file(request, tmp_path):
    """A network whose tensors lie in a file in some dtype, and the same in memory in float32."""
    torch.manual_seed(0)
    there, here = nn.Sequential(Attention(), Attention()).eval(), nn.Sequential(Attention(), Attention()).eval()
    here.to(request.param).float()
    state = {key: tensor.to(request.param) for key, tensor in here.state_dict().items() if tensor.is_floating_point()}
    tensors = read_weights((shifted(state, tmp_path / "net.safetensors"),)).tensors
    for key, tensor in [*there.named_parameters(), *there.named_buffers()]:
        if key in tensors:
            tensor.data = tensors[key]
    return there, here, request.param


def test_layers_are_brought_as_they_are_needed(in_file):
    there, here, dtype = in_file
    x = torch.randn(4, 8)
    inside = []
    with brought_as_needed(there), torch.no_grad():
        there[0].inner.register_forward_hook(lambda *_: inside.append(file_at(there[0].inner.weight)))
        first, second = there(x), there(x)
        assert {tensor.dtype for tensor in there.parameters()} == {dtype}
    assert torch.equal(first, here(x))  # each layer comes to where an allocator puts it: the same kernels
    assert torch.equal(second, first)
    assert not any(name.endswith("net.safetensors") for name in inside)
    assert all(file_at(tensor).endswith("net.safetensors") for tensor in there.parameters())
    assert not there[0]._forward_pre_hooks


def test_an_interrupted_run_puts_everything_back(in_file):
    there, _, _ = in_file
    before = {key: (tensor.data_ptr(), tensor.dtype) for key, tensor in there.state_dict().items()}

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = there[1].norm.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), brought_as_needed(there):
        there(torch.randn(4, 8))
    handle.remove()
    assert {key: (tensor.data_ptr(), tensor.dtype) for key, tensor in there.state_dict().items()} == before


def test_own_gives_copies_that_can_be_written_to(in_file):
    there, here, _ = in_file
    own(there, ["0.scale", "0.norm.running_mean"])
    assert file_at(there[0].scale) in ("", "[heap]")
    assert there[0].norm.running_mean.dtype == torch.float32
    assert torch.equal(there[0].scale, here[0].scale)
    assert file_at(there[1].scale).endswith("net.safetensors")


class Tied(nn.Module):
    """Two layers with one weight, assigned; and a third with it, under one name more."""

    def __init__(self) -> None:
        super().__init__()
        weight = nn.Parameter(torch.randn(4, 4))
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.one.weight = weight
        self.two.weight = weight
        self.direct = self.one.weight
        self.register_buffer("table", torch.arange(4.0), persistent=False)


def test_a_network_built_empty_has_its_buffers_and_its_ties():
    model = construct(Tied, "Tied", weights=True, seed=0, empty=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.one.weight is model.two.weight is model.direct
    assert torch.equal(model.table, torch.arange(4.0))
    assert not nn.Linear(2, 2).weight.is_meta


def test_a_constructor_that_reads_its_parameters_builds_a_whole_network():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.largest = float(self.weight.max())

    model = construct(Reads, "Reads", weights=True, seed=0, empty=True)
    assert not model.weight.is_meta
    assert model.largest == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_a_plan_again_gives_the_same_bytes_of_half_precision_even_of_the_smallest_values(
    run_cli, photos, segformer_dir, tmp_path, dtype
):
    state = load_file(segformer_dir / "model.safetensors")
    key = next(key for key in state if key.endswith("linear_fuse.weight"))
    state[key] *= torch.logspace(0, -5, state[key].shape[0])[:, None, None, None]  # down to subnormal float16
    halves = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    save_file(halves, tmp_path / "half.safetensors", metadata={"format": "pt"})
    words = (tmp_path / "half.safetensors", "--arch", f"transformers:{segformer_dir}")
    ran = run_cli("calibrate", *words, "--data", photos, "-o", tmp_path / "one", "--strategy", "migrate")
    assert ran.code == 0, ran.err
    assert run_cli("apply", tmp_path / "one", *words, "-o", tmp_path / "two").code == 0
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two  # a plan replayed
    assert {tensor.dtype for key, tensor in load_file(tmp_path / "one" / "model.safetensors").items()} >= {dtype}
