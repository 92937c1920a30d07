import contextlib
import io
import json
import re
import shlex

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from equalize.checkpoint.loading import load
from equalize.cli import main
from tests.support.networks import save_code
from tests.support.scenes import write_scenes

SITE_FIELDS = [
    "layer",
    "weight",
    "bias",
    "norm",
    "op",
    "kernel",
    "axis",
    "groups",
    "kind",
    "exact_border",
    "shift",
    "branches",
]
BRANCH_FIELDS = ["start", "stop", "resampling", "factor", "source"]
MEASURED = ["count", "mean", "std", "ci95", "step_share"]
SIZE = ("--size", "64")


def parsed(ran):
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def test_scan_prints_one_json_object_with_the_fields_of_the_contract(run_cli, upernet_dir):
    ran = run_cli("scan", upernet_dir, *SIZE, "--json")
    found = parsed(ran)
    assert ran.err == ""
    assert list(found) == [
        "schema",
        "source",
        "family",
        "architecture",
        "input_shape",
        "tracer",
        "sites",
        "refusals",
    ]
    assert (found["schema"], found["source"], found["family"]) == (1, str(upernet_dir), "transformers")
    assert found["input_shape"] == [2, 3, 64, 64]
    assert [site["layer"] for site in found["sites"]] == [
        "decode_head.bottleneck.conv",
        "decode_head.fpn_bottleneck.conv",
    ]
    for site in found["sites"]:
        assert list(site) == SITE_FIELDS
        assert all(list(branch) == BRANCH_FIELDS for branch in site["branches"])
    assert all(list(refusal) == ["at", "reason"] for refusal in found["refusals"])


def test_scan_with_data_measures_every_branch(run_cli, segformer_dir, photos):
    found = parsed(run_cli("scan", segformer_dir, "--data", photos, "--samples", 3, *SIZE, "--json"))
    (site,) = found["sites"]
    for branch in site["branches"]:
        assert list(branch) == BRANCH_FIELDS + MEASURED
        assert branch["count"] == 3 * 8 * 16 * 16  # images, channels, places
        assert branch["std"] > 0
        assert branch["ci95"] > 0
    assert sum(branch["step_share"] for branch in site["branches"]) == pytest.approx(1)
    assert list(site) == [*SITE_FIELDS, "expect", "delta"]
    assert (site["expect"], site["delta"]) == (found["expect"], found["delta"])  # it is the only one
    assert found["expect"] in {"gain", "nothing", "unclear"}
    assert isinstance(found["delta"], float)


def test_scan_says_what_training_by_the_given_optimizer_gains(run_cli, segformer_dir, photos):
    command = ("scan", segformer_dir, "--data", photos, "--samples", 3, *SIZE)
    adam, sgd = (parsed(run_cli(*command, *flags, "--json")) for flags in ((), ("--optimizer", "sgd")))
    assert (adam["optimizer"], sgd["optimizer"]) == ("adamw", "sgd")
    assert sgd["delta"] != pytest.approx(adam["delta"], abs=1e-6)
    said = run_cli(*command, "--optimizer", "sgd")
    assert "100 steps of SGD" in said.text
    assert "--optimizer sgd" in said.err  # the next command has it


PLAIN = """
import torch
class Net(torch.nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.a, self.b = torch.nn.Conv2d(3, width, 1), torch.nn.Conv2d(3, width, 1)
        self.mix = torch.nn.Conv2d(2 * width, 2, 1)
    def forward(self, x):
        print("chatter of the network")
        return self.mix(torch.cat([self.a(x), self.b(x)], 1))
"""


def test_scan_all_lists_plain_sites_too(run_cli, tmp_path):
    net = save_code(PLAIN, tmp_path, width=5)
    arguments = ("scan", net.source, "--arch", net.arch, "--arch-arg", "width=5", *SIZE)
    ran = run_cli(*arguments)
    assert "No fusion layer of resampled branches; --all lists 1 more without a resampled branch." in ran.text
    ran = run_cli(*arguments, "--all", "--json")
    assert [site["kind"] for site in parsed(ran)["sites"]] == ["plain"]
    assert "chatter" in ran.err


def test_scan_says_that_a_network_fuses_by_addition(run_cli):
    ran = run_cli("scan", "torchvision:lraspp_mobilenet_v3_large", "--size", "128")
    assert ran.code == 0
    assert "fuses by addition" in ran.text
    assert "next:" not in ran.err


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory, segformer_dir, photos):
    """A directory that calibrate has written, and what it printed as JSON. Read only."""
    out, printed = tmp_path_factory.mktemp("calibrated") / "out", io.StringIO()
    arguments = ("--data", str(photos), "-o", str(out), *SIZE, "--strategy", "migrate", "--json")
    with contextlib.redirect_stdout(printed):
        assert main(["calibrate", str(segformer_dir), *arguments]) == 0
    return out, json.loads(printed.getvalue())


def test_calibrate_writes_what_it_says(calibrated, segformer_dir):
    from transformers import SegformerForSemanticSegmentation

    out, plan = calibrated
    assert json.loads((out / "equalize.json").read_text()) == plan
    assert {"schema", "strategy", "seed", "images", "seconds", "converged", "output", "changed", "check"} <= set(plan)
    assert plan["output"] == str(out)
    assert plan["images"] == 4
    assert plan["measured_by"] == "hooks (so few images that cutting the graph would take longer)"
    assert [site["strategy"] for site in plan["sites"]] == ["migrate"]
    assert list(plan["check"]) == ["max_abs_change", "interior", "border"]
    before, after = (
        SegformerForSemanticSegmentation.from_pretrained(path).state_dict() for path in (segformer_dir, out)
    )
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert "decode_head.linear_fuse.weight" in changed
    assert changed <= {plan["model_keys"].get(key, key) for key in plan["changed"]}  # a bias of zeros stays one


def test_changed_tensors_are_named_as_they_stand_in_the_file(run_cli, calibrated, segformer_dir, tmp_path):
    """transformers 5 renames `linear_c` while it loads: the file has the one name, the model the other."""
    out, plan = calibrated
    before, after = (load_file(path / "model.safetensors") for path in (segformer_dir, out))
    differ = {key for key in before if not torch.equal(before[key], after[key])}
    assert differ <= set(plan["changed"]) <= set(before)
    assert "decode_head.linear_c.0.proj.weight" in differ
    model = "decode_head.linear_projections.0.proj.weight"
    assert plan["model_keys"]["decode_head.linear_c.0.proj.weight"] == model
    assert "decode_head.linear_fuse.weight" not in plan["model_keys"]  # the same in both
    assert parsed(run_cli("verify", out, "--against", segformer_dir, "--json"))["changed"] == plan["changed"]
    applied = run_cli("apply", out, segformer_dir, "-o", tmp_path / "again")
    assert "linear_c.3.proj.weight (in the model decode_head.linear_projections.3.proj.weight)" in applied.text
    assert "compared with the original on random inputs" in applied.text
    assert json.loads((tmp_path / "again" / "equalize.json").read_text())["changed"] == plan["changed"]


def next_words(ran):
    """What the line `next: ...` says, as a shell reads it."""
    assert ran.code == 0, ran.err
    (line,) = [line for line in ran.err.splitlines() if line.startswith("next: ")]
    return shlex.split(line.removeprefix("next: "))


def test_a_scan_of_an_encoder_says_what_is_missing_and_how_it_is_drawn(run_cli, segformer_encoder_dir, segformer_dir):
    ran = run_cli("scan", segformer_encoder_dir)
    assert "Missing in the checkpoint, as in an encoder alone: decode_head (16 tensors)." in ran.text
    drawn = ["--data", "IMAGES", "--init-missing", "--num-classes", "N"]
    assert next_words(ran) == ["equalize", "calibrate", str(segformer_encoder_dir), *drawn, "-o", "OUT"]
    missing = json.loads(run_cli("scan", segformer_encoder_dir, "--json").out)["missing"]
    assert sorted(missing) == sorted(load(segformer_encoder_dir, init_missing=True, num_classes=3).newly_initialized)
    assert "missing" not in json.loads(run_cli("scan", segformer_dir, "--json").out)


def test_the_next_command_has_the_flags_that_were_given(run_cli, segformer_encoder_dir, photos):
    flags = ["--init-missing", "--num-classes", "3", "--size", "64x96"]
    ran = run_cli("scan", segformer_encoder_dir, *flags)
    head = ["equalize", "calibrate", str(segformer_encoder_dir)]
    assert next_words(ran) == [*head, "--data", "IMAGES", "--size", "64x96", *flags[:3], "-o", "OUT"]
    ran = run_cli("scan", segformer_encoder_dir, *flags, "--data", photos, "--samples", "all")
    assert sorted(next_words(ran)[3:]) == sorted([*flags, "--data", str(photos), "--samples", "all", "-o", "OUT"])


NET = """
import torch
class Net(torch.nn.Module):
    def __init__(self, width=4, name=""):
        super().__init__()
        self.a = torch.nn.Conv2d(3, width, 1)
        self.mix = torch.nn.Conv2d(3 + width, 2, 1)
    def forward(self, x):
        low = self.a(torch.nn.functional.avg_pool2d(x, 2))
        return self.mix(torch.cat([x, torch.nn.functional.interpolate(low, scale_factor=2.0, mode="bilinear")], 1))
"""


def test_the_next_command_names_the_network_of_a_state_dict_again(run_cli, photos, tmp_path):
    (tmp_path / "net.py").write_text(NET)
    torch.manual_seed(0)
    shapes = {"a.weight": (5, 3, 1, 1), "a.bias": (5,), "mix.weight": (2, 8, 1, 1), "mix.bias": (2,)}
    torch.save({key: 1e4 * torch.randn(shape) for key, shape in shapes.items()}, tmp_path / "net.pth")
    arch = ["--arch", f"{tmp_path / 'net.py'}:Net", "--arch-arg", "width=5", "--arch-arg", "name=a b"]
    flags = [*arch, "--data", photos, *SIZE]
    out = tmp_path / "out"
    ran = run_cli("calibrate", tmp_path / "net.pth", *flags, "-o", out, "--strategy", "migrate", "--seed", "3")
    assert sorted(next_words(ran)) == sorted(["equalize", "finetune", str(out), *map(str, flags), "-o", "TRAINED"])
    # the range of these logits is some millions: a deviation alone would alarm
    assert re.search(r"logits differ by at most \S+ of a range of [\d,]{6,} \(\d\.\de-0[78]\), which", ran.text)


def test_plain_concats_are_counted_and_listed_with_all(run_cli, upernet_dir):
    """Swin's patch merging concatenates within the encoder: a LayerNorm follows."""
    short, full = run_cli("scan", upernet_dir, *SIZE), run_cli("scan", upernet_dir, *SIZE, "--all")
    assert "concats without a resampled branch cannot be equalized; equalize scan --all says why" in short.text
    assert "already normalized" not in short.text
    assert "already normalized" in full.text
    refusals = parsed(run_cli("scan", upernet_dir, *SIZE, "--json"))["refusals"]
    assert any("already normalized" in refusal["reason"] for refusal in refusals)
    assert all(list(refusal) == ["at", "reason"] for refusal in refusals)


def test_calibrate_tells_people_what_happened_and_what_to_do_next(run_cli, segformer_dir, photos, tmp_path):
    out = tmp_path / "out"
    ran = run_cli("calibrate", segformer_dir, "--data", photos, "-o", out, *SIZE, "--strategy", "migrate")
    assert ran.err == f"next: equalize finetune {out} --data {photos} --size 64 -o TRAINED\n"
    assert "preprocessing: RGB, resize to 48x64" in ran.text
    assert "migrate: scale moved" in ran.text
    assert "Measured on 4 images on the whole network (few images)" in ran.text
    assert "before, 1.00 after" in ran.text
    assert "Changed: 9 tensors" in ran.text
    assert "which is rounding" in ran.text
    assert f"data: {photos}" in ran.text
    assert "\x1b" not in ran.out
    assert f'model = SegformerForSemanticSegmentation.from_pretrained("{out}")' in ran.text


def test_calibrate_draws_a_missing_decoder(run_cli, segformer_encoder_dir, photos, tmp_path):
    out = tmp_path / "out"
    arguments = ("calibrate", segformer_encoder_dir, "--data", photos, "-o", out, *SIZE, "--strategy", "rescale")
    ran = run_cli(*arguments, "--init-missing", "--num-classes", 3, "--json")
    plan = parsed(ran)
    assert [site["strategy"] for site in plan["sites"]] == ["rescale"]
    assert "decode_head.linear_fuse.weight" in plan["drawn"]
    assert "drawn anew under seed 0" in ran.err
    assert load_file(out / "model.safetensors")["decode_head.classifier.weight"].shape[0] == 3


@pytest.mark.parametrize("scale", ["step", "paper"])
def test_calibrate_says_what_it_equalized_to(run_cli, segformer_dir, photos, tmp_path, scale):
    arguments = ("--strategy", "rescale", "--scale", scale, "-o", tmp_path / "out", *SIZE, "--dry-run", "--json")
    plan = parsed(run_cli("calibrate", segformer_dir, "--data", photos, *arguments))
    assert plan["scale"] == scale
    (site,) = plan["sites"]
    powers = [(branch["stop"] - branch["start"]) * branch["std"] ** 2 for branch in site["branches"]]
    rms = (sum(powers) / site["branches"][-1]["stop"]) ** 0.5
    assert site["tau"] == pytest.approx(rms if scale == "step" else 1.0)
    assert (site["shift"], site["exact_border"]) == (None, True)  # a BatchNorm is behind


def test_dry_run_measures_and_writes_nothing(run_cli, segformer_dir, photos, tmp_path):
    out = tmp_path / "out"
    arguments = ("calibrate", segformer_dir, "--data", photos, "-o", out, *SIZE, "--dry-run")
    ran = run_cli(*arguments, "--strategy", "migrate")
    assert ran.code == 0, ran.err
    assert "before, 1.00 after" in ran.text
    assert "Nothing was written (--dry-run)." in ran.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_a_network_without_sites_is_refused(run_cli, lraspp_state, photos, tmp_path, flags):
    torch.save(lraspp_state, tmp_path / "lraspp.pth")
    arguments = ("calibrate", tmp_path / "lraspp.pth", "--data", photos, "-o", tmp_path / "out", *SIZE)
    ran = run_cli(*arguments, *flags)
    assert (ran.code, ran.out) == (2, "")
    assert "has no fusion layer that can be equalized" in ran.err
    assert "fuses by addition" in ran.err
    assert "; equalize finetune trains it as it is" in ran.err
    assert not (tmp_path / "out").exists()
    ran = run_cli(*arguments, *flags, "--sites", "decoder.*")
    assert (ran.code, "the network has no fusion layer" in ran.err) == (2, True)


def test_a_network_of_plain_sites_is_refused_with_the_flag_that_names_them(run_cli, photos, tmp_path):
    net = save_code(PLAIN, tmp_path, width=5)
    arguments = ("--arch", net.arch, "--arch-arg", "width=5", "--data", photos, "-o", tmp_path / "out", *SIZE)
    ran = run_cli("calibrate", net.source, *arguments)
    assert (ran.code, "equalize scan --all, and --sites" in ran.err) == (2, True)
    ran = run_cli("calibrate", net.source, *arguments, "--sites", "*", "--dry-run", "--force-preprocessing")
    assert ran.code == 0, ran.err


def test_a_share_of_bad_images_is_skipped_and_named(run_cli, segformer_dir, photos, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in photos.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "1.png").write_bytes((photos / "1.png").read_bytes()[:60])
    arguments = ("calibrate", segformer_dir, "--data", folder, "-o", tmp_path / "out", *SIZE, "--json")
    ran = run_cli(*arguments, "--skip-bad", "0.25")
    plan = parsed(ran)
    assert (plan["images"], plan["skipped"]) == (3, 1)
    assert f"warning: skipped {folder / '1.png'}" in " ".join(ran.err.split())


def test_verify_proves_what_calibrate_wrote(run_cli, calibrated, segformer_dir, photos):
    out, _ = calibrated
    proven = parsed(run_cli("verify", out, "--against", segformer_dir, "--json"))
    assert list(proven) == ["schema", "output", "against", "strategy", "changed", "check"]
    assert proven["check"]["max_abs_change"] < 1e-4
    ran = run_cli("verify", out, "--against", segformer_dir, "--data", photos)
    assert ran.code == 0
    assert "all others kept every bit" in ran.text


def test_verify_notices_one_changed_number(run_cli, calibrated, segformer_dir, tmp_path):
    from safetensors.torch import save_file

    copy = tmp_path / "copy"
    copy.mkdir()
    for path in calibrated[0].iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    state = load_file(copy / "model.safetensors")
    state["decode_head.classifier.bias"][0] += 1e-6
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    ran = run_cli("verify", copy, "--against", segformer_dir)
    assert ran.code == 4
    assert ran.err.startswith("error: decode_head.classifier.bias: changed but are not in the plan")


def test_max_pixels_allows_large_pictures_until_the_command_ends(run_cli, segformer_dir, tmp_path, monkeypatch):
    root = write_scenes(tmp_path / "data", 4, counts={"val": 1}, size=(50, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    refused = run_cli("evaluate", segformer_dir, "--data", root, "--device", "cpu")
    assert (refused.code, "allow it with --max-pixels 3200" in refused.err) == (2, True)
    assert run_cli("evaluate", segformer_dir, "--data", root, "--device", "cpu", "--max-pixels", "3200").code == 0
    assert Image.MAX_IMAGE_PIXELS == 1000


@pytest.mark.parametrize("command", ["calibrate", "compare", "finetune"])
def test_keep_norm_is_answered_by_what_replaces_it(run_cli, photos, tmp_path, command):
    ran = run_cli(command, "model", "--data", photos, "-o", tmp_path / "out", "--keep-norm")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: --keep-norm: was removed: --scale step")
    assert ran.err.count("\n") == 1
    assert "--keep-norm" not in run_cli(command, "--help").out
