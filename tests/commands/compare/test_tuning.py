"""Sweeps over made-up scores; then a whole comparison that tunes and confirms."""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from equalize.commands.compare.arms import read_arms
from equalize.commands.compare.compare import compare
from equalize.commands.compare.pictures import draw_comparison
from equalize.commands.compare.report import headings, legend, rows_of
from equalize.commands.compare.setup import Setup
from equalize.commands.compare.tuning import tune
from equalize.commands.finetune import stored_backbone
from equalize.errors import InputError, NumericsError
from tests.commands.compare.test_runs import QUICK
from tests.support.compared_nets import named
from tests.support.scenes import write_scenes


def tuned(peak: float, rates=(1e-3, 3e-3, 1e-2), seeds=(0, 1)):
    """Scores fall off from a peak, by the logarithm; seeds differ by a point."""
    setup = SimpleNamespace(arms=read_arms(["none", "migrate"]), rates=rates, seeds=seeds)
    trained = set()

    def score(run):
        assert run in trained
        return 50 - 10 * abs(math.log(run.rate / (peak if run.arm.name == "migrate" else 3e-3))) + run.seed

    found = tune(setup, trained.update, score)
    return found, {(run.arm.name, run.rate) for run in trained}


def test_a_best_rate_inside_the_sweep_ends_it():
    found, trained = tuned(3.1e-3)
    assert {name: each.best for name, each in found.items()} == {"none": 3e-3, "migrate": 3e-3}
    assert found["none"].means[1] == pytest.approx(50.5)
    assert not found["none"].at_edge
    # beyond the sweep, a tenth of the best
    assert trained == {(arm, rate) for arm in found for rate in (3e-4, 1e-3, 3e-3, 1e-2)}


@pytest.mark.parametrize(("peak", "best", "rates"), [(0.1, 0.1111, 3), (2.5e-4, 3.333e-4, 2)])
def test_a_sweep_goes_on_by_its_factor_beyond_an_edge(peak, best, rates):
    found, _ = tuned(peak)
    sweep = found["migrate"]
    assert sweep.best == pytest.approx(best)
    assert len(sweep.rates) == 3 + rates
    assert not sweep.at_edge
    steps = [b / a for a, b in zip(sweep.rates, sweep.rates[1:], strict=False)]
    assert all(2.9 < step < 3.4 for step in steps)
    assert len(found["none"].rates) == 3


def test_a_sweep_ends_though_the_best_is_at_its_edge():
    found, _ = tuned(1e9)
    assert len(found["migrate"].rates) == 9
    assert found["migrate"].at_edge


def test_a_sweep_ends_where_training_diverges():
    setup = SimpleNamespace(arms=read_arms(["none", "migrate"]), rates=(1e-3, 3e-3), seeds=(0, 1))
    trained = set()

    def train(runs):
        if any(run.arm.name == "migrate" and run.rate > 2e-2 for run in runs):
            raise NumericsError("step 1", "the loss is not finite")
        trained.update(runs)

    found = tune(setup, train, lambda run: 50 + run.rate)  # the higher, the better
    assert found["migrate"].rates == (1e-3, 3e-3, 9e-3)
    assert (found["migrate"].best, found["migrate"].at_edge) == (9e-3, True)
    assert len(found["none"].rates) == 8
    setup.rates = (1e-3, 1e-1)  # asked for
    with pytest.raises(NumericsError):
        tune(setup, train, lambda run: 50 + run.rate)


def test_one_rate_is_no_sweep():
    found, trained = tuned(1.0, rates=(1e-2,))
    assert (found["migrate"].rates, found["migrate"].at_edge) == ((1e-2,), False)
    assert ("migrate", 1e-3) in trained


# a whole one


@pytest.fixture(scope="module")
def three_splits(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("three"), 5, counts={"train": 8, "val": 4, "test": 5})


CONFIG = replace(QUICK, seed=0, max_steps=2, freeze_backbone=True, cache_backbone=True)


@pytest.fixture(scope="module")
def nets(nets):
    """With a backbone whose BatchNorm saw data: otherwise each seed would estimate it on its own images."""
    state = torch.load(nets / "whole.pth")
    torch.save({**state, "backbone.1.num_batches_tracked": torch.tensor(1)}, nets / "seen.pth")
    return nets


def made(nets, data, config=CONFIG, **options) -> Setup:
    options = {"rates": (1e-3, 1e-2), "seeds": 1, "confirm_seeds": 2, "test_split": "test", "evaluations": 1, **options}
    return Setup.make(named(nets, "seen.pth"), str(data), config, arms=read_arms(["none", "explicit"]), **options)


def test_rates_are_chosen_on_one_split_and_confirmed_on_another(nets, three_splits, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr("equalize.commands.compare.tuning._MOST_STEPS", 1)
    setup = made(nets, three_splits, evaluations=2)
    found = compare(setup, out)
    content = json.loads((out / "compare.json").read_text())
    assert (content["tuned_on"], content["confirmed_on"], content["confirm_seeds"]) == ("val", "test", [1, 2])
    best = {each["arm"]: each["best"] for each in content["tuned"]}
    runs = {(run["arm"], run["lr"], run["seed"]): run for run in content["runs"]}
    assert {key for key, run in runs.items() if "test" in run} == {
        (arm, rate, seed) for arm, rate in best.items() for seed in (1, 2)
    }
    assert {len(run["curve"]) for run in runs.values() if "test" not in run} == {1}  # tuning wants the end alone
    assert all(len(run["curve"]) > 1 for run in runs.values() if "test" in run)
    for row in found.confirmed:
        assert row.scores == tuple(runs[row.arm, row.lr, seed]["test"]["mIoU"] for seed in (1, 2))
        assert row.loss_at_tenth is not None
    assert len(list((out / "features").iterdir())) == 3  # of the three splits, for all runs
    assert headings(found) == ("arm", "lr", "sigmas", "mIoU")  # the end alone was scored: nothing is early
    assert {len(row) for row in rows_of(found)} == {4}
    assert "early" not in legend(found)
    names = [picture.name for picture in draw_comparison(found)]
    assert names == ["confirmed", "rates", "compare", "classes"]
    # Resumed, it decides the same and trains what is missing alone, without running the backbone.
    key = f"explicit_lr{best['explicit']:g}_seed2"
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*.json") if path.stem != key}
    (out / "runs" / f"{key}.json").unlink()
    monkeypatch.setattr(stored_backbone.StoredBackbone, "run", None)
    again = compare(setup, out).to_json()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again["confirmed"] == found.to_json()["confirmed"]
    shutil.rmtree(out / "features")
    with pytest.raises(InputError, match="holds a comparison with other settings"):
        compare(made(nets, three_splits, seeds=2, evaluations=2), out)


@pytest.mark.slow
def test_labels_of_the_third_split_mean_what_they_mean_in_training(nets, tmp_path):
    """0 and 255 alone are two classes: with 255 ignored, every class 0 that is found would be right."""
    data = write_scenes(tmp_path / "data", 2, counts={"train": 4, "val": 2, "test": 2})
    for path in data.glob("masks/*/*.png"):
        Image.fromarray((np.asarray(Image.open(path)) == 1).astype(np.uint8) * 255).save(path)
    setup = made(nets, data, replace(CONFIG, num_classes=2), rates=(1e-3,))
    compare(setup, tmp_path / "out")
    counts = np.load(next((tmp_path / "out/runs").glob("*.test.npz")))
    assert counts["intersection"].sum() + counts["union"].sum() == 2 * 2 * 48 * 64  # every pixel, as two classes see it


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"test_split": "val"}, "--test-split: is trained on or chooses the rates already"),
        ({"test_split": None}, "--test-split: is missing"),
        ({"confirm_seeds": 0}, "--confirm-seeds: is missing"),
    ],
)
def test_what_cannot_confirm(nets, three_splits, options, said):
    with pytest.raises(InputError, match=said):
        made(nets, three_splits, **options)
