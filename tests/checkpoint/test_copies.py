"""Models own copies of their weights: writing to a model changes neither its file nor what was read from it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from equalize.checkpoint.loading import ModelName


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


@pytest.mark.parametrize("form", ["directory", "shards", "smp", "state dict", "flat safetensors", "flat pth"])
def test_writing_to_a_model_leaves_its_file_alone(sources, form):
    checkpoint = sources[form].load()
    files = {path: path.read_bytes() for path in checkpoint.stored.keys.weights.files}
    on_disk = {key: tensor.clone() for key, tensor in checkpoint.stored.keys.weights.tensors.items()}
    for parameter in checkpoint.model.parameters():
        assert parameter.dtype == torch.float32
        with torch.no_grad():
            parameter.add_(1)
    assert {path: path.read_bytes() for path in files} == files
    assert all(torch.equal(tensor, on_disk[key]) for key, tensor in checkpoint.stored.keys.weights.tensors.items())


@pytest.mark.parametrize("form", ["directory", "smp", "flat safetensors", "flat pth"])
def test_where_nothing_changes_the_proof_finds_not_even_a_last_bit(run_cli, photos, sources, tmp_path, form):
    name = sources[form]
    flags = ("--arch", name.arch) if name.arch else ()
    words = ("calibrate", name.source, "--data", photos, "-o", tmp_path / "out", "--strategy", "preserve", *flags)
    ran = run_cli(*words, "--json")
    assert ran.code == 0, ran.err
    # Exact: both models run the same kernels on the same values, at aligned addresses whatever the file has.
    assert json.loads(ran.out)["check"] == {"max_abs_change": 0.0, "interior": 0.0, "border": 0.0}


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
    assert one == two
    assert {tensor.dtype for key, tensor in load_file(tmp_path / "one" / "model.safetensors").items()} >= {dtype}


def test_the_state_of_a_training_stays_behind_and_is_named(run_cli, photos, segformer_dir, tmp_path):
    """transformers' Trainer writes it beside the weights, Accelerate and DeepSpeed in files of their own."""
    trained = tmp_path / "checkpoint-40"
    shutil.copytree(segformer_dir, trained)
    state = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "scaler.pt", "random_states_0.pkl")
    for name in (*state, "training_args.bin", "notes/README.md"):
        (trained / name).parent.mkdir(exist_ok=True)
        (trained / name).write_bytes(b"x")
    for name in ("global_step40/mp_rank_00_model_states.pt", "checkpoint-20/model.safetensors"):
        (trained / name).parent.mkdir()
        (trained / name).write_bytes(b"x")
    ran = run_cli("calibrate", trained, "--data", photos, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    mine = {path.name for path in segformer_dir.iterdir()}
    assert written == {*mine, "equalize.json", "training_args.bin", "notes/README.md"}
    line = "checkpoint-40: holds the state of a training too, which copies leave out: "
    line += "checkpoint-20, global_step40, optimizer.pt and 5 more"
    assert line in ran.text


def test_a_state_dict_beside_the_state_of_its_training_is_the_only_choice(lraspp_state, tmp_path):
    torch.save(lraspp_state, tmp_path / "weights.pth")
    torch.save({"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}, tmp_path / "optimizer.pth")
    checkpoint = ModelName(source=str(tmp_path)).load()
    assert checkpoint.architecture == "lraspp_mobilenet_v3_large"
    torch.save({"state_dict": lraspp_state, "optimizer_states": [], "epoch": 3}, tmp_path / "weights.pth")
    notes = ModelName(source=str(tmp_path / "weights.pth")).load().notes
    assert notes == ("weights.pth: holds the state of a training too, which copies keep: optimizer_states",)
