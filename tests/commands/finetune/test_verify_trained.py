"""`equalize verify` of what was trained after it was calibrated."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from equalize.commands.calibrate import calibrate_checkpoint
from equalize.commands.calibration_config import CalibrationConfig
from equalize.commands.finetune.finetune import finetune
from tests.support.training import QUICK, named, trained_weights

STEP = replace(QUICK, max_steps=1, num_classes=6)


@pytest.fixture(scope="module")
def made(custom, five_classes, tmp_path_factory):
    """The original, what calibration made of it, and what training made of that, with another number of classes."""
    place = tmp_path_factory.mktemp("trained")
    config = CalibrationConfig(samples=4, size=(48, 64), device="cpu")
    calibrate_checkpoint(custom, five_classes, place / "calibrated", strategy="migrate", config=config)
    finetune(named(place / "calibrated", arch=custom.arch), five_classes, place / "trained", STEP)
    return place


@pytest.fixture
def verify(run_cli, custom):
    def run(out, against, *more):
        return run_cli("verify", out, "--against", against, "--arch", custom.arch, *more)

    return run


def test_against_the_original_it_says_that_it_was_trained_and_checks_what_it_can(verify, made, custom):
    ran = verify(made / "trained", custom.source)
    assert ran.code == 0, ran.err
    assert (
        f"{made / 'trained'} was trained after it was calibrated (from {made / 'calibrated'}, to step 1)." in ran.text
    )
    assert "the proof of calibration does not apply" in ran.text
    assert f"{custom.source} is the model that was calibrated: its weights have the recorded sha256" in ran.text
    assert "but for the number of classes in classify.weight, classify.bias, auxiliary.weight" in ran.text
    proof = f"equalize verify {made / 'calibrated'} --against {custom.source}"
    assert ran.text.endswith(proof)
    ran = verify(made / "trained", made / "calibrated", "--json")
    content = json.loads(ran.out)
    assert content["check"] is None
    assert (content["trained"]["role"], content["trained"]["step"]) == ("trained", 1)
    tensors = trained_weights(made / "trained")
    before = trained_weights(made / "calibrated")
    changed = sum(not torch.equal(tensors[key], before[key]) for key in before)
    assert (content["trained"]["tensors"], content["trained"]["changed"]) == (len(tensors), changed)


def test_what_it_was_not_made_of_and_what_is_no_training_of_it_fail(verify, made, custom, tmp_path):
    torch.manual_seed(5)
    other = {key: tensor + 1 for key, tensor in trained_weights(made / "calibrated").items()}
    torch.save(other, tmp_path / "other.pth")
    ran = verify(made / "trained", tmp_path / "other.pth")
    assert ran.code == 4
    assert "its weights have another sha256 than was recorded" in ran.err
    broken = shutil.copytree(made / "trained", tmp_path / "broken")
    weights = trained_weights(broken)
    for name in ("model.pth", "model.safetensors"):
        (broken / name).unlink()
    torch.save(weights | {"fuse.weight": weights["fuse.weight"] * float("nan")}, broken / "model.pth")
    ran = verify(broken, custom.source)
    assert (ran.code, ran.out) == (4, "")
    assert "NaN" in ran.err
