"""Whole comparisons of tiny trainings."""

import hashlib
import json
import math
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from equalize.checkpoint.load import ModelName
from equalize.commands.compare.arms import Arm, read_arms
from equalize.commands.compare.compare import compare
from equalize.commands.compare.setup import Run, Setup
from equalize.commands.compare.start import begin, digest, scales
from equalize.commands.finetune.config import Recipe
from equalize.commands.images import Images, Measuring
from equalize.errors import DataError, InputError, OutputError, SiteError
from equalize.plan.apply import apply
from tests.support.scenes import write_scenes

QUICK = Recipe(max_steps=4, batch_size=4, lr=0.01, size=(48, 64), device="cpu", samples=4, seed=3)

FACTORY = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, num_classes=5):
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
            self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
            self.fuse = nn.Conv2d(16, 8, 1)
            self.norm = nn.BatchNorm2d(8)
            self.classify = nn.Conv2d(8, num_classes, 1)

        def forward(self, x):
            low = self.backbone(x)
            high = nn.functional.interpolate(0.1 * self.deep(low), scale_factor=2, mode="bilinear")
            return self.classify(self.norm(self.fuse(torch.cat([low, high], 1))).relu())

    class Plain(nn.Module):
        def __init__(self, num_classes=5):
            super().__init__()
            self.backbone = nn.Conv2d(3, 8, 3, 2, 1)
            self.classify = nn.Conv2d(8, num_classes, 1)

        def forward(self, x):
            return self.classify(self.backbone(x).relu())
"""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("five"), 5, counts={"train": 8, "val": 6})


@pytest.fixture(scope="module")
def nets(tmp_path_factory) -> Path:
    """A directory with the factory, whole.pth, backbone.pth (nothing else of it) and plain.pth."""
    directory = tmp_path_factory.mktemp("nets")
    (directory / "compared_net.py").write_text(textwrap.dedent(FACTORY))
    sys.path.insert(0, str(directory))
    import compared_net

    sys.path.remove(str(directory))
    torch.manual_seed(11)
    whole = compared_net.Net().state_dict()
    torch.save(whole, directory / "whole.pth")
    torch.save({key: value for key, value in whole.items() if key.startswith("backbone")}, directory / "backbone.pth")
    torch.save(compared_net.Plain().state_dict(), directory / "plain.pth")
    return directory


def named(nets, file="whole.pth", factory="Net", **flags) -> ModelName:
    return ModelName(source=str(nets / file), arch=f"{nets / 'compared_net.py'}:{factory}", **flags)


def made(nets, scenes, arms, *, recipe=QUICK, name=None, **options) -> Setup:
    options = {"seeds": 2, "evaluations": 1, **options}
    return Setup.make(name or named(nets), str(scenes), recipe, arms=read_arms(arms), **options)


def files(out: Path) -> dict[str, bytes]:
    """The finished runs, without how long they took."""
    found = {}
    for path in (out / "runs").glob("*.json"):
        content = json.loads(path.read_text())
        del content["seconds"]
        found[path.name] = json.dumps(content).encode()
    return found


# what is found, and what is not


def test_identical_arms_are_said_to_be_no_different(nets, scenes, tmp_path):
    """`preserve`, trained folded, changes nothing."""
    found = compare(made(nets, scenes, ["none", "preserve+folded"], rates=(0.01, 0.03)), tmp_path / "out")
    assert all(row.final.pairs == row.early.pairs == (0.0, 0.0) for row in found.rows)
    for answer in found.verdicts[0].answers.values():
        assert answer.sentence.endswith("no measurable difference")
    assert all(value > 0 for cell in found.cells.values() for value in cell.final)


def test_a_planted_difference_is_found(nets, scenes, tmp_path, monkeypatch):
    """One arm does not learn."""
    recipe_of = Setup.recipe_of

    def planted(self, run):
        recipe = recipe_of(self, run)
        return replace(recipe, lr=1e-12) if run.arm.name == "rescale" else recipe

    monkeypatch.setattr(Setup, "recipe_of", planted)
    setup = made(nets, scenes, ["none", "rescale"], recipe=replace(QUICK, max_steps=20, lr=0.03), seeds=3)
    found = compare(setup, tmp_path / "out")
    assert found.rows[0].final.measurable
    assert found.rows[0].final.high < 0
    assert found.verdicts[0].best.sentence.endswith(": worse")


# fair arms


def test_arms_of_a_seed_begin_alike_and_see_the_same_batches(nets, scenes, tmp_path, monkeypatch):
    from equalize.commands.finetune.loss import Trained

    batches: list[str] = []
    forward = Trained.forward

    def watched(self, pixel_values, labels):
        batches.append(hashlib.sha256(pixel_values.numpy().tobytes() + labels.numpy().tobytes()).hexdigest())
        return forward(self, pixel_values, labels)

    monkeypatch.setattr(Trained, "forward", watched)
    name = named(nets, "backbone.pth", init_missing=True, num_classes=5)
    arms = ["none", "rescale+keep-norm", "reinit+explicit"]
    compare(made(nets, scenes, arms, recipe=replace(QUICK, max_steps=3), name=name), tmp_path / "out")
    assert len(batches) == 3 * 3 * 2
    runs = [batches[start : start + 3] for start in range(0, len(batches), 3)]
    assert all(run == runs[0] for run in runs[:3])
    assert all(run == runs[3] for run in runs[3:])
    assert runs[0] != runs[3]
    results = [json.loads(content) for content in files(tmp_path / "out").values()]
    starts = {seed: {each["start"] for each in results if each["seed"] == seed} for seed in (3, 4)}
    assert [len(each) for each in starts.values()] == [1, 1]
    assert starts[3] != starts[4]


def loaded(nets, scenes):
    checkpoint = named(nets).load()
    return checkpoint, Images(str(scenes), checkpoint, Measuring(samples=4, size=(48, 64), device="cpu", split="train"))


def test_redrawn_has_the_draw_that_reinit_equalizes(nets, scenes):
    (plain, images), (equalized, _) = loaded(nets, scenes), loaded(nets, scenes)
    before = plain.model.fuse.weight.clone()
    begin(plain, images, Arm.read("redrawn"), 5)
    plan = begin(equalized, images, Arm.read("reinit"), 5)
    assert not torch.allclose(plain.model.fuse.weight, before)
    sigmas = torch.tensor([branch.std for branch in plan.sites[0].branches]).repeat_interleave(8)
    torch.testing.assert_close(equalized.model.fuse.weight * sigmas[None, :, None, None], plain.model.fuse.weight)


@pytest.mark.parametrize("arm", ["none", "redrawn", "rescale", "reinit+keep-norm"])
def test_norms_that_saw_nothing_are_estimated_in_every_arm_and_plans_repeat(nets, scenes, arm):
    checkpoint, images = loaded(nets, scenes)
    plan = begin(checkpoint, images, Arm.read(arm), 1)
    assert all(
        module.running_mean.any() and module.num_batches_tracked
        for module in checkpoint.model.modules()
        if isinstance(module, torch.nn.BatchNorm2d)
    )
    again, _ = loaded(nets, scenes)
    assert digest(again.model) != digest(checkpoint.model)
    apply(plan, again.model)
    assert digest(again.model) == digest(checkpoint.model)


def test_ratios_are_those_measured_and_those_that_training_sees(nets, scenes):
    for name, equal in (("none", False), ("preserve", True), ("preserve+folded", False), ("rescale", True)):
        checkpoint, images = loaded(nets, scenes)
        arm = Arm.read(name)
        plan = begin(checkpoint, images, arm, 0)
        (site,) = scales(plan, arm)
        sigmas = [branch.std for branch in plan.sites[0].branches]
        assert site["ratio"] == pytest.approx(max(sigmas) / min(sigmas))
        assert site["ratio"] > 5
        assert site["ratio_after"] == pytest.approx(1.0 if equal else site["ratio"])


# going on


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def uninterrupted(nets, scenes, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    compare(made(nets, scenes, ["none", "rescale"], evaluations=2), out)
    return out


def test_interrupted_between_and_in_runs_and_gone_on_with(nets, scenes, tmp_path, uninterrupted):
    """Four runs of 16 pairs: stopped as the second begins, and later in the middle of the third."""
    setup = made(nets, scenes, ["none", "rescale"], evaluations=2)
    times: dict[Path, int] = {}
    for finished, pairs in ((0, 20), (1, 24)):

        def kill(done, of, left=4 - finished, pairs=pairs):
            assert of == 16 * left
            if done == pairs:
                raise Killed

        with pytest.raises(Killed):
            compare(setup, tmp_path / "out", progress=kill)
        assert len(files(tmp_path / "out")) == finished + 1
        assert {path: path.stat().st_mtime_ns for path in times} == times
        times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/runs").glob("*.json")}
    said: list[str] = []
    compare(setup, tmp_path / "out", say=said.append)
    assert "2 of 4 runs are there already" in said
    assert files(tmp_path / "out") == files(uninterrupted)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert sorted(path.suffix for path in (tmp_path / "out/runs").iterdir()) == [".json"] * 4 + [".npz"] * 4


def test_more_may_be_asked_for_but_nothing_else(nets, scenes, tmp_path):
    out = tmp_path / "out"
    short = replace(QUICK, max_steps=2)
    compare(made(nets, scenes, ["none", "rescale"], recipe=short, seeds=1), out)
    before = files(out)
    found = compare(made(nets, scenes, ["none", "rescale"], recipe=replace(short, workers=0), seeds=2), out)
    assert len(found.results) == 4
    assert before.items() <= files(out).items()
    for changed in (
        made(nets, scenes, ["none", "rescale"], recipe=replace(short, batch_size=2)),
        made(nets, scenes, ["none", "migrate"], recipe=short),
        made(nets, scenes, ["none", "rescale"], recipe=short, rates=(0.02,)),
        made(nets, scenes, ["none", "rescale"], recipe=short, seeds=1),
    ):
        with pytest.raises(InputError, match="holds a comparison with other settings"):
            compare(changed, out)
    assert len(files(out)) == 4


def test_another_model_under_the_same_name_is_refused(nets, scenes, tmp_path):
    path = tmp_path / "net.pth"
    state = torch.load(nets / "whole.pth")
    torch.save(state, path)
    name = replace(named(nets), source=str(path))
    short = replace(QUICK, max_steps=1)
    compare(made(nets, scenes, ["none", "rescale"], recipe=short, name=name, seeds=1), tmp_path / "out")
    torch.save({**state, "classify.bias": state["classify.bias"] + 1}, path)
    with pytest.raises(InputError, match="is no longer the model that none_lr0"):
        compare(made(nets, scenes, ["none", "rescale", "migrate"], recipe=short, name=name, seeds=1), tmp_path / "out")


# refusals


def test_refusals_leave_nothing(nets, scenes, tmp_path):
    with pytest.raises(SiteError, match="nothing to compare"):
        compare(made(nets, scenes, ["none", "rescale"], name=named(nets, "plain.pth", "Plain")), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("")
    with pytest.raises(OutputError, match="holds no comparison"):
        compare(made(nets, scenes, ["none", "rescale"]), tmp_path / "full")
    unscored = write_scenes(tmp_path / "data", 5, counts={"train": 4})
    with pytest.raises(DataError, match="no validation split"):
        made(nets, unscored, ["none", "rescale"])
    for recipe in (replace(QUICK, patience=2), replace(QUICK, calibrate="auto")):
        with pytest.raises(InputError, match="cannot be set in a comparison"):
            made(nets, scenes, ["none", "rescale"], recipe=recipe)
    for rates in ((0.1, 0.1), (0.0,), (math.inf,)):
        with pytest.raises(InputError, match="--lrs"):
            made(nets, scenes, ["none", "rescale"], rates=rates)


def test_epochs_are_counted_as_the_trainer_counts_them(nets, scenes, tmp_path):
    recipe = replace(QUICK, max_steps=None, epochs=2, batch_size=3)
    setup = made(nets, scenes, ["none", "rescale"], recipe=recipe, seeds=1, evaluations=2)
    assert (setup.recipe.max_steps, setup.recipe.eval_every, setup.recipe.eval_first) == (4, 2, 1)
    found = compare(setup, tmp_path / "out")
    assert [step for step, _ in found.results[0]["curve"]] == [1, 2, 4]
    assert found.results[0]["curve"][-1][1] == found.results[0]["mIoU"]
    assert found.results[0]["early"] == {"step": 1, "mIoU": found.results[0]["curve"][0][1]}


def test_names_of_runs():
    assert Run(arm=Arm.read("rescale+keep-norm"), rate=3e-4, seed=2).name == "rescale+keep-norm_lr0.0003_seed2"
