"""State dicts of smp without a word on what they are: recognized to the last argument, or refused with the flag."""

import inspect
import shlex
from functools import partial
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from equalize.checkpoint.build import construct
from equalize.checkpoint.families.smp.recognize import recognize, under_smp_keys
from equalize.checkpoint.files.weights import state_on_disk
from equalize.checkpoint.loading import load
from equalize.cli.values import read_arch_arg
from equalize.errors import CheckpointError

NETWORKS = {
    "Unet": {"decoder_channels": [16, 8, 8, 8, 8], "classes": 3},
    "Unet of three levels": {"decoder_channels": [16, 8, 8], "encoder_depth": 3},
    "Unet without BatchNorms": {"decoder_use_norm": False, "decoder_channels": [8, 8], "encoder_depth": 2},
    "UnetPlusPlus": {"decoder_channels": [16, 16, 16], "encoder_depth": 3, "decoder_attention_type": "scse"},
    "MAnet": {"decoder_pab_channels": 16},
    "MAnet of one level": {"decoder_channels": [8], "encoder_depth": 1},
    "Linknet": {"encoder_depth": 4},
    "Linknet of one channel": {"in_channels": 1},
    "FPN": {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32, "decoder_merge_policy": "cat"},
    "FPN that fuses the image too": {"encoder_depth": 3, "in_channels": 4},
    "PSPNet": {"psp_out_channels": 64, "in_channels": 4},
    "PSPNet of two heads": {"psp_out_channels": 8, "aux_params": {"classes": 4}},
    "PSPNet of four levels": {"encoder_depth": 4, "psp_out_channels": 8},
    "PSPNet of five levels": {"encoder_depth": 5, "psp_out_channels": 8},
    "DeepLabV3": {"decoder_channels": 32, "decoder_aspp_separable": True},
    "DeepLabV3 of three levels": {"decoder_channels": 8, "encoder_depth": 3},
    "DeepLabV3Plus": {"decoder_channels": 32},
    "DeepLabV3Plus of four levels": {"decoder_channels": 8, "encoder_depth": 4},
    "PAN": {"decoder_channels": 16},
    "PAN of three levels": {"encoder_depth": 3},
    "UPerNet": {"decoder_channels": 32},
    "UPerNet of four levels": {"decoder_channels": 8, "encoder_depth": 4},
    "Segformer": {"decoder_segmentation_channels": 32},
    "Segformer of three levels": {"decoder_segmentation_channels": 8, "encoder_depth": 3},
}


def built(name, encoder, arguments):
    import segmentation_models_pytorch as smp

    model: nn.Module = getattr(smp, name.partition(" ")[0])(encoder, encoder_weights=None, **arguments)
    return model.eval()


def shapes_of(name, encoder, arguments):
    model = construct(partial(built, name, encoder, arguments), name, on_meta=True)
    return {key: tensor.shape for key, tensor in model.state_dict().items()}


def refused(shapes) -> str:
    with pytest.raises(CheckpointError) as caught:
        recognize(shapes, "x.pth")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("network", NETWORKS)
def test_arguments_are_told_by_keys_and_shapes(network):
    import segmentation_models_pytorch as smp

    name, given = network.partition(" ")[0], NETWORKS[network]
    shapes = shapes_of(name, "resnet18", given)
    prefixed = {f"model.{key}": shape for key, shape in shapes.items()}
    found, arguments, note = recognize(prefixed, "x.pth")
    assert (found, arguments["encoder_name"]) == (name, "resnet18")
    defaults = {key: each.default for key, each in inspect.signature(getattr(smp, name).__init__).parameters.items()}
    usual = {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}
    assert {**usual, **arguments} == {**usual, "encoder_name": "resnet18", **given}
    assert list(shapes_of(name, arguments.pop("encoder_name"), arguments).items()) == list(shapes.items())
    assert ("decoder_atrous_rates" in note) == name.startswith("DeepLab")
    assert ("decoder_interpolation" in note) == (name in ("Unet", "UnetPlusPlus", "MAnet", "FPN", "PAN"))
    assert f"--arch smp:{name} --arch-arg " in note


@pytest.mark.parametrize(
    ("encoder", "arguments"),
    [
        ("resnet34", {}),
        ("tu-resnet34", {}),
        ("vgg11_bn", {}),
        ("mit_b0", {}),
        ("mobileone_s0", {"in_channels": 4}),
        ("tu-regnetx_002", {"in_channels": 2}),
        ("tu-convnext_atto", {"encoder_depth": 3, "decoder_channels": [16, 8, 8]}),
    ],
)
def test_encoders_are_recognized(encoder, arguments):
    _, found, _ = recognize(shapes_of("Unet", encoder, arguments), "x.pth")
    assert found["encoder_name"] == encoder
    assert arguments.items() <= found.items()


@pytest.mark.parametrize(
    ("network", "encoder", "arguments", "choices"),
    [
        ("Unet", "tu-efficientnet_lite0", {}, ["encoder_name=tu-efficientnet_lite0", "tu-tf_efficientnet_lite0"]),
        ("Unet", "tu-resnetblur50", {}, ["encoder_name=tu-resnet50", "tu-resnetaa50", "tu-resnetblur50"]),
        ("PSPNet", "resnet18", {"encoder_depth": 1}, ["encoder_depth=2", "encoder_depth=1"]),
    ],
)
def test_where_shapes_leave_a_choice_each_flag_that_is_offered_decides_it(network, encoder, arguments, choices):
    shapes = shapes_of(network, encoder, arguments)
    sentence = refused(shapes)
    assert all(choice in sentence for choice in choices)
    words = shlex.split(sentence)
    assert words[words.index("--arch") + 1] == f"smp:{network}"
    flags = [dict([read_arch_arg(after)]) for word, after in pairwise(words) if word == "--arch-arg"]
    assert len(flags) == len(choices)
    for flag in flags:
        _, found, _ = recognize(shapes, "x.pth", network, flag)
        assert flag.items() <= found.items()
        assert shapes_of(network, found.pop("encoder_name"), found) == shapes
    truth = {"encoder_name": encoder, **arguments}
    assert any(flag == {key: truth.get(key) for key in flag} for flag in flags)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"decoder.blocks.0.conv1.0.weight": None}, "known decoder"),
        ({"decoder.blocks.0.conv1.0.weight": torch.Size([])}, "known decoder"),
        ({"encoder.model.nothing.weight": torch.Size([8, 3, 5, 5])}, "is an smp:Unet, but"),
    ],
)
def test_what_is_almost_of_smp_is_refused_with_the_flag(change, what):
    shapes = shapes_of("Unet", "resnet18", {})
    if "Unet" in what:
        shapes = {key: shape for key, shape in shapes.items() if not key.startswith("encoder.")}
    sentence = refused({key: shape for key, shape in {**shapes, **change}.items() if shape is not None})
    assert what in sentence
    assert "--arch smp:" in sentence
    assert "--arch-arg encoder_name=" in sentence


def test_what_is_unusual_is_taken_from_the_user_and_the_rest_is_told_by_the_keys():
    norm = {"decoder_use_norm": {"type": "instancenorm", "affine": True}}
    given = {"decoder_channels": [16, 8, 8], "encoder_depth": 3, "in_channels": 4, **norm}
    shapes = shapes_of("Unet", "resnet18", given)
    assert "say its encoder and what else is unusual" in refused(shapes)
    _, found, _ = recognize(shapes, "x.pth", "Unet", norm)
    assert {**given, "encoder_name": "resnet18"}.items() <= found.items()


def test_arguments_that_weights_do_not_tell_are_taken_from_the_user(run_cli, smp_resnet_dir, tmp_path):
    torch.save(load_file(smp_resnet_dir / "model.safetensors"), tmp_path / "in.pth")
    ran = run_cli("scan", tmp_path / "in.pth", "--size", 32, "--json")
    assert ran.code == 0, ran.err
    assert "recognized as smp:Unet over resnet18; weights do not tell decoder_interpolation" in " ".join(
        ran.err.split()
    )
    assert ran.out.count('"nearest"') == 4
    flags = ("--arch", "smp:Unet", "--arch-arg", "decoder_interpolation=bilinear")
    ran = run_cli("scan", tmp_path / "in.pth", "--size", 32, "--json", *flags)
    assert ran.out.count('"bilinear"') == 4
    load(tmp_path / "in.pth", flags[1], {"decoder_interpolation": "bilinear"}).save(tmp_path / "out")
    again = load(tmp_path / "out")
    assert (again.arch, again.arch_args["decoder_interpolation"]) == ("smp:Unet", "bilinear")
    assert again.notes == ()


def test_a_choice_is_refused_in_one_line(run_cli, tmp_path):
    model = built("PSPNet", "resnet18", {"encoder_depth": 1, "psp_out_channels": 8})
    torch.save(model.state_dict(), tmp_path / "in.pth")
    ran = run_cli("scan", tmp_path / "in.pth", "--size", 64)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "choose: --arch smp:PSPNet with --arch-arg encoder_depth=2 or --arch-arg encoder_depth=1" in ran.err


@pytest.mark.parametrize("prefix", ["", "module.", "model.net."])
def test_names_of_wrappers_inside_keys(smp_dir, prefix):
    plain = {key: tensor.shape for key, tensor in state_on_disk(smp_dir).items()}
    wrapped = {prefix + key.replace("encoder.", "encoder._orig_mod."): shape for key, shape in plain.items()}
    assert under_smp_keys(plain)
    assert under_smp_keys(wrapped) == under_smp_keys(plain)
