"""Preprocessing that the user names, and the check of the input by the BatchNorms' statistics."""

import json

import pytest
import torch

from equalize.checkpoint.loading import load
from equalize.checkpoint.preprocess import Override, Preprocess
from equalize.errors import InputError
from equalize.moments.input_variances import check_variances
from tests.support.scenes import write_scenes
from tests.support.trained import trained_net


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")


RIGHT = ("--mean", "none", "--std", "none", "--rescale", "1", "--channel-order", "bgr")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), 3, counts={"train": 4, "val": 2})


@pytest.fixture(scope="module")
def raw(scenes, tmp_path_factory):
    """A network of BGR pixels in 0..255, which its state dict does not say."""
    return trained_net(tmp_path_factory.mktemp("raw"), scenes / "images/train", lambda x: x.flip(1))


def of(name):
    return (name.source, "--arch", name.arch)


def test_calibrate_refuses_a_wrong_input_and_keeps_the_right_one(run_cli, raw, scenes, tmp_path):
    ran = run_cli("calibrate", *of(raw), "--data", scenes, "-o", tmp_path / "out")
    assert ran.code == 2
    assert not (tmp_path / "out").exists()
    assert ran.err.count("\n") == 1
    for word in ("BatchNorms differ", "--rescale", "--channel-order", "--force-preprocessing"):
        assert word in ran.err
    ran = run_cli("calibrate", *of(raw), "--data", scenes, "-o", tmp_path / "out", *RIGHT)
    assert ran.code == 0, ran.err
    assert "preprocessing: BGR, no resize, pixels times 1, mean 0, std 1 (--mean --std --rescale --channel-order)" in (
        ran.out
    )
    plan = json.loads((tmp_path / "out" / "equalize.json").read_text())
    assert plan["preprocess"]["given"] == ["mean", "std", "rescale", "channels"]
    assert plan["input_check"]["norms"] == 3
    assert plan["input_check"]["deviation"] < 0.3
    again = load(tmp_path / "out", arch=raw.arch)
    assert Override.of(again.preprocess) == Override(mean=(0.0,), std=(1.0,), rescale=1.0, channels="BGR")
    assert not again.preprocess.assumed
    scored = run_cli("evaluate", tmp_path / "out", "--arch", raw.arch, "--data", scenes)  # without the flags
    assert scored.code == 0
    assert "input: as in training; variances at 3 BatchNorms differ by a factor of" in scored.out
    proven = run_cli("verify", tmp_path / "out", "--against", raw.source, "--arch", raw.arch, "--data", scenes)
    assert "preprocessing: BGR, no resize, pixels times 1, mean 0" in proven.out  # those of the plan
    applied = run_cli("apply", tmp_path / "out", *of(raw), "-o", tmp_path / "again")
    assert applied.code == 0
    assert (tmp_path / "again" / "preprocess.json").read_text() == (tmp_path / "out/preprocess.json").read_text()


def test_force_preprocessing_goes_on(run_cli, raw, scenes, tmp_path):
    ran = run_cli("calibrate", *of(raw), "--data", scenes, "-o", tmp_path / "out", "--force-preprocessing")
    assert ran.code == 0
    assert "warning" in ran.err
    assert json.loads((tmp_path / "out" / "equalize.json").read_text())["input_check"]["first"] > 2


@pytest.mark.parametrize(
    "command",
    [("scan",), ("evaluate",), ("finetune", "--max-steps", 1, "--batch-size", 2, "--crop", 32, "-o", "OUT")],
    ids=lambda words: words[0],
)
def test_the_others_warn(run_cli, raw, scenes, tmp_path, command):
    words = [tmp_path / "out" if word == "OUT" else word for word in command[1:]]
    ran = run_cli(command[0], *of(raw), "--data", scenes, *words)
    assert ran.code == 0, ran.err
    assert "does not get the input that it was trained on (RGB, no resize, mean 0.485" in ran.err
    assert "assumed: if it was trained otherwise, say so, --mean, --std" in ran.out
    right = [tmp_path / "right" if word == "OUT" else word for word in command[1:]]
    ran = run_cli(command[0], *of(raw), "--data", scenes, *right, *RIGHT)
    assert ran.code == 0, ran.err
    assert "warning" not in ran.err
    if command[0] == "finetune":
        assert load(tmp_path / "right", arch=raw.arch).preprocess.channels == "BGR"


def test_a_comparison_has_the_flags(run_cli, raw, scenes, tmp_path):
    words = ("--max-steps", 1, "--batch-size", 2, "--crop", 32, "--seeds", 1, "--evaluations", 1)
    ran = run_cli("compare", *of(raw), "--data", scenes, "-o", tmp_path / "out", *words, *RIGHT)
    assert ran.code == 0, ran.err
    assert "warning" not in ran.err
    assert json.loads((tmp_path / "out/settings.json").read_text())["preprocess"]["channels"] == "BGR"
    ran = run_cli("compare", *of(raw), "--data", scenes, "-o", tmp_path / "out", *words)
    assert ran.code == 2
    assert "channels was 'BGR', now None" in ran.err


def test_a_processor_gets_the_numbers_too(segformer_dir, photos, run_cli, tmp_path):
    from transformers import AutoImageProcessor

    flags = ("--mean", "0.5", "--std", "0.25,0.5,0.125", "--channel-order", "bgr", "--samples", 2)
    ran = run_cli("calibrate", segformer_dir, "--data", photos, "-o", tmp_path / "out", *flags)
    assert ran.code == 0, ran.err
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.image_mean == 0.5
    assert list(processor.image_std) == [0.25, 0.5, 0.125]
    preprocess = load(tmp_path / "out").preprocess
    assert (preprocess.mean, preprocess.std, preprocess.channels) == ((0.5,), (0.25, 0.5, 0.125), "BGR")
    assert preprocess.size == load(segformer_dir).preprocess.size


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--mean", "123.7,116.3,103.5"), "--rescale 1"),
        (("--mean", "0.5,0.5"), "give 3 numbers, or one for all"),
        (("--std", "0"), "divided by 0"),
        (("--mean", "nan"), "is not finite"),
        (("--rescale", "0"), "is no factor"),
        (("--rescale", "1/0"), "is no factor"),
        (("--rescale", "1/2/3"), "is no list of numbers"),
        (("--mean", "a"), "is no list of numbers"),
        (("--channel-order", "gbr"), "rgb"),
    ],
)
def test_numbers_that_cannot_be_meant(raw, photos, run_cli, flags, said):
    ran = run_cli("scan", *of(raw), "--data", photos, *flags)
    assert ran.code == 2
    assert said in ran.err
    assert ran.err.count("\n") == 1


def test_units_of_the_mean():
    bytes_ = Preprocess(mean=(120.0,) * 3, std=(60.0,) * 3, rescale=1.0)
    with pytest.raises(InputError, match=r"--mean: is not in the units.*--rescale 1/255"):
        Override(mean=(0.5,) * 3).over(bytes_)
    assert Override(mean=(0.5,) * 3, rescale=1 / 255).over(bytes_).mean == (0.5,) * 3
    assert Override(mean=(0.0,)).over(bytes_).mean == (0.0,)
    assert Override().over(bytes_) is bytes_


@pytest.mark.parametrize(
    "content",
    [{"mean": "x"}, {"mean": [1, "x"]}, {"std": [0.0]}, {"other": 1}, {"rescale": float("nan")}, {"channels": "XYZ"}],
)
def test_a_record_that_is_damaged(content):
    with pytest.raises(InputError, match=r"preprocess\.json: is no record of a preprocessing"):
        Override.read(content, "preprocess.json")


def test_the_check_against_variances_taken_by_hand(raw, scenes):
    checkpoint = raw.load()
    generator = torch.Generator().manual_seed(0)
    batches = [50 * torch.randn(2, 3, 16, 16, generator=generator), 9 + torch.randn(1, 3, 8, 8, generator=generator)]
    stem = checkpoint.model.stem
    with torch.no_grad():
        seen = torch.cat([stem[0](x).movedim(1, 0).flatten(1) for x in batches], 1).double().var(1, correction=0)
        expected = (seen / stem[1].running_var).log10().mean().abs()
    only = torch.nn.Sequential(stem)
    found = check_variances(only, batches)
    assert found.norms == 1
    assert found.deviation == pytest.approx(float(expected), rel=1e-5)  # float32 against float64
    assert found.first == found.deviation


def test_norms_that_were_not_trained_do_not_count(raw, run_cli, photos):
    checkpoint = raw.load()
    x = torch.randn(1, 3, 8, 8)
    assert check_variances(checkpoint.model, [x]).norms == 3
    checkpoint.model.down[0][1].reset_running_stats()
    assert check_variances(checkpoint.model, [x]).norms == 2
    for module in checkpoint.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
    assert check_variances(checkpoint.model, [x]).norms == 0
    assert checkpoint.model.training is False


def test_unchecked_is_said(run_cli, segformer_encoder_dir, photos):
    ran = run_cli("scan", segformer_encoder_dir, "--init-missing", "--data", photos, "--samples", 2)
    assert ran.code == 0, ran.err
    assert "input: not checked, for no BatchNorm remembers the values of its training" in ran.out


def test_saturating_activations_do_not_hide_a_wrong_scale():
    """Behind a ReLU6 every BatchNorm but the first sees the same variances whatever the input's scale is."""
    torch.manual_seed(0)
    blocks = [
        torch.nn.Sequential(torch.nn.Conv2d(width, 8, 3, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU6())
        for width in (3, 8, 8, 8, 8)
    ]
    model = torch.nn.Sequential(*blocks)
    x = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        for _ in range(60):
            model.train()(x)
    right, wrong = check_variances(model, [x]), check_variances(model, [255 * x])
    assert right.deviation < 0.1
    assert not right.is_wrong
    assert wrong.deviation < 1.5
    assert wrong.first > 4.5  # log10(255²) = 4.8
    assert wrong.is_wrong


def test_a_short_training_leaves_something_of_the_variance_it_started_from():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8))
    x = 1e-2 * torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        for _ in range(5):  # 0.9^5 of the variance is still the 1 that it started from
            model.train()(x)
    assert model[1].running_var.min() > 0.5
    assert check_variances(model, [x]).deviation < 0.1
    assert check_variances(model, [1e4 * x]).is_wrong
