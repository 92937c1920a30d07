"""What a dry run says is what the training then does."""

import random
from dataclasses import replace

import pytest
import torch

from equalize.commands.finetune.dry_run import forecast_training
from equalize.commands.finetune.finetune import finetune
from equalize.commands.finetune.pace import Pace
from equalize.errors import InputError, OutputError
from tests.support.training import QUICK, metrics

ANY = Pace(step=2.0, image=0.5, cached=0.0, memory=None)


@pytest.mark.parametrize(
    "length",
    [
        {"max_steps": None, "epochs": 2, "batch_size": 3, "accumulate": 2},  # 8 pairs: 2 whole batches make a step
        {"max_steps": 5, "eval_every": 2, "eval_first": 1},
    ],
)
def test_steps_and_evaluations_are_those_of_the_training(calm, five_classes, tmp_path, length, monkeypatch):
    config = replace(QUICK, **length)
    monkeypatch.setattr("equalize.commands.finetune.dry_run.pace_of", lambda task: ANY)
    found = forecast_training(calm, five_classes, tmp_path / "out", config)
    done = finetune(calm, five_classes, tmp_path / "out", config)
    scored = [line for line in metrics(tmp_path / "out") if "mIoU" in line]
    assert (found.steps, found.epochs, found.evaluations) == (done.steps, done.epochs, len(scored))
    assert found.seconds == found.steps * 2.0 + found.evaluations * 3 * 0.5
    again = forecast_training(calm, five_classes, tmp_path / "out", config, resume=True)
    assert (again.first_step, again.seconds) == (found.steps, 0)
    with pytest.raises(InputError, match=r"cannot be resumed as another run: lr was 0.003, now 0.5"):
        forecast_training(calm, five_classes, tmp_path / "out", replace(config, lr=0.5), resume=True)


def test_what_comes_before_the_first_step_takes_its_time_and_nothing_is_written(calm, five_classes, tmp_path):
    config = replace(QUICK, calibrate="migrate", freeze_backbone=True, cache_backbone=True)
    torch.manual_seed(3)
    random.seed(3)
    found = forecast_training(calm, five_classes, tmp_path / "out", config)
    drawn = (float(torch.rand(())), random.random())
    torch.manual_seed(3)
    random.seed(3)
    assert drawn == (float(torch.rand(())), random.random())
    assert found.to_json()["train_as"] == "explicit"
    assert found.measured == 4  # QUICK's samples, of 8
    pace = found.pace
    scored = 3 * found.evaluations
    assert found.seconds == pytest.approx(8 * pace.step + (4 + scored) * pace.image + (8 + 3) * pace.cached)
    assert min(pace.step, pace.image, pace.cached) > 0
    assert not any(tmp_path.iterdir())


def test_what_would_be_refused_is_refused(calm, five_classes, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="exists"):
        forecast_training(calm, five_classes, tmp_path, QUICK)
