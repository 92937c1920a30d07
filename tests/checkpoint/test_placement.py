"""Encoders that were saved by themselves: what comes out is the whole network, as its own library loads it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from equalize.checkpoint.files.weights import state_on_disk
from equalize.checkpoint.loading import load
from equalize.errors import CheckpointError
from tests.support.tolerance import assert_same_outputs

UNET = {"encoder_name": "tu-test_resnet.r160_in1k", "decoder_channels": [16, 8, 8, 8, 8], "classes": 2}
CLASSIFIER = {"fc.weight": torch.ones(10, 512), "fc.bias": torch.ones(10)}


def unet():
    import segmentation_models_pytorch as smp

    return smp.Unet(encoder_weights=None, **UNET)


@pytest.fixture(scope="module")
def encoder(smp_dir):
    """The encoder's state dict under the encoder's own keys. Copy before changing."""
    state = load_file(smp_dir / "model.safetensors")
    return {key.removeprefix("encoder."): tensor for key, tensor in state.items() if key.startswith("encoder.")}


def test_smp_loads_strictly_what_was_an_encoder(run_cli, photos, encoder, tmp_path):
    source, out = tmp_path / "in.pth", tmp_path / "out"
    torch.save(encoder | CLASSIFIER, source)
    flags = [word for key, value in UNET.items() for word in ("--arch-arg", f"{key}={json.dumps(value)}")]
    where = (source, "--data", photos, "-o", out, "--size", 32)
    ran = run_cli("calibrate", *where, "--arch", "smp:Unet", *flags, "--init-missing")
    assert ran.code == 0, ran.err
    ran = run_cli("verify", out, "--against", source)  # the plan tells the flags
    assert ran.code == 0, ran.err
    stock = unet()
    stock.load_state_dict(torch.load(out / "model.pth", weights_only=True), strict=True)
    assert torch.equal(stock.encoder.model.conv1[0].weight, encoder["model.conv1.0.weight"])
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert_same_outputs(load(out).logits(x), stock.eval()(x))


def test_the_nest_and_what_lies_around_it_stay(encoder, tmp_path):
    torch.save({"epoch": 3, "model": {"state_dict": encoder, "lr": 0.1}}, tmp_path / "in.pth")
    load(tmp_path / "in.pth", "smp:Unet", UNET, init_missing=True).save(tmp_path / "out")
    written = torch.load(tmp_path / "out" / "model.pth", weights_only=True)
    unet().load_state_dict(written["model"].pop("state_dict"), strict=True)
    assert written == {"epoch": 3, "model": {"lr": 0.1}}


def test_a_safetensors_file(encoder, tmp_path):
    save_file(encoder, tmp_path / "in.safetensors", {"format": "pt"})
    load(tmp_path / "in.safetensors", "smp:Unet", UNET, init_missing=True).save(tmp_path / "out")
    unet().load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)


def test_shards(encoder, tmp_path):
    parts = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map = {key: parts[key.startswith("model.layer4")] for key in encoder}
    for part in parts:
        save_file({key: encoder[key] for key in encoder if weight_map[key] == part}, tmp_path / part)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = load(tmp_path / "model.safetensors.index.json", "smp:Unet", UNET, init_missing=True)
    checkpoint.save(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    whole = {part: load_file(tmp_path / "out" / part) for part in parts}
    assert index["weight_map"] == {key: part for part, tensors in whole.items() for key in tensors}
    state = whole[parts[0]] | whole[parts[1]]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    unet().load_state_dict(state, strict=True)
    assert load(tmp_path / "out", "smp:Unet", UNET).newly_initialized == ()


def test_an_image_classifier_of_torchvision(tmp_path):
    from torchvision.models import mobilenet_v3_large
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large as lraspp

    torch.manual_seed(1)
    classifier = mobilenet_v3_large(weights=None).state_dict()
    torch.save(classifier, tmp_path / "in.pth")
    arch = "torchvision:lraspp_mobilenet_v3_large"
    checkpoint = load(tmp_path / "in.pth", arch, init_missing=True, num_classes=3)
    checkpoint.save(tmp_path / "out")
    stock = lraspp(weights=None, weights_backbone=None, num_classes=3).eval()
    stock.load_state_dict(torch.load(tmp_path / "out" / "model.pth", weights_only=True), strict=True)
    assert torch.equal(stock.backbone["0"][0].weight, classifier["features.0.0.weight"])
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert_same_outputs(checkpoint.logits(x), stock(x)["out"])


def test_a_wrapped_network_that_lacks_its_head_stays_wrapped(smp_dir, tmp_path):
    """Whoever wrapped it takes the wrapper off again."""
    state = {f"model.{key}": tensor for key, tensor in load_file(smp_dir / "model.safetensors").items()}
    kept = {key: tensor for key, tensor in state.items() if "segmentation_head" not in key}
    torch.save({"state_dict": kept | {"loss.weight": torch.ones(2)}}, tmp_path / "in.ckpt")
    load(tmp_path / "in.ckpt", "smp:Unet", UNET, init_missing=True).save(tmp_path / "out")
    assert set(state_on_disk(tmp_path / "out")) == {*state, "loss.weight"}


def swin_of(upernet_dir, kind, directory):
    """A network of transformers with the backbone of a UPerNet alone, saved by itself."""
    import transformers
    from transformers.utils import logging

    torch.manual_seed(2)
    config = transformers.UperNetConfig.from_pretrained(upernet_dir).backbone_config
    model = getattr(transformers, kind)(config)
    logging.disable_progress_bar()
    model.save_pretrained(directory)
    return model.state_dict()


@pytest.mark.parametrize(("kind", "lone"), [("SwinBackbone", False), ("SwinForImageClassification", True)])
def test_a_backbone_of_transformers_is_put_into_the_network_around_it(upernet_dir, tmp_path, kind, lone):
    from transformers import UperNetForSemanticSegmentation

    state = swin_of(upernet_dir, kind, tmp_path / "swin")
    torch.save(state, tmp_path / "swin.pth")
    source, out = tmp_path / ("swin.pth" if lone else "swin"), tmp_path / "out"
    checkpoint = load(source, f"transformers:{upernet_dir}", init_missing=True, num_classes=3)
    added = "backbone.hidden_states_norms."
    assert {key.partition(".")[0] for key in checkpoint.newly_initialized if not key.startswith(added)} == {
        "decode_head",
        "auxiliary_head",
    }
    assert any(key.startswith(added) for key in checkpoint.newly_initialized) == (kind != "SwinBackbone")
    assert "were taken as those of backbone" in checkpoint.notes[0]
    checkpoint.save(out)
    stock, told = UperNetForSemanticSegmentation.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    first = "swin.embeddings.patch_embeddings.projection.weight"
    assert torch.equal(stock.state_dict()[f"backbone.{first}"], state[first])
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert_same_outputs(load(out).logits(x), stock(x).logits)
    if lone:
        stock.load_state_dict(torch.load(out / "model.pth", weights_only=True), strict=True)


def test_what_only_shares_a_name_with_the_network_is_refused(upernet_dir, tmp_path):
    """Else nearly all would be drawn, and only a count would tell."""
    state = swin_of(upernet_dir, "SwinBackbone", tmp_path / "swin")
    other = {f"tower.{number}.{key}": tensor.clone() for number in range(2) for key, tensor in state.items()}
    one = {"swin.layernorm.weight": state["swin.layernorm.weight"]}
    save_file(one | other, tmp_path / "swin" / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not fit UperNetForSemanticSegmentation"):
        load(tmp_path / "swin", f"transformers:{upernet_dir}", init_missing=True)
