"""State dicts in the forms that training code leaves them: each is calibrated, which proves what it wrote."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from equalize.checkpoint.families.torchvision.family import arguments_from, recognize
from equalize.checkpoint.files.weights import state_on_disk
from equalize.checkpoint.keys import pair
from equalize.checkpoint.loading import load
from equalize.errors import CheckpointError

NETWORK = """
import torch
from torch import nn

class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.low = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, stride=2, padding=1)

    def forward(self, x):
        low = self.norm(self.low(x)).relu()
        return low, self.deep(low)

class Net(nn.Module):
    def __init__(self, num_classes=2):
        super().__init__()
        self.encoder = Encoder()
        self.fuse = nn.Conv2d(16, 8, 3, padding=1)
        self.head = nn.Conv2d(8, num_classes, 1)

    def forward(self, x):
        low, deep = self.encoder(x)
        up = nn.functional.interpolate(deep, size=low.shape[2:], mode="bilinear")
        return self.head(self.fuse(torch.cat([low, up], 1)).relu())

class Twins(Net):
    def __init__(self):
        super().__init__()
        self.other = Encoder()
"""


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / "net.py"
    path.write_text(NETWORK)
    return path


@pytest.fixture(scope="module")
def state(network):
    from equalize.checkpoint.user_code import load_factory

    torch.manual_seed(0)
    return {key: tensor.clone() for key, tensor in load_factory(f"{network}:Net")().state_dict().items()}


def prefixed(state, prefix):
    return {prefix + key: tensor for key, tensor in state.items()}


def copied(state):
    return {key: tensor.clone() for key, tensor in state.items()}


def cast(state, dtype):
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in state.items()}


def same_bits(one, other):
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def without_counters(state):
    """As PyTorch saved networks before 0.4.1."""
    return {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}


def in_one_storage(state):
    floats = {key: tensor for key, tensor in state.items() if tensor.is_floating_point()}
    flat = torch.cat([tensor.flatten() for tensor in floats.values()])
    parts = flat.split([tensor.numel() for tensor in floats.values()])
    views = {key: part.view(floats[key].shape) for key, part in zip(floats, parts, strict=True)}
    return {key: views.get(key, tensor) for key, tensor in state.items()}


LIGHTNING = {
    "epoch": 3,
    "global_step": 99,
    "pytorch-lightning_version": "2.5.0",
    "hyper_parameters": {"lr": 1e-3, "widths": (8, 8)},
    "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "x", "best_model_score": torch.tensor(0.5)}},
    "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
    "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-3}]}],
    "lr_schedulers": [],
}

OPTIMIZER = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(2, 2)}}, "param_groups": [{"lr": 0.01}]}

FORMS = {
    "nnU-Net's network_weights": lambda s: {
        "network_weights": s,
        "optimizer_state": OPTIMIZER,
        "grad_scaler_state": {"scale": 65536.0, "_growth_tracker": 7},
        "logging": {"ema_fg_dice": [np.float64(0.5)], "lrs": [0.01]},
        "_best_ema": np.float64(0.5),
        "init_args": {"fold": 0, "plans": {"spacing": np.array([1.0, 0.5])}},
        "inference_allowed_mirroring_axes": (0, 1),
    },
    "model_state": lambda s: {"epoch": 9, "model_state": prefixed(s, "module."), "best_iou": np.float32(0.5)},
    "a name of its own, twice nested": lambda s: {"run": {"weights of the best": s, "seed": torch.tensor(3)}},
    "beside a tensor": lambda s: {"epoch": torch.tensor(3), "unet": s, "criterion": {"pos_weight": torch.ones(3)}},
    "flat, with a dict in it": lambda s: {**s, "_extra_state": {"scale": torch.ones(2, 2)}},
    "plain": lambda s: s,
    "ema alone": lambda s: {"ema": s},
    "nested twice": lambda s: {"model": {"state_dict": s}, "epoch": 3},
    "a nest of something else first": lambda s: {"model": {"name": "unet"}, "net": s},
    "module.": lambda s: prefixed(s, "module."),
    "stacked prefixes": lambda s: {"state_dict": prefixed(s, "model._orig_mod.module.")},
    "lightning model.": lambda s: {**LIGHTNING, "state_dict": prefixed(s, "model.") | {"loss.weight": torch.ones(2)}},
    "lightning, called as its author did": lambda s: {
        **LIGHTNING,
        "state_dict": prefixed(s, "segmentor.") | {"loss.weight": torch.ones(2)},
    },
    "teacher": lambda s: {"teacher": prefixed(s, "module."), "epoch": 3},
    "float16": lambda s: cast(s, torch.float16),
    "float16 below its normal numbers": lambda s: cast(s | {"fuse.weight": s["fuse.weight"] / 1000}, torch.float16),
    "float64": lambda s: cast(s, torch.float64),
    "bfloat16": lambda s: cast(s, torch.bfloat16),
    "channels last": lambda s: {
        key: tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
        for key, tensor in s.items()
    },
    "views of one storage": in_one_storage,
    "without counters": without_counters,
    "extra keys": lambda s: s | {"anchor": torch.tensor([float("nan"), 1.0]), "steps": torch.tensor(7)},
}


def through_the_command_line(run_cli, path, out, photos, *flags, calibrate=(), whole=False):
    common = [*flags, "--json"]
    if whole:
        ran = run_cli("scan", path, "--size", 48, *common)
        assert ran.code == 0, ran.err
    ran = run_cli("calibrate", path, "--data", photos, "-o", out, "--strategy", "rescale", *calibrate, *common)
    assert ran.code == 0, ran.err
    changed = json.loads(ran.out)["changed"]
    assert changed
    if whole:
        ran = run_cli("verify", out, "--against", path, *common)
        assert ran.code == 0, ran.err
    return set(changed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_every_form_is_equalized_and_comes_out_as_it_went_in(run_cli, photos, network, state, tmp_path, form, suffix):
    content = FORMS[form](copied(state))
    path = tmp_path / f"in{suffix}"
    if suffix == ".pth":
        torch.save(content, path)
    elif form in ("module.", "bfloat16", "without counters", "extra keys"):
        save_file(content, path)
    else:
        pytest.skip("safetensors has no such form")
    flags = ("--arch", f"{network}:Net")
    whole = form in ("stacked prefixes", "bfloat16", "without counters")
    changed = through_the_command_line(run_cli, path, tmp_path / "out", photos, *flags, whole=whole)
    before, after = state_on_disk(path), state_on_disk(tmp_path / "out")
    assert list(before) == list(after)
    assert len(before) >= len(state) - (form == "without counters")
    assert all(tensor.dtype == after[key].dtype for key, tensor in before.items())
    assert changed == {key for key, tensor in before.items() if not same_bits(tensor, after[key])}
    if suffix == ".pth":
        written = torch.load(tmp_path / "out" / "model.pth", weights_only=False)  # our own, with numpy's scalars
        assert list(written) == list(content)
        expected = without_counters(state) if form == "without counters" else state
        assert load_file(tmp_path / "out" / "model.safetensors").keys() == expected.keys()


def test_where_a_file_has_two_state_dicts_one_is_chosen_and_named(run_cli, photos, network, state, tmp_path):
    content = {"model": copied(state), "ema": copied(state)}
    torch.save(content, tmp_path / "in.pth")
    ran = run_cli("scan", tmp_path / "in.pth", "--arch", f"{network}:Net", "--size", 48, "--json")
    assert "read from 'model'; left as it is: 'ema'" in " ".join(ran.err.split())
    through_the_command_line(run_cli, tmp_path / "in.pth", tmp_path / "out", photos, "--arch", f"{network}:Net")
    written = torch.load(tmp_path / "out" / "model.pth", weights_only=True)
    assert not torch.equal(written["model"]["fuse.weight"], state["fuse.weight"])
    assert all(torch.equal(written["ema"][key], tensor) for key, tensor in state.items())


def test_where_a_file_has_two_state_dicts_of_unknown_names_the_flag_chooses(run_cli, photos, network, state, tmp_path):
    path, out, flags = tmp_path / "in.pth", tmp_path / "out", ("--arch", f"{network}:Net")
    other = {key: tensor + 1 for key, tensor in state.items()}
    torch.save({"gan": {"generator": copied(state), "critic": other}, "optim_g": OPTIMIZER}, path)
    ran = run_cli("scan", path, *flags)
    assert ran.code == 2
    expected = (
        "several state dicts, got gan/generator (13 tensors), gan/critic (13 tensors); choose one with --key NAME"
    )
    assert expected in ran.err
    ran = run_cli("scan", path, *flags, "--key", "discriminator")
    assert ran.code == 2
    assert "holds no state dict under --key discriminator, got gan/generator" in ran.err
    through_the_command_line(run_cli, path, out, photos, *flags, "--key", "gan/generator", whole=True)
    written = torch.load(out / "model.pth", weights_only=True)["gan"]
    assert not torch.equal(written["generator"]["fuse.weight"], state["fuse.weight"])
    assert all(torch.equal(written["critic"][key], tensor) for key, tensor in other.items())
    assert json.loads((out / "equalize.json").read_text())["key"] == "gan/generator"
    assert "gan/critic" in load(out, f"{network}:Net").notes[0]  # OUT needs no flag
    assert run_cli("apply", out, path, *flags, "-o", tmp_path / "again").code == 0
    again = torch.load(tmp_path / "again" / "model.pth", weights_only=True)["gan"]
    assert torch.equal(again["generator"]["fuse.weight"], written["generator"]["fuse.weight"])


@pytest.mark.parametrize(("prefix", "average"), [("model.", "ema_model.module."), ("", "model_ema.")])
def test_a_second_copy_among_the_keys_is_named(network, state, tmp_path, prefix, average):
    """As a Lightning module has it that keeps averages of its network's weights."""
    doubled = {key: tensor * 2 if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    content = {**LIGHTNING, "state_dict": prefixed(doubled, average) | prefixed(state, prefix)}
    torch.save(content, tmp_path / "in.ckpt")
    loaded = load(tmp_path / "in.ckpt", f"{network}:Net")
    assert torch.equal(loaded.model.state_dict()["fuse.weight"], state["fuse.weight"])
    said = f"in.ckpt: holds the network once more, which is left as it is, under {average[:-1]!r}"
    assert said in loaded.notes


def test_a_key_overrules_the_first_of_known_names(network, state, tmp_path):
    torch.save({"model": copied(state), "ema": {key: tensor * 2 for key, tensor in state.items()}}, tmp_path / "in.pth")
    found = load(tmp_path / "in.pth", f"{network}:Net", key="ema").model.state_dict()
    assert torch.equal(found["fuse.weight"], state["fuse.weight"] * 2)
    save_file(state, tmp_path / "in.safetensors")
    with pytest.raises(CheckpointError, match=r"--key: in\.safetensors is safetensors"):
        load(tmp_path / "in.safetensors", f"{network}:Net", key="ema")


WRAPPED = {
    "each part in DataParallel": lambda key: re.sub(r"^(\w+)\.", r"\1.module.", key),
    "one part in DataParallel": lambda key: key.replace("encoder.", "encoder.module."),
    "one part compiled, all in DDP": lambda key: "module." + key.replace("encoder.", "encoder._orig_mod."),
    "under another name, one part compiled": lambda key: "segmentor." + key.replace("encoder.", "encoder._orig_mod."),
    "FSDP around every layer": lambda key: "_fsdp_wrapped_module." + key.replace(".", "._fsdp_wrapped_module."),
    "checkpointed activations": lambda key: key.replace("norm.", "norm._checkpoint_wrapped_module."),
    "Lightning's Fabric": lambda key: "_forward_module.module." + key,
}


@pytest.mark.parametrize("form", WRAPPED)
def test_names_of_wrappers_are_taken_out_wherever_they_stand(run_cli, photos, network, state, tmp_path, form):
    wrapped = {WRAPPED[form](key): tensor for key, tensor in copied(state).items()}
    assert list(wrapped) != list(state)
    torch.save({"state_dict": wrapped}, tmp_path / "in.pth")
    flags = ("--arch", f"{network}:Net")
    through_the_command_line(run_cli, tmp_path / "in.pth", tmp_path / "out", photos, *flags)
    written = torch.load(tmp_path / "out" / "model.pth", weights_only=True)["state_dict"]
    differing = {key for key, tensor in wrapped.items() if not torch.equal(tensor, written[key])}
    assert list(written) == list(wrapped)
    flat = load_file(tmp_path / "out" / "model.safetensors")
    assert flat.keys() == state.keys()
    assert not torch.equal(flat["fuse.weight"], state["fuse.weight"])
    assert differing == {WRAPPED[form](key) for key in state if not torch.equal(flat[key], state[key])}


def test_torchvision_recognizes_its_networks_in_wrappers(lraspp_state):
    wrapped = {re.sub(r"^(\w+)\.", r"\1.module.", key): tensor.shape for key, tensor in lraspp_state.items()}
    assert recognize(wrapped, "in.pth") == "lraspp_mobilenet_v3_large"
    few = torch.Size([7, *wrapped["classifier.module.low_classifier.weight"][1:]])
    shapes = {**wrapped, "classifier.module.low_classifier.weight": few}
    assert arguments_from("lraspp_mobilenet_v3_large", shapes)["num_classes"] == 7


def test_a_layer_that_is_called_like_a_wrapper_stays_one():
    shape = torch.Size([2])
    model = dict.fromkeys(("a.module.weight", "b.weight", "c.weight"), shape)
    plain = pair(model, model)
    mixed = pair(model, dict.fromkeys(("module.a.module.weight", "module.b.module.weight", "module.c.weight"), shape))
    assert plain.complete
    assert mixed.complete
    assert mixed.on_disk["a.module.weight"] == "module.a.module.weight"
    two = dict.fromkeys(("a.module.weight", "a.weight"), shape)  # which one is meant cannot be told
    assert pair(two, two).on_disk == {key: key for key in two}


def test_an_encoder_in_a_wrapper_whose_decoder_is_drawn(network, state, tmp_path):
    half = {f"encoder.module.{key[8:]}": tensor for key, tensor in state.items() if key.startswith("encoder.")}
    torch.save(half, tmp_path / "in.pth")
    checkpoint = load(tmp_path / "in.pth", f"{network}:Net", init_missing=True)
    checkpoint.save(tmp_path / "out")
    assert {"encoder.module.low.weight", "head.weight"} <= state_on_disk(tmp_path / "out").keys()
    again = load(tmp_path / "out", f"{network}:Net").model.state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in checkpoint.model.state_dict().items())


def test_a_wrapper_without_a_known_name_is_said(network, state, tmp_path):
    torch.save(prefixed(state, "module.unet."), tmp_path / "in.pth")
    checkpoint = load(tmp_path / "in.pth", arch=f"{network}:Net")
    assert checkpoint.notes == ("in.pth: the network was taken to be what lies under 'module.unet'",)
    torch.save(prefixed(state, "student.") | prefixed(state, "teacher."), tmp_path / "two.pth")
    with pytest.raises(CheckpointError, match="no key in common"):
        load(tmp_path / "two.pth", arch=f"{network}:Net")


def test_a_classifier_of_other_classes_is_drawn_and_proven(run_cli, photos, network, state, tmp_path):
    torch.save(copied(state), tmp_path / "in.pth")
    flags, more = ("--arch", f"{network}:Net"), ["--init-missing", "--num-classes", 5]
    through_the_command_line(run_cli, tmp_path / "in.pth", tmp_path / "out", photos, *flags, calibrate=more, whole=True)
    assert state_on_disk(tmp_path / "out")["head.weight"].shape[0] == 5


def test_a_safetensors_copy_that_was_tampered_with_is_found(run_cli, photos, network, state, tmp_path):
    """Where the function may change, and where the tensor has no part in it."""
    torch.save(prefixed(state, "module.") | {"module.unused": torch.ones(2)}, tmp_path / "in.pth")
    flags = ("--arch", f"{network}:Net")
    through_the_command_line(run_cli, tmp_path / "in.pth", tmp_path / "out", photos, *flags, whole=True)
    copy = load_file(tmp_path / "out" / "model.safetensors")
    save_file(copy | {"head.bias": copy["head.bias"] + 1e-3}, tmp_path / "out" / "model.safetensors")
    ran = run_cli("verify", tmp_path / "out", "--against", tmp_path / "in.pth", *flags)
    assert (ran.code, ran.out) == (4, "")
    assert "head.bias" in ran.err


def test_weights_of_ones_own_beside_those_that_were_written(network, state, tmp_path):
    """Either may be the newer one: none is read without a word."""
    torch.save(state, tmp_path / "in.pth")
    load(tmp_path / "in.pth", arch=f"{network}:Net").save(tmp_path / "out")
    load(tmp_path / "out", arch=f"{network}:Net")
    trained = {key: 2 * tensor for key, tensor in load_file(tmp_path / "out" / "model.safetensors").items()}
    save_file(trained, tmp_path / "out" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"other weights in model\.safetensors than in model\.pth"):
        load(tmp_path / "out", arch=f"{network}:Net")
    (tmp_path / "out" / "model.pth").unlink()
    assert torch.equal(load(tmp_path / "out", arch=f"{network}:Net").model.head.bias, trained["head.bias"])


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("by_index", [False, True])
def test_shards(run_cli, photos, network, state, tmp_path, suffix, by_index):
    directory = tmp_path / "in"
    directory.mkdir()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    keys = list(state)
    weight_map = {key: f"{stem}-0000{1 + (n > 4)}-of-00002.{suffix}" for n, key in enumerate(keys)}
    for name in set(weight_map.values()):
        part = {key: state[key] for key in keys if weight_map[key] == name}
        save_file(part, directory / name) if suffix == "safetensors" else torch.save(part, directory / name)
    index = directory / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    flags = ("--arch", f"{network}:Net")
    through_the_command_line(run_cli, index if by_index else directory, tmp_path / "out", photos, *flags)
    written = json.loads((tmp_path / "out" / index.name).read_text())
    assert written["weight_map"] == weight_map
    for name in set(weight_map.values()):
        found = state_on_disk(tmp_path / "out" / name)
        assert set(found) == {key for key in keys if weight_map[key] == name}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_an_encoder_saved_by_itself_is_put_where_it_belongs(run_cli, photos, network, state, tmp_path, prefix):
    bare = {key.removeprefix("encoder."): tensor for key, tensor in state.items() if key.startswith("encoder.")}
    content = prefixed(bare | {"fc.weight": torch.ones(10, 8), "fc.bias": torch.ones(10)}, prefix)
    torch.save(content, tmp_path / "in.pth")
    flags = ("--arch", f"{network}:Net")
    with pytest.raises(CheckpointError, match="--init-missing"):
        load(tmp_path / "in.pth", arch=flags[1])
    checkpoint = load(tmp_path / "in.pth", arch=flags[1], init_missing=True)
    assert set(checkpoint.newly_initialized) == {"fuse.weight", "fuse.bias", "head.weight", "head.bias"}
    assert torch.equal(checkpoint.model.state_dict()["encoder.low.weight"], state["encoder.low.weight"])
    left = f"in.pth: left out, as no part of the network: {prefix}fc.bias, {prefix}fc.weight"
    assert checkpoint.notes == ("in.pth: 9 tensors were taken as those of encoder", left)
    through_the_command_line(
        run_cli, tmp_path / "in.pth", tmp_path / "out", photos, *flags, calibrate=["--init-missing"]
    )
    written = state_on_disk(tmp_path / "out")
    assert set(written) == set(state)
    again = load(tmp_path / "out", arch=flags[1])
    assert again.newly_initialized == ()
    copy = load_file(tmp_path / "out" / "model.safetensors")
    assert again.model.state_dict().keys() == copy.keys()
    assert all(torch.equal(tensor, copy[key]) for key, tensor in again.model.state_dict().items())


def test_an_encoder_that_fits_in_two_places_is_refused(network, state, tmp_path):
    bare = {key.removeprefix("encoder."): tensor for key, tensor in state.items() if key.startswith("encoder.")}
    torch.save(bare, tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match="fits several parts of Twins: encoder and other"):
        load(tmp_path / "in.pth", arch=f"{network}:Twins", init_missing=True)


def test_an_encoder_of_another_width_is_refused(network, state, tmp_path):
    bare = {key.removeprefix("encoder."): tensor for key, tensor in state.items() if key.startswith("encoder.")}
    torch.save(bare | {"deep.bias": torch.ones(9)}, tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match="no key in common"):
        load(tmp_path / "in.pth", arch=f"{network}:Net", init_missing=True)


def test_an_imagenet_resnet_under_a_torchvision_network():
    from torchvision.models import resnet50
    from torchvision.models.segmentation import deeplabv3_resnet50

    with torch.device("meta"):
        resnet, network = resnet50(weights=None), deeplabv3_resnet50(weights=None, weights_backbone=None)
    shapes = [{key: tensor.shape for key, tensor in each.state_dict().items()} for each in (network, resnet)]
    match = pair(*shapes)
    assert match.submodule == "backbone."
    assert set(match.on_disk.values()) == {key for key in shapes[1] if not key.startswith("fc.")}
    assert not match.unexpected
    assert {key.partition(".")[0] for key in match.missing} == {"classifier"}
    with pytest.raises(CheckpointError, match=r"part of several networks.*--arch"):
        recognize(shapes[1], "x.pth")


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors", "equalize.json", "architecture.json"])
def test_of_a_file_in_an_equalized_directory_the_directory_is_asked_for(network, tmp_path, name):
    """Alone it would be read without its plan, and equalized twice or trained without."""
    out = tmp_path / "out"
    out.mkdir()
    weights = {"fuse.weight": torch.zeros(1)}
    torch.save(weights, out / "model.pth")
    save_file(weights, out / "model.safetensors")
    for beside in ("equalize.json", "architecture.json"):
        (out / beside).write_text("{}")
    with pytest.raises(CheckpointError, match=f"{name}: is one file of a checkpoint.*; give the directory: {out}$"):
        load(out / name, arch=f"{network}:Net")


def test_of_weights_that_only_their_directory_describes_it_is_asked_for(segformer_dir):
    with pytest.raises(CheckpointError, match=f"fits no known architecture.*; give the directory: {segformer_dir}, or"):
        load(segformer_dir / "model.safetensors")
