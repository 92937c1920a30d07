"""Whole comparisons of tiny trainings."""

import hashlib
import json
import math
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock

from equalize.commands.compare.arms import read_arms
from equalize.commands.compare.compare import Comparison, compare
from equalize.commands.compare.runs import Runs
from equalize.commands.compare.setup import Setup
from equalize.commands.finetune.config import TrainConfig
from equalize.commands.finetune.finetune import finetune
from equalize.commands.finetune.loss import ModelWithLoss
from equalize.commands.finetune.sharding import check_launch
from equalize.errors import DataError, InputError, NumericsError, OutputError, SiteError
from equalize.plan import indicator
from tests.support.compared_nets import named
from tests.support.scenes import write_scenes
from tests.support.training import Killed, OnStep

QUICK = TrainConfig(
    max_steps=4, batch_size=8, lr=0.01, size=(48, 64), device="cpu", samples=4, seed=3,
    random_resize=(1.0, 1.0), photometric=False, cat_max_ratio=1.0,
)  # fmt: skip


def made(nets, scenes, arms, *, config=QUICK, name=None, **options) -> Setup:
    options = {"seeds": 1, "evaluations": 1, **options}
    return Setup.make(name or named(nets), str(scenes), config, arms=read_arms(arms), **options)


def files(out: Path) -> dict[str, bytes]:
    """The finished runs, without how long they took."""
    found = {}
    for path in (out / "runs").glob("*.json"):
        content = json.loads(path.read_text())
        del content["seconds"]
        found[path.name] = json.dumps(content).encode()
    return found


# one comparison for most tests: begun with two seeds, gone on with a third


@dataclass(frozen=True, kw_only=True)
class Compared:
    out: Path
    setup: Setup
    found: Comparison
    before: dict[str, bytes]
    said: list[str]
    batches: list[str]


STEPS = 40
LONGER = replace(QUICK, max_steps=STEPS, lr=0.03, seed=0)
ONE_CLASS = "rescale"
RUNS = 9
"""One for each seed of the three arms."""


def compared_setup(nets, scenes, arms=("none", "preserve+folded", ONE_CLASS), **options) -> Setup:
    name = named(nets, "backbone.pth", init_missing=True, num_classes=5)
    options = {"config": LONGER, "seeds": 3, "evaluations": 2, **options}
    return made(nets, scenes, arms, name=name, **options)


@pytest.fixture(scope="module")
def compared(nets, scenes, tmp_path_factory) -> Compared:
    """`preserve`, trained folded, changes nothing; the last arm learns but one class."""
    out = tmp_path_factory.mktemp("compared") / "out"
    batches: list[str] = []
    config_of, forward = Setup.config_of, ModelWithLoss.forward

    def planted(self, run):
        config = config_of(self, run)
        return replace(config, class_weights=(1.0, 0, 0, 0, 0)) if run.arm.name == ONE_CLASS else config

    def watched(self, pixel_values, labels):
        batches.append(hashlib.sha256(pixel_values.numpy().tobytes() + labels.numpy().tobytes()).hexdigest())
        return forward(self, pixel_values, labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Setup, "config_of", planted)
        patch.setattr(ModelWithLoss, "forward", watched)
        compare(compared_setup(nets, scenes, seeds=2), out)
        before, said = files(out), []
        setup = compared_setup(nets, scenes)
        found = compare(setup, out, notify=said.append)
    return Compared(out=out, setup=setup, found=found, before=before, said=said, batches=batches)


def test_identical_arms_are_said_to_be_no_different(compared):
    same, other = compared.found.rows
    assert (same.arm, other.arm) == ("preserve+folded", ONE_CLASS)
    # The same steps of the same kernels on the same numbers.
    assert same.difference.pairs == same.early.pairs == (0.0,) * 3
    verdict = compared.found.verdicts[0]
    for answer in (verdict.best, verdict.early):
        assert answer.sentence.endswith("no measurable difference")
    assert all(value > 0 for cell in compared.found.cells.values() for value in cell.final)


def test_a_planted_difference_is_found(compared):
    difference = compared.found.rows[1].difference
    assert difference.measurable
    assert difference.high < 0
    assert difference.images[1] < 0
    assert compared.found.verdicts[1].best.sentence.endswith(": worse")


def test_arms_of_a_seed_start_alike_and_see_the_same_batches(compared):
    runs = [compared.batches[start : start + STEPS] for start in range(0, len(compared.batches), STEPS)]
    assert len(runs) == RUNS
    for seed in range(3):
        assert runs[3 * seed] == runs[3 * seed + 1] == runs[3 * seed + 2]
    assert len({tuple(run) for run in runs}) == 3
    starts = {seed: {each["start"] for each in compared.found.results if each["seed"] == seed} for seed in range(3)}
    assert [len(each) for each in starts.values()] == [1, 1, 1]
    assert len(set.union(*starts.values())) == 3


def test_what_a_run_files(compared):
    steps = [STEPS // 10, STEPS // 2, STEPS]
    for result in compared.found.results:
        assert [step for step, _ in result["curve"]] == steps
        # The same kernels on the same images: once while training, once to count image by image.
        assert result["curve"][-1][1] == result["mIoU"]
        assert result["early"] == {"step": STEPS // 10, "mIoU": result["curve"][0][1]}
    assert sorted(path.suffix for path in (compared.out / "runs").iterdir()) == [".json"] * RUNS + [".npz"] * RUNS


def test_seeds_may_be_added_but_nothing_else_changed(nets, scenes, compared):
    assert len(compared.before) == 6
    assert "6 of 9 runs are there already" in compared.said
    after = files(compared.out)
    assert len(after) == RUNS
    assert compared.before.items() <= after.items()
    config = compared.setup.config
    for changed in (
        compared_setup(nets, scenes, config=replace(LONGER, batch_size=2)),
        compared_setup(nets, scenes, ["none", "migrate", ONE_CLASS]),
        compared_setup(nets, scenes, rates=(0.02,)),
        compared_setup(nets, scenes, seeds=2),
    ):
        with pytest.raises(InputError, match="holds a comparison with other settings"):
            compare(changed, compared.out)
    again = compared_setup(nets, scenes, config=replace(LONGER, workers=1))
    assert again.config != config
    assert compare(again, compared.out).to_json() == compared.found.to_json()
    assert files(compared.out) == after


def test_a_rate_at_which_training_diverges_can_be_left_out(nets, scenes, tmp_path):
    out, one_step = tmp_path / "out", replace(QUICK, max_steps=1)
    with pytest.raises(NumericsError, match=r"the others go on with --lrs without 1e\+30"):
        compare(made(nets, scenes, ["none", "preserve"], config=one_step, rates=(0.01, 1e30)), out)
    before = files(out)
    assert len(before) == 2
    found = compare(made(nets, scenes, ["none", "preserve"], config=one_step, rates=(0.01,)), out)
    assert files(out) == before
    assert [row.lr for row in found.rows] == [0.01]


def test_interrupted_between_and_in_runs_and_gone_on_with(nets, scenes, compared, tmp_path):
    """Two runs are missing: stopped as the second begins, and then in its middle."""
    out = tmp_path / "out"
    shutil.copytree(compared.out, out)
    for path in [*out.glob("runs/none_*seed2.*"), *out.glob("runs/preserve*seed2.*"), *out.glob("plans/*seed2.json")]:
        path.unlink()
    missing, times = 2, {}
    for stop in (STEPS + 1, STEPS * 5 // 8):

        def kill(done, of, missing=missing, stop=stop):
            assert of == STEPS * missing
            if done == stop:
                raise Killed

        with pytest.raises(Killed):
            compare(compared.setup, out, monitor=OnStep(kill))
        missing = 1
        assert len(files(out)) == RUNS - missing
        times = times or {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*.json")}
        assert {path: path.stat().st_mtime_ns for path in times} == times
    said: list[str] = []
    compare(compared.setup, out, notify=said.append)
    assert "8 of 9 runs are there already" in said
    assert f"going on after step {STEPS // 2}" in said
    # Interrupted or not, a CPU does the same steps of the same kernels.
    assert files(out) == files(compared.out)
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_processes_share_the_runs(nets, scenes, compared, tmp_path, monkeypatch):
    """Of two missing runs another process trains one: the other is trained, and then that one waited for."""
    out = tmp_path / "out"
    shutil.copytree(compared.out, out)
    theirs, mine = out / "runs/none_lr0.03_seed2.json", out / "runs/preserve+folded_lr0.03_seed2.json"
    elsewhere = theirs.rename(tmp_path / theirs.name)
    before = elsewhere.stat().st_mtime_ns
    mine.unlink()
    lock = FileLock(out / "locks" / theirs.stem)
    lock.acquire()

    def finish_theirs(seconds):
        assert mine.exists()
        elsewhere.rename(theirs)
        lock.release()

    clock = SimpleNamespace(monotonic=time.monotonic, sleep=finish_theirs)
    monkeypatch.setattr("equalize.commands.compare.runs.time", clock)
    said: list[str] = []
    compare(compared.setup, out, notify=said.append)
    assert "waiting for 1 of 9 runs, which another process trains" in said
    assert theirs.stat().st_mtime_ns == before
    # The same steps of the same kernels, whoever trains.
    assert files(out) == files(compared.out)


def test_another_model_under_the_same_name_is_refused(nets, scenes, compared):
    path = nets / "backbone.pth"
    original = path.read_bytes()
    state = torch.load(path)
    more = compared_setup(nets, scenes, ["none", "preserve+folded", ONE_CLASS, "migrate"])
    try:
        torch.save({**state, "backbone.0.bias": state["backbone.0.bias"] + 1}, path)
        with pytest.raises(InputError, match="is no longer the model that none_lr0"):
            compare(more, compared.out)
    finally:
        path.write_bytes(original)
    assert len(files(compared.out)) == RUNS


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
    for config in (replace(QUICK, patience=2), replace(QUICK, calibrate="auto")):
        with pytest.raises(InputError, match="cannot be set in a comparison"):
            made(nets, scenes, ["none", "rescale"], config=config)
    for rates in ((0.1, 0.1), (0.0,), (math.inf,)):
        with pytest.raises(InputError, match="--lrs"):
            made(nets, scenes, ["none", "rescale"], rates=rates)


def test_a_comparison_that_another_process_is_beginning_is_shared(nets, scenes, tmp_path):
    out = tmp_path / "out"
    (out / "locks").mkdir(parents=True)
    (out / ".settings.json.4711").write_text("{")
    assert Runs(out, made(nets, scenes, ["none", "rescale"])).path == out


def test_a_refusal_leaves_what_others_wrote(nets, scenes, tmp_path):
    """A mask that cannot be read may be met after hours, and another process may train beside this one."""
    setup, state = made(nets, scenes, ["none", "rescale"]), tmp_path / "out/runs/none_lr0.01_seed3/last/checkpoint-2"

    def train(self, run, **others):
        state.mkdir(parents=True)
        raise DataError("mask.png", "cannot be read")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runs, "train", train)
        with pytest.raises(DataError):
            compare(setup, tmp_path / "out")
    assert state.exists()
    beside = Runs(tmp_path / "beside", setup)
    for name in ("mine", "theirs"):
        (beside.path / "locks" / name).touch()
    beside.withdraw()
    assert beside.path.exists()
    (beside.path / "locks/theirs").unlink()
    beside.withdraw()
    assert not beside.path.exists()


def test_epochs_are_counted_as_finetune_counts_them(nets, scenes, tmp_path):
    config = replace(QUICK, max_steps=None, epochs=2, batch_size=3)
    setup = made(nets, scenes, ["none", "rescale"], config=config, evaluations=2)
    assert (setup.config.max_steps, setup.config.eval_every, setup.config.eval_first) == (4, 2, 1)
    assert finetune(named(nets), scenes, tmp_path / "out", config).steps == 4


def test_auto_is_asked_for_the_optimizer_of_the_runs(nets, scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(indicator, "gained", lambda *args: 0.5 if args[-1] == "sgd" else 0.0)
    for optimizer, strategy in (("adamw", "none"), ("sgd", "migrate")):
        setup = made(nets, scenes, ("none", "auto"), config=replace(QUICK, optimizer=optimizer, max_steps=1))
        _, auto = compare(setup, tmp_path / optimizer).results
        assert [site["strategy"] for site in auto["sites"]] == [strategy]


def test_a_comparison_does_not_name_torchrun_which_it_refuses(nets, scenes, tmp_path, monkeypatch):
    """Its processes are started one by one."""
    said: list[str] = []

    def on_two_gpus(_, notify):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "device_count", lambda: 2)
            check_launch(torch.device("cuda"), notify)

    monkeypatch.setattr("equalize.commands.finetune.finetune.check_launch", on_two_gpus)
    config = replace(QUICK, max_steps=1)
    finetune(named(nets), scenes, tmp_path / "alone", config, notify=said.append)
    assert sum("torchrun" in line for line in said) == 1
    compare(made(nets, scenes, ("none", "rescale"), config=config), tmp_path / "compared", notify=said.append)
    assert sum("torchrun" in line for line in said) == 1
