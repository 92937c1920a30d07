"""A checkpoint in, an equalized checkpoint out, loaded again by its own library; strategies are in tests/plan."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import equalize
from equalize.checkpoint.loading import ModelName, load
from equalize.commands.apply import apply_plan
from equalize.commands.calibrate import calibrate_checkpoint
from equalize.commands.calibration_config import CalibrationConfig
from equalize.commands.finetune.config import TrainConfig
from equalize.commands.scan import select_sites
from equalize.commands.verify import verify_checkpoint
from equalize.errors import DataError, InputError, NumericsError
from equalize.plan import indicator
from equalize.plan.plan import Plan
from tests.support.networks import save_code
from tests.support.planned import planned

CONFIG = CalibrationConfig(samples=4, size=(64, 64), batch_size=3)
FACTORY = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.high = nn.Conv2d(3, width, 3, padding=1)
        self.low = nn.Conv2d(width, width, 3, padding=1, stride=2)
        self.fuse = nn.Conv2d(2 * width, 3, 3, padding=1)

    def forward(self, x):
        high = self.high(x).relu()
        low = nn.functional.interpolate(self.low(high).relu(), size=high.shape[2:], mode="bilinear")
        return self.fuse(torch.cat([high, low], 1))
"""


@pytest.fixture(scope="session")
def deeplab_pth(tmp_path_factory) -> Path:
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

    torch.manual_seed(6)
    model = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3, aux_loss=True)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.num_batches_tracked += 1
            module.running_mean.uniform_(-0.1, 0.1)
    path = tmp_path_factory.mktemp("torchvision") / "deeplab.pth"
    torch.save({"model": {f"module.{key}": value for key, value in model.state_dict().items()}, "epoch": 7}, path)
    return path


@pytest.fixture
def custom(tmp_path) -> ModelName:
    return save_code(FACTORY, tmp_path)


def stock(family: str, path: Path) -> torch.nn.Module:
    """What the library itself makes of a directory or file; nothing of ours."""
    if family == "transformers":
        from transformers import AutoModelForSemanticSegmentation

        model, info = AutoModelForSemanticSegmentation.from_pretrained(path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        return model.eval()
    if family == "smp":
        import segmentation_models_pytorch as smp

        return smp.from_pretrained(path).eval()
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

    model = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3, aux_loss=True)
    content = torch.load(path / "model.pth" if path.is_dir() else path, weights_only=True)
    assert content["epoch"] == 7
    model.load_state_dict({key.removeprefix("module."): value for key, value in content["model"].items()})
    return model.eval()


def logits(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = model(x)
    if isinstance(output, torch.Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output["out"]


@pytest.mark.parametrize(
    ("family", "fixture", "strategy"),
    [
        ("transformers", "segformer_dir", "preserve"),
        ("transformers", "segformer_dir", "reinit"),
        ("transformers", "upernet_dir", "migrate"),
        ("smp", "smp_dir", "rescale"),
        ("torchvision", "deeplab_pth", "rescale"),
    ],
)
@pytest.mark.filterwarnings("ignore:Importing from timm")
def test_round_trip_through_the_stock_loader(family, fixture, strategy, request, photos, tmp_path):
    source, out = request.getfixturevalue(fixture), tmp_path / "out"
    plan = calibrate_checkpoint(ModelName(source=str(source)), photos, out, strategy=strategy, config=CONFIG)
    before, after = stock(family, source), stock(family, out)
    first, second = before.state_dict(), after.state_dict()
    assert list(first) == list(second)
    assert {key for key in first if not torch.equal(first[key], second[key])} <= set(plan.changed)
    assert plan.sites
    x = torch.randn(2, 3, 64, 64)
    here, there = logits(before, x), logits(after, x)
    assert {site.strategy for site in plan.sites} == {strategy}
    if strategy in {"migrate", "preserve"}:
        assert (here - there).abs().max() <= 1e-5 * (here.max() - here.min())
    else:
        assert not torch.allclose(here, there)
    if strategy == "preserve":
        assert plan.changed == ()
    receipt = json.loads((out / "equalize.json").read_text())
    assert receipt == json.loads(json.dumps(plan.to_json())) == Plan.read(out).to_json()
    assert receipt["sha256"] == load(source).sha256
    side_files = {path.name for path in source.iterdir()} if source.is_dir() else set()
    assert side_files <= {path.name for path in out.iterdir()}


def test_a_plan_replays_without_data(smp_dir, photos, tmp_path):
    name = ModelName(source=str(smp_dir), seed=3)
    plan = calibrate_checkpoint(name, photos, tmp_path / "one", strategy="reinit", config=CONFIG)
    apply_plan(Plan.read(tmp_path / "one"), ModelName(source=str(smp_dir)), tmp_path / "two")
    one, two = (load_file(tmp_path / each / "model.safetensors") for each in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert Plan.read(tmp_path / "two").edits == plan.edits


def test_a_plan_that_is_applied_to_other_weights_says_so(smp_dir, photos, tmp_path):
    """The sigmas and statistics of BatchNorms that it writes are those of the first."""
    plan = calibrate_checkpoint(ModelName(source=str(smp_dir)), photos, tmp_path / "one", config=CONFIG)
    said: list[str] = []
    apply_plan(plan, ModelName(source=str(smp_dir)), tmp_path / "two", notify=said.append)
    assert not any("made for" in note for note in said)
    shutil.copytree(smp_dir, tmp_path / "other")
    state = load_file(smp_dir / "model.safetensors")
    other = {key: 2 * value if key.endswith(".weight") else value for key, value in state.items()}
    save_file(other, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    apply_plan(plan, ModelName(source=str(tmp_path / "other")), tmp_path / "three", notify=said.append)
    assert any("other is another file than the plan was made for" in note for note in said)


def test_a_drawn_decoder_is_equalized_as_drawn(segformer_encoder_dir, photos, tmp_path, monkeypatch):
    from transformers import SegformerForSemanticSegmentation

    monkeypatch.setattr(indicator, "NOTHING", -math.inf)  # noise has nothing to be told
    name = ModelName(source=str(segformer_encoder_dir), init_missing=True, num_classes=4, seed=11)
    plan = calibrate_checkpoint(name, photos, tmp_path / "out", config=CONFIG)
    (site,) = plan.sites
    assert site.strategy == "rescale"
    drawn = name.load().model.state_dict()[site.weight]
    written = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "out").state_dict()[site.weight]
    for branch in site.branches:
        part = slice(branch.start, branch.stop)
        torch.testing.assert_close(written[:, part] * branch.std / site.tau, drawn[:, part], rtol=1e-5, atol=0)
    verify_checkpoint(tmp_path / "out", ModelName(source=str(segformer_encoder_dir)))


def test_an_equalized_checkpoint_is_refused(segformer_dir, photos, tmp_path):
    out = planned(segformer_dir, tmp_path / "out")
    with pytest.raises(InputError, match="already equalized"):
        calibrate_checkpoint(ModelName(source=str(out)), photos, tmp_path / "again", config=CONFIG)
    with pytest.raises(InputError, match="already equalized"):
        apply_plan(Plan.read(out), ModelName(source=str(out)), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_plan_never_names_code_to_run(custom, photos, tmp_path):
    calibrate_checkpoint(custom, photos, tmp_path / "out", config=CONFIG)
    verify_checkpoint(tmp_path / "out", custom)
    nameless = ModelName(source=custom.source)
    with pytest.raises(InputError, match=r"name that code again: --arch .*net\.py:Net"):
        verify_checkpoint(tmp_path / "out", nameless)
    with pytest.raises(InputError, match="name that code again"):
        apply_plan(Plan.read(tmp_path / "out"), nameless, tmp_path / "again")


@pytest.mark.parametrize("fixture", ["segformer_dir", "smp_dir"])
def test_checkpoints_of_the_time_before_norms_had_counters(fixture, request, photos, tmp_path):
    source = tmp_path / "in"
    shutil.copytree(request.getfixturevalue(fixture), source)
    state = load_file(source / "model.safetensors")
    old = {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    save_file(old, source / "model.safetensors", metadata={"format": "pt"})
    name = ModelName(source=str(source))
    plan = calibrate_checkpoint(name, photos, tmp_path / "out", strategy="rescale", config=CONFIG)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == old.keys()
    assert {key for key in old if not torch.equal(old[key], written[key])} == set(plan.changed)
    assert any(key.endswith("running_var") for key in plan.changed)
    verify_checkpoint(tmp_path / "out", name)
    apply_plan(plan, name, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[key], tensor) for key, tensor in written.items())  # the same edits of the same bytes


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("in_one_go", [True, False])
def test_networks_of_other_channels_saved_from_python_are_verified(tmp_path, photos, channels, in_one_go):
    name = save_code(FACTORY.replace("Conv2d(3, width", f"Conv2d({channels}, width"), tmp_path)
    checkpoint, images = equalize.load(name.source, arch=name.arch), [torch.randn(3, channels, 32, 48)]
    if in_one_go:
        plan = equalize.calibrate(checkpoint.model, images, strategy="rescale")
        assert plan.facts["input_shape"] == [2, channels, 32, 48]
    else:  # such a plan knows nothing of the images
        found = equalize.scan(checkpoint.model, images[0])
        moments = equalize.measure(checkpoint.model, found.sites, images)
        plan = equalize.make_plan(checkpoint.model, found.sites, moments, strategy="rescale")
        equalize.apply(plan, checkpoint.model)
    checkpoint.save(tmp_path / "out", plan)
    read, check = verify_checkpoint(tmp_path / "out", name)
    assert read.changed == plan.changed != ()
    assert check.interior < 1e-5
    apply_plan(plan, name, tmp_path / "again")
    if in_one_go:
        with pytest.raises(DataError, match=rf"\d\.png: has 3 channels.*, and the network takes {channels}"):
            verify_checkpoint(tmp_path / "out", name, photos)


def test_a_plan_of_another_network_is_refused(custom, photos, tmp_path):
    calibrate_checkpoint(custom, photos, tmp_path / "out", config=CONFIG)
    receipt = tmp_path / "out" / "equalize.json"
    content = json.loads(receipt.read_text())
    content["sites"][0]["weight"] = "elsewhere.weight"
    receipt.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"elsewhere\.weight: is in the plan but not in this model"):
        verify_checkpoint(tmp_path / "out", custom)


def test_sites_are_chosen_by_a_glob(smp_dir, photos, tmp_path):
    plan = calibrate_checkpoint(
        ModelName(source=str(smp_dir)), photos, tmp_path / "out", pattern="decoder.blocks.[12].*", config=CONFIG
    )
    assert [site.layer for site in plan.sites] == ["decoder.blocks.1.conv1.0", "decoder.blocks.2.conv1.0"]
    with pytest.raises(InputError, match=r"no fusion layer: nothing.*decoder\.blocks\.0\.conv1\.0"):
        select_sites(load(smp_dir).model, (2, 3, 64, 64), "nothing*")


def test_a_failed_proof_leaves_nothing(segformer_dir, photos, tmp_path, monkeypatch):
    import equalize.commands.verify

    def tampered(directory, *arguments, **options):
        model = load(directory).model
        with torch.no_grad():
            model.decode_head.linear_fuse.weight.mul_(1.001)
        return model

    monkeypatch.setattr(equalize.commands.verify, "reload", tampered)
    with pytest.raises(NumericsError, match="does not do what the plan says"):
        calibrate_checkpoint(ModelName(source=str(segformer_dir)), photos, tmp_path / "out", config=CONFIG)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("strategy", ["migrate", "rescale"])
def test_modules_that_a_network_has_under_two_names(photos, tmp_path, strategy):
    code = FACTORY + "\n\nclass Twice(Net):\n    def __init__(self):\n        super().__init__()\n"
    code += "        self.head, self.neck = self.fuse, nn.ModuleList([self.low])\n"
    (tmp_path / "net.py").write_text(code)
    scope: dict = {}
    exec(code, scope)
    state = {f"module.{key}": tensor for key, tensor in scope["Twice"]().state_dict().items()}
    torch.save(state, tmp_path / "net.pth")
    name = ModelName(source=str(tmp_path / "net.pth"), arch=f"{tmp_path / 'net.py'}:Twice")
    plan = calibrate_checkpoint(name, photos, tmp_path / "out", strategy=strategy, config=CONFIG)
    assert {"fuse.weight", "head.weight"} <= set(plan.changed)
    written = torch.load(tmp_path / "out" / "model.pth")
    assert torch.equal(written["module.fuse.weight"], written["module.head.weight"])
    assert not torch.equal(written["module.fuse.weight"], state["module.fuse.weight"])
    verify_checkpoint(tmp_path / "out", name)
    apply_plan(Plan.read(tmp_path / "out"), name, tmp_path / "again")
    assert (tmp_path / "again" / "model.pth").read_bytes() == (tmp_path / "out" / "model.pth").read_bytes()


def test_auto_leaves_alone_what_gains_nothing_and_writes_all_the_same(
    segformer_encoder_dir, photos, tmp_path, monkeypatch
):
    monkeypatch.setattr(indicator, "NOTHING", math.inf)
    monkeypatch.setattr(indicator, "GAIN", math.inf)
    name = ModelName(source=str(segformer_encoder_dir), init_missing=True, num_classes=4, seed=11)
    plan = calibrate_checkpoint(name, photos, tmp_path / "out", config=CONFIG)
    (site,) = plan.sites
    assert (plan.strategy, site.strategy, site.expect) == ("none", "none", "nothing")
    assert (plan.changed, plan.edits, plan.equalized) == ((), (), ())
    written, drawn = load(tmp_path / "out").model, name.load().model
    before = drawn.state_dict()
    for key, tensor in written.state_dict().items():  # the statistics of untouched BatchNorms included
        assert torch.equal(tensor, before[key]), key
    assert verify_checkpoint(tmp_path / "out", name)[1].max_abs_change == 0  # the same weights
    parameters = dict(written.named_parameters())
    equalize.attach(plan, written)
    assert dict(written.named_parameters()).keys() == parameters.keys()
    assert apply_plan(Plan.read(tmp_path / "out"), name, tmp_path / "again").strategy == "none"
    untouched = ModelName(source=str(tmp_path / "out"))
    forced = calibrate_checkpoint(untouched, photos, tmp_path / "forced", strategy="migrate", config=CONFIG)
    assert forced.strategy == Plan.read(tmp_path / "forced").strategy == "migrate"
    named = calibrate_checkpoint(name, photos, tmp_path / "named", config=CONFIG, strategy="rescale")
    assert named.strategy == named.sites[0].strategy == "rescale"


def test_auto_asks_for_the_optimizer_that_will_train(segformer_encoder_dir, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(indicator, "gained", lambda *args: 0.5 if args[-1] == "sgd" else 0.0)
    name = ModelName(source=str(segformer_encoder_dir), init_missing=True, num_classes=4, seed=11)
    left, made = (
        calibrate_checkpoint(name, photos, tmp_path / optimizer, config=replace(CONFIG, optimizer=optimizer))
        for optimizer in ("adamw", "sgd")
    )
    assert (left.strategy, made.strategy) == ("none", "auto")
    assert [site.strategy for site in made.sites] == ["rescale"]
    assert Plan.read(tmp_path / "sgd").facts["optimizer"] == "sgd"
    assert TrainConfig(optimizer="sgd").calibration("train").optimizer == "sgd"  # before a training


def test_where_no_branch_can_move_migrate_names_the_strategy_that_needs_none_to(tmp_path, photos):
    custom = save_code(FACTORY.replace(".relu()", ".sigmoid()"), tmp_path)
    with pytest.raises(InputError, match=r"no fusion layer that migrate can equalize \(fuse: .*--strategy preserve"):
        calibrate_checkpoint(custom, photos, tmp_path / "out", strategy="migrate", config=CONFIG)
    assert calibrate_checkpoint(custom, photos, tmp_path / "out", strategy="preserve", config=CONFIG).sites
