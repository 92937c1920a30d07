"""`whiten` from a checkpoint to OUT and on: its matrices travel in equalize.safetensors."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from equalize.checkpoint.loading import ModelName, load
from equalize.commands.apply import apply_plan
from equalize.commands.calibrate import calibrate_checkpoint
from equalize.commands.finetune import finetune as finetune_module
from equalize.commands.finetune.finetune import finetune
from equalize.commands.push.files import choose_files
from equalize.commands.verify import read_plan, verify_checkpoint
from equalize.errors import CheckpointError, NumericsError, SiteError
from tests.commands.finetune.test_trainer import kill_at
from tests.support.training import QUICK, Killed, same, trained_weights

CONFIG = QUICK.calibration("train")


@pytest.fixture(scope="module")
def white(custom, five_classes, tmp_path_factory):
    """`custom`, whose weights are trained ones, prepared for `whiten`."""
    out = tmp_path_factory.mktemp("white") / "out"
    calibrate_checkpoint(custom, five_classes, out, strategy="whiten", config=CONFIG)
    return replace(custom, source=str(out))


def maps_of(place):
    return load_file(place / "equalize.safetensors")


def test_trained_weights_keep_every_bit_and_train_through_the_map(custom, white, five_classes, tmp_path):
    before, out = torch.load(custom.source, weights_only=True), read_plan(white.source)
    assert same(before, torch.load(f"{white.source}/model.pth", weights_only=True))
    assert out.changed == ()
    assert out.maps["fuse"].shape == (16, 16)
    assert load(white.source, arch=white.arch).plan_maps.keys() == {"fuse"}
    _, check = verify_checkpoint(white.source, custom)
    assert check.to_json() == {"max_abs_change": 0.0, "interior": 0.0, "border": 0.0}  # the same weights and batches
    config = replace(QUICK, optimizer="sgd", lr=0.05, max_steps=2)
    explicit = finetune(white, five_classes, tmp_path / "explicit", config)
    folded = finetune(white, five_classes, tmp_path / "folded", replace(config, train_as="folded"))
    assert (explicit.train_as, folded.train_as) == ("explicit", "folded")
    assert explicit.losses[0][1] == pytest.approx(folded.losses[0][1], rel=1e-5)  # the function was kept
    one, two = trained_weights(tmp_path / "explicit"), trained_weights(tmp_path / "folded")
    assert one.keys() == before.keys()
    assert not torch.allclose(one["fuse.weight"], two["fuse.weight"], rtol=1e-2, atol=1e-4)
    for place in (tmp_path / "explicit", tmp_path / "folded"):
        assert same(maps_of(place), dict(out.maps))


def test_a_plan_with_a_map_is_applied_again(segformer_encoder_dir, five_classes, tmp_path):
    """Drawn weights: a changed function, proven at the layer."""
    from transformers import SegformerForSemanticSegmentation

    name = ModelName(source=str(segformer_encoder_dir), init_missing=True, num_classes=5)
    plan = calibrate_checkpoint(name, five_classes, tmp_path / "one", strategy="whiten", config=CONFIG)
    (site,) = plan.sites
    assert (site.strategy, site.newly_initialized) == ("whiten", True)
    assert "decode_head.linear_fuse.weight" in plan.changed
    assert plan.facts["check"]["interior"] < 1e-5
    apply_plan(read_plan(tmp_path / "one" / "equalize.json"), name, tmp_path / "two")
    one, two = (load_file(tmp_path / each / "model.safetensors") for each in ("one", "two"))
    assert same(one, two)
    assert same(maps_of(tmp_path / "one"), maps_of(tmp_path / "two"))
    model, info = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "two", output_loading_info=True)
    assert not info["missing_keys"]
    key = "decode_head.linear_fuse.weight"
    assert torch.equal(model.state_dict()[key], two[key])
    save_file({site.layer: maps_of(tmp_path / "two")[site.layer] * 1.01}, tmp_path / "two" / "equalize.safetensors")
    with pytest.raises(NumericsError):
        verify_checkpoint(tmp_path / "two", name)


def test_without_its_file_a_plan_is_refused(white, custom, five_classes, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(white.source, alone)
    (alone / "equalize.safetensors").unlink()
    with pytest.raises(SiteError, match=r"^fuse: has no matrix; give equalize\.attach the directory"):
        finetune(replace(white, source=str(alone)), five_classes, tmp_path / "out", QUICK)
    (alone / "equalize.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match=r"equalize\.safetensors: is truncated or damaged"):
        verify_checkpoint(alone, custom)


def test_resumed_with_the_map_that_it_measured(custom, five_classes, tmp_path, monkeypatch):
    out, config = tmp_path / "out", replace(QUICK, max_steps=2, eval_every=1, calibrate="whiten")
    with pytest.raises(Killed):
        finetune(custom, five_classes, out, config, monitor=kill_at(2))
    measured = maps_of(out / "last")
    monkeypatch.setattr(finetune_module, "calibrate_checkpoint", None)  # it is not measured again
    done = finetune(custom, five_classes, out, config, resume=True)
    assert done.steps == 2
    assert measured.keys() == {"fuse"}
    assert same(measured, maps_of(out))


def test_the_map_is_pushed_with_the_weights(white, tmp_path):
    files, _ = choose_files(shutil.copytree(white.source, tmp_path / "out"))
    assert {"equalize.json", "equalize.safetensors", "model.pth"} <= {file.path for file in files}


def test_command_line(custom, five_classes, tmp_path, run_cli):
    given = (custom.source, "--arch", custom.arch, "--data", five_classes, "--samples", 4, "--size", "48x64")
    ran = run_cli("calibrate", *given, "--strategy", "whiten", "-o", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    assert said["strategy"] == said["sites"][0]["strategy"] == "whiten"
    assert said["maps"] == "equalize.safetensors"
    ran = run_cli("calibrate", *given, "--strategy", "whiten", "--scale", "paper", "-o", tmp_path / "other")
    assert ran.code == 2
    assert "scale: does not go with whiten" in " ".join(ran.err.split())
    ran = run_cli("verify", tmp_path / "out", "--against", custom.source, "--arch", custom.arch)
    assert ran.code == 0, ran.err
