"""smp directories, torchvision and other state dicts: recognized, built, written back with nesting and prefixes."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from equalize.checkpoint.files.weights import state_on_disk
from equalize.checkpoint.loading import load, reload
from equalize.errors import CheckpointError, ResourceError

DECODER = {"encoder_name": "tu-test_resnet.r160_in1k", "decoder_channels": [16, 8, 8, 8, 8], "classes": 2}
NETWORK = """
from torch import nn
import helper

class Net(nn.Module):
    def __init__(self, width=4, num_classes=2):
        super().__init__()
        self.model = nn.Conv2d(3, width, 3, padding=1)
        self.head = helper.head(width, num_classes)

    def forward(self, x):
        return {"out": self.head(self.model(x))}

def broken():
    raise OSError("no\\nluck")

def ends():
    raise SystemExit("usage: train.py")
"""


def refusal(path, **arguments) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same_bits(a, b) -> bool:
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def network_file(tmp_path):
    (tmp_path / "helper.py").write_text("from torch import nn\ndef head(a, b):\n    return nn.Conv2d(a, b, 1)\n")
    path = tmp_path / "net.py"
    path.write_text(NETWORK)
    yield path
    sys.modules.pop("helper", None)


def test_smp_directory_round_trip(smp_dir, tmp_path, capfd):
    import segmentation_models_pytorch as smp

    checkpoint = load(smp_dir)
    assert (checkpoint.family, checkpoint.architecture) == ("smp", "Unet")
    with torch.no_grad():
        checkpoint.model.decoder.blocks[0].conv1[0].weight.mul_(2)
    checkpoint.save(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in smp_dir.iterdir()}
    again = reload(tmp_path / "out")
    assert capfd.readouterr().out == ""
    stock = smp.from_pretrained(tmp_path / "out")
    for model in (again, stock):
        assert same_bits(model.state_dict(), checkpoint.model.state_dict())
    before, after = state_on_disk(smp_dir), state_on_disk(tmp_path / "out")
    assert [k for k in before if not torch.equal(before[k], after[k])] == ["decoder.blocks.0.conv1.0.weight"]
    meta = load(smp_dir, weights=False)
    assert next(meta.model.parameters()).is_meta


def test_smp_with_other_classes(smp_dir, tmp_path):
    assert "--init-missing" in refusal(smp_dir, num_classes=6)
    checkpoint = load(smp_dir, num_classes=6, init_missing=True)
    assert checkpoint.newly_initialized == ("segmentation_head.0.weight", "segmentation_head.0.bias")
    checkpoint.save(tmp_path / "out")
    assert load(tmp_path / "out").logits(torch.ones(1, 3, 32, 32)).shape == (1, 6, 32, 32)


def test_smp_config_that_asks_for_something_else(smp_dir, tmp_path):
    config = json.loads((smp_dir / "config.json").read_text())
    for changes in ({"_model_class": "os"}, {"_model_class": 3}, {"encoder_name": "nope"}, {"decoder_channels": 1}):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        refusal(tmp_path, weights=False)


def test_smp_config_never_downloads_encoder_weights(smp_dir, tmp_path):
    """Offline, a download would fail."""
    config = json.loads((smp_dir / "config.json").read_text()) | {"encoder_weights": "imagenet"}
    for name in ("model.safetensors",):
        (tmp_path / name).write_bytes((smp_dir / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = load(tmp_path)
    checkpoint.save(tmp_path.with_name("out"))
    assert same_bits(reload(tmp_path.with_name("out")).state_dict(), checkpoint.model.state_dict())


def test_smp_state_dict_under_the_architecture_that_is_named(smp_resnet_dir, tmp_path):
    path = tmp_path / "unet.pth"
    torch.save(load_file(smp_resnet_dir / "model.safetensors"), path)
    assert load(path).arch == "smp:Unet"
    checkpoint = load(path, arch="smp:unet", arch_args={**DECODER, "encoder_name": "resnet18"})
    checkpoint.save(tmp_path / "out")
    again = load(tmp_path / "out")
    assert (again.family, again.architecture, again.arch) == ("smp", "Unet", "smp:unet")
    assert same_bits(again.model.state_dict(), checkpoint.model.state_dict())
    assert "resnet18" in checkpoint.preprocess.origin


def test_smp_state_dict_without_head_or_decoder(smp_dir, tmp_path):
    path = tmp_path / "encoder.safetensors"
    state = load_file(smp_dir / "model.safetensors")
    save_file({key: tensor for key, tensor in state.items() if key.startswith("encoder.")}, path)
    arguments = {"arch": "smp:Unet", "arch_args": DECODER}
    sentence = refusal(path, **arguments)
    assert "missing (decoder.blocks" in sentence
    assert "--init-missing" in sentence
    checkpoint = load(path, init_missing=True, num_classes=3, seed=3, **arguments)
    assert all(key.startswith(("decoder.", "segmentation_head.")) for key in checkpoint.newly_initialized)
    twin = load(path, init_missing=True, num_classes=3, seed=3, **arguments)
    assert same_bits(checkpoint.model.state_dict(), twin.model.state_dict())
    checkpoint.save(tmp_path / "out")
    assert load(tmp_path / "out").newly_initialized == ()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("deeplabv3_resnet50", {"aux_loss": True, "num_classes": 21}),
        ("deeplabv3_resnet101", {"aux_loss": False, "num_classes": 3}),
        ("deeplabv3_mobilenet_v3_large", {"aux_loss": True, "num_classes": 4}),
        ("fcn_resnet50", {"aux_loss": False, "num_classes": 1}),
        ("fcn_resnet101", {"aux_loss": True, "num_classes": 256}),
        ("lraspp_mobilenet_v3_large", {"num_classes": 5}),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module._orig_mod."])
def test_torchvision_networks_are_recognized_by_keys_and_shapes(name, arguments, prefix):
    from torchvision.models import get_model_builder

    from equalize.checkpoint.families.torchvision.family import arguments_from, recognize

    with torch.device("meta"):
        model = get_model_builder(name)(weights=None, weights_backbone=None, **arguments)
    shapes = {prefix + key: tensor.shape for key, tensor in model.state_dict().items()}
    assert recognize(shapes, "file.pth") == name
    assert arguments_from(name, shapes) == arguments


def test_safetensors_state_dict_stays_one(lraspp_state, tmp_path):
    save_file(lraspp_state, tmp_path / "in.safetensors")
    load(tmp_path / "in.safetensors").save(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"architecture.json", "model.safetensors"}
    assert load(tmp_path / "out").architecture == "lraspp_mobilenet_v3_large"


def test_metadata_and_legacy_format_are_read(lraspp_state, tmp_path):
    torch.save(lraspp_state, tmp_path / "in.pt", _use_new_zipfile_serialization=False)
    checkpoint = load(tmp_path / "in.pt")
    with torch.no_grad():
        checkpoint.model.classifier.high_classifier.weight.mul_(2)
    checkpoint.save(tmp_path / "out")
    written = torch.load(tmp_path / "out" / "model.pth", weights_only=True)
    assert written._metadata == lraspp_state._metadata
    assert same_bits(dict(written), checkpoint.model.state_dict())


def test_keys_that_do_not_fit(lraspp_state, tmp_path):
    state = dict(lraspp_state)
    state["backbone.zzz.weight"] = state.pop("backbone.0.0.weight")
    state["classifier.cbr.0.weight"] = torch.ones(7, 960, 1, 1)
    torch.save(state, tmp_path / "in.pth")
    sentence = refusal(tmp_path / "in.pth", arch="torchvision:lraspp_mobilenet_v3_large")
    assert "1 missing (backbone.0.0.weight)" in sentence
    assert "1 unexpected (backbone.zzz.weight)" in sentence
    assert "1 of another shape (classifier.cbr.0.weight (7, 960, 1, 1) for (128, 960, 1, 1))" in sentence
    assert "does not fit lraspp_mobilenet_v3_large" in refusal(tmp_path / "in.pth")  # the closest


def test_only_the_first_three_keys_are_listed(lraspp_state, tmp_path):
    torch.save({key: t for key, t in lraspp_state.items() if not key.startswith("backbone.1")}, tmp_path / "in.pth")
    sentence = refusal(tmp_path / "in.pth", arch="torchvision:lraspp_mobilenet_v3_large")
    assert sentence.count("backbone.1") == 3
    assert " more)" in sentence


def test_torchvision_with_other_classes_or_without_head(lraspp_state, tmp_path):
    torch.save(lraspp_state, tmp_path / "in.pth")
    assert "--init-missing" in refusal(tmp_path / "in.pth", num_classes=9)
    checkpoint = load(tmp_path / "in.pth", num_classes=9, init_missing=True)
    assert {key.rpartition(".")[0] for key in checkpoint.newly_initialized} == {
        "classifier.low_classifier",
        "classifier.high_classifier",
    }
    backbone = {key: tensor for key, tensor in lraspp_state.items() if key.startswith("backbone.")}
    torch.save(backbone, tmp_path / "backbone.pth")
    assert "several" in refusal(tmp_path / "backbone.pth", init_missing=True)
    arguments = {"arch": "torchvision:lraspp_mobilenet_v3_large", "init_missing": True}
    checkpoint = load(tmp_path / "backbone.pth", num_classes=2, **arguments)
    checkpoint.save(tmp_path / "out")
    assert load(tmp_path / "out").logits(torch.ones(1, 3, 32, 32)).shape[1] == 2


def test_tied_tensors_stay_tied_and_are_written_once(tmp_path):
    shared = torch.randn(100, 100)
    torch.save({"a": shared, "b": shared}, tmp_path / "in.pth")

    checkpoint = load(tmp_path / "in.pth", arch=f"{__name__}:Tied")
    with torch.no_grad():
        checkpoint.model.a.mul_(2)
    checkpoint.save(tmp_path / "out")
    written = torch.load(tmp_path / "out" / "model.pth", weights_only=True)
    assert written["a"].data_ptr() == written["b"].data_ptr()
    assert torch.equal(written["b"], shared * 2)
    reload(tmp_path / "out", arch=f"{__name__}:Tied")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(100, 100))
        self.b = self.a


def test_a_factory_in_a_file(network_file, tmp_path):
    torch.save({"model.weight": torch.randn(8, 3, 3, 3), "model.bias": torch.ones(8)}, tmp_path / "in.pth")
    arguments = {"arch": f"{network_file}:Net", "arch_args": {"width": 8}}
    assert "2 missing (head.weight, head.bias)" in refusal(tmp_path / "in.pth", **arguments)
    checkpoint = load(tmp_path / "in.pth", init_missing=True, num_classes=5, **arguments)
    assert checkpoint.family == "custom"
    assert checkpoint.newly_initialized == ("head.weight", "head.bias")
    assert checkpoint.logits(torch.ones(1, 3, 8, 8)).shape == (1, 5, 8, 8)
    checkpoint.save(tmp_path / "out")
    assert "--arch" in refusal(tmp_path / "out")
    assert not load(tmp_path / "out", arch=checkpoint.arch).newly_initialized
    reload(tmp_path / "out", arch=checkpoint.arch)
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("arch", "what"),
    [
        ("absent.py:Net", "no such file"),
        ("{file}:Missing", "no factory 'Missing'"),
        ("{file}:broken", "no luck"),
        ("{file}:ends", "usage: train.py"),
        ("{file}:nn", "no factory"),
        ("{file}", "no architecture"),
        ("absent_module:Net", "absent_module"),
        ("json:dumps", "cannot be built"),
        ("smp:Nope", "UPerNet"),
        ("torchvision:resnet50", "lraspp"),
        ("transformers:/nowhere", "no such file"),
        (":", "no architecture"),
    ],
)
def test_architectures_that_are_none(network_file, tmp_path, arch, what):
    torch.save({"a": torch.ones(1)}, tmp_path / "in.pth")
    assert what in refusal(tmp_path / "in.pth", arch=arch.format(file=network_file))


def test_a_record_cannot_name_code_or_downloads(lraspp_state, tmp_path):
    save_file(lraspp_state, tmp_path / "model.safetensors")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    record = tmp_path / "architecture.json"
    for arch in (f"{tmp_path}/evil.py:Net", "os:system", "transformers:/elsewhere"):
        record.write_text(json.dumps({"arch": arch, "arch_args": {"command": f"touch {tmp_path}/canary"}}))
        assert "--arch" in refusal(tmp_path)
    record.write_text(
        json.dumps({"arch": "torchvision:lraspp_mobilenet_v3_large", "arch_args": {"weights": "DEFAULT"}})
    )
    load(tmp_path)
    for content in ({"arch": 3}, {}, {"arch": "smp:Unet", "arch_args": [1]}):
        record.write_text(json.dumps(content))
        assert "record" in refusal(tmp_path)
    assert not (tmp_path / "canary").exists()


def test_arguments_without_their_flag():
    assert "--arch" in refusal("x.pth", arch_args={"classes": 3})


def test_torchvision_by_name():
    meta = load("torchvision:deeplabv3_resnet50", weights=False)
    assert next(meta.model.parameters()).is_meta
    assert meta.classes[0] == "__background__"
    assert len(meta.classes) == 21
    assert "resnet50" in refusal("torchvision:nothing")


def test_torchvision_weights_without_network(tmp_path, monkeypatch, capsys):
    import urllib.error

    def offline(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(ResourceError, match="no route"):
        load("torchvision:lraspp_mobilenet_v3_large")
    assert capsys.readouterr() == ("", "")


def test_torchvision_weights_from_the_cache(lraspp_state, tmp_path, monkeypatch):
    from torchvision.models.segmentation import LRASPP_MobileNet_V3_Large_Weights as Published

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(lraspp_state, cache / Published.DEFAULT.url.rpartition("/")[2])
    checkpoint = load("torchvision:lraspp_mobilenet_v3_large")
    checkpoint.save(tmp_path / "out")
    assert (tmp_path / "out" / "model.pth").exists()
    assert same_bits(reload(tmp_path / "out").state_dict(), checkpoint.model.state_dict())
