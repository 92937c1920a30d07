"""Steps, resuming, early stopping: what `transformers.Trainer` does with our parts in it."""

import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from equalize.commands.evaluate import EvalConfig, evaluate
from equalize.commands.finetune.arguments import arguments_of
from equalize.commands.finetune.callbacks import CheckpointWriter, read_weights
from equalize.commands.finetune.config import TrainConfig
from equalize.commands.finetune.finetune import finetune
from equalize.commands.finetune.sharding import check_launch
from equalize.data.pairs import TrainingPairs
from equalize.errors import InputError, NumericsError, OutputError, ResourceError
from tests.support.scenes import write_scenes
from tests.support.side_by_side import start
from tests.support.tolerance import TIE
from tests.support.training import QUICK, Killed, OnStep, falls, metrics, same, trained_weights


def kill_at(step: int) -> OnStep:
    def kill(done: int, of: int) -> None:
        if done == step:
            raise Killed

    return OnStep(kill)


STEADY = replace(QUICK, max_steps=7, log_every=1, eval_every=3, random_resize=(0.7, 1.4), flip=0.5, photometric=True)


def newest(out: Path) -> dict:
    checkpoint = max((out / "last").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    return {
        "weights": torch.load(checkpoint / "pytorch_model.bin", weights_only=True),
        "optimizer": torch.load(checkpoint / "optimizer.pt", weights_only=True),
        "random": torch.load(checkpoint / "rng_state.pth", weights_only=False)["cpu"],
    }


def assert_same_run(first: Path, second: Path):
    """To the last bit: the same kernels on the same batches, however often the run was cut off."""
    a, b = newest(first), newest(second)
    assert same(a["weights"], b["weights"])
    assert torch.equal(a["random"], b["random"])
    for index, slots in a["optimizer"]["state"].items():
        assert same(slots, b["optimizer"]["state"][index])
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    assert same(trained_weights(first), trained_weights(second))
    assert metrics(first) == metrics(second)


@pytest.fixture(scope="session")
def uninterrupted(custom, five_classes, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    finetune(custom, five_classes, out, STEADY, resume=True)  # there is nothing yet: it begins
    return out


@pytest.mark.parametrize("steps", [1, 5])
def test_killed_and_resumed_ends_with_the_same_bits(custom, five_classes, tmp_path, uninterrupted, steps):
    out = tmp_path / "out"
    with pytest.raises(Killed):
        finetune(custom, five_classes, out, STEADY, monitor=kill_at(steps))
    random.seed(99)
    torch.manual_seed(99)
    said = []
    finetune(custom, five_classes, out, STEADY, resume=True, notify=said.append)
    assert_same_run(uninterrupted, out)
    assert ("going on after step 3" in said) == (3 < steps < 7)


@pytest.mark.slow
def test_killed_twice_while_saving(custom, five_classes, tmp_path, uninterrupted, monkeypatch):
    from transformers import TrainerState

    out = tmp_path / "out"
    write = TrainerState.save_to_json

    def cut_off(self, path):
        if self.global_step == 6:
            Path(path).write_text('{"epoch": 1.')
            raise Killed
        write(self, path)

    monkeypatch.setattr(TrainerState, "save_to_json", cut_off)
    with pytest.raises(Killed):
        finetune(custom, five_classes, out, STEADY)
    assert len(list((out / "last").glob("checkpoint-*"))) == 2
    with pytest.raises(Killed):
        finetune(custom, five_classes, out, STEADY, resume=True)
    monkeypatch.undo()
    finetune(custom, five_classes, out, STEADY, resume=True)
    assert_same_run(uninterrupted, out)


def test_killed_between_state_and_model_writes_that_model_when_resumed(
    custom, five_classes, tmp_path, uninterrupted, monkeypatch
):
    def killed(self, state):
        raise Killed

    out = tmp_path / "out"
    monkeypatch.setattr(CheckpointWriter, "write_best", killed)
    with pytest.raises(Killed):
        finetune(custom, five_classes, out, STEADY)
    assert not (out / "model.pth").exists()
    monkeypatch.undo()
    at_first = []

    def look(done: int, of: int) -> None:
        if not at_first:
            at_first.append(same(trained_weights(out), read_weights(out / "last/checkpoint-3")))

    finetune(custom, five_classes, out, STEADY, resume=True, monitor=OnStep(look))
    assert at_first == [True]  # before the first step
    assert_same_run(uninterrupted, out)


def test_killed_by_the_system(custom, five_classes, tmp_path, uninterrupted):
    """SIGKILL from outside as soon as step 4 is on disk, which may hit any moment after it."""
    out = tmp_path / "out"
    process = start(finetune, custom, five_classes, out, STEADY)
    while process.is_alive():
        if (out / "metrics.jsonl").is_file() and '"step": 4' in (out / "metrics.jsonl").read_text():
            process.kill()
            process.join()
        time.sleep(0.002)
    assert process.exitcode in (-signal.SIGKILL, 0)
    finetune(custom, five_classes, out, STEADY, resume=True)
    assert_same_run(uninterrupted, out)


def test_resuming_what_is_complete_changes_nothing(custom, five_classes, tmp_path, uninterrupted):
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    said = []
    done = finetune(custom, five_classes, out, STEADY, resume=True, notify=said.append)
    assert "the training was complete after step 7" in said
    assert done.steps == 7
    assert_same_run(uninterrupted, out)


def test_another_run_is_not_resumed(custom, five_classes, tmp_path, uninterrupted):
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    with pytest.raises(InputError, match=r"another run: lr was 0\.003, now 0\.001;"):
        finetune(custom, five_classes, out, replace(STEADY, lr=1e-3), resume=True)
    with pytest.raises(InputError, match="cannot be resumed as another run: train"):
        finetune(custom, write_scenes(tmp_path / "data", 5, counts={"train": 9, "val": 3}), out, STEADY, resume=True)
    with pytest.raises(OutputError, match="exists"):
        finetune(custom, five_classes, out, STEADY)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    with pytest.raises(OutputError, match="exists"):
        finetune(custom, five_classes, tmp_path / "other", STEADY, resume=True)


def test_runs_in_one_process_do_not_touch_each_other(custom, five_classes, tmp_path, uninterrupted):
    """What `compare` relies on: same arguments, same bits, whatever ran before; random numbers stay the caller's."""
    finetune(custom, five_classes, tmp_path / "other", replace(STEADY, seed=5, precision="bf16", max_steps=1))
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    finetune(custom, five_classes, tmp_path / "out", STEADY)
    assert_same_run(uninterrupted, tmp_path / "out")
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    other = finetune(custom, five_classes, tmp_path / "seed", replace(STEADY, seed=1, max_steps=1))
    assert other.losses[0][1] != next(line["loss"] for line in metrics(uninterrupted) if "loss" in line)


def test_calibrated_run_resumes_with_the_scales_it_measured(custom, five_classes, tmp_path):
    config = replace(STEADY, max_steps=2, eval_every=1, calibrate="preserve")
    finetune(custom, five_classes, tmp_path / "whole", config)
    with pytest.raises(Killed):
        finetune(custom, five_classes, tmp_path / "out", config, monitor=kill_at(2))
    finetune(custom, five_classes, tmp_path / "out", config, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "out")
    plain = {f"network.{key}" for key in torch.load(custom.source, weights_only=True)}
    assert newest(tmp_path / "out")["weights"].keys() == plain


def test_frozen_parts_do_not_move(custom, five_classes, tmp_path):
    before = torch.load(custom.source, weights_only=True)
    finetune(custom, five_classes, tmp_path / "backbone", replace(QUICK, freeze_backbone=True, max_steps=1))
    after = trained_weights(tmp_path / "backbone")
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert not any(key.startswith("backbone.") for key in moved)
    assert {"fuse.weight", "deep.1.running_mean", "deep.1.weight"} <= moved
    finetune(custom, five_classes, tmp_path / "norms", replace(QUICK, freeze_norms=True, max_steps=1))
    after = trained_weights(tmp_path / "norms")
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert not any(key.startswith(("backbone.1", "deep.1")) for key in moved)
    assert "backbone.0.weight" in moved


def test_stops_early_and_keeps_the_best(custom, five_classes, tmp_path):
    out = tmp_path / "out"
    config = replace(QUICK, max_steps=40, lr=0.5, clip=0.0, eval_every=1, patience=2)
    said = []
    done = finetune(custom, five_classes, out, config, notify=said.append)
    scored = [line["mIoU"] for line in metrics(out) if "mIoU" in line]
    assert done.steps == len(scored) < 40
    assert scored.index(max(scored)) == len(scored) - 3
    assert f"stopped early at step {done.steps}: no better mIoU in 2 evaluations" in said
    scoring = EvalConfig(size=(48, 64), device="cpu")
    best = evaluate(replace(custom, source=str(out)), five_classes, scoring)
    last = evaluate(replace(custom, source=str(out / "last/model")), five_classes, scoring)
    assert best.mIoU == pytest.approx(max(scored), abs=TIE)  # in batches of another size
    assert last.mIoU == pytest.approx(scored[-1], abs=TIE)
    again = finetune(custom, five_classes, out, config, resume=True, notify=said.append)
    assert f"the training was complete after step {done.steps}" in said
    assert again.steps == done.steps


def test_patience_counts_on_after_a_resume(custom, five_classes, tmp_path):
    config = replace(QUICK, max_steps=9, lr=1e-12, warmup=0.0, freeze_norms=True, eval_every=1, patience=3)
    with pytest.raises(Killed):
        finetune(custom, five_classes, tmp_path / "out", config, monitor=kill_at(3))
    done = finetune(custom, five_classes, tmp_path / "out", config, resume=True)
    assert done.steps == 4  # the first is the best, three more are no better


def test_accumulated_batches_are_a_larger_one(calm, five_classes, tmp_path):
    still = replace(QUICK, optimizer="sgd", lr=0.05, freeze_norms=True, max_steps=2, aux_weight=0.4)
    small = finetune(calm, five_classes, tmp_path / "small", replace(still, batch_size=2, accumulate=2))
    large = finetune(calm, five_classes, tmp_path / "large", still)
    assert [step for step, _ in small.losses] == [1, 2]
    # not exactly: each batch is a mean over its own labeled pixels, as in torch
    assert small.losses[-1][1] == pytest.approx(large.losses[-1][1], rel=0.02)


def test_gradients_are_clipped_to_a_norm(custom, five_classes, tmp_path):
    """The first step of SGD is the rate times the gradient."""
    config = replace(QUICK, optimizer="sgd", lr=0.5, weight_decay=0.0, clip=0.01, max_steps=1)
    finetune(custom, five_classes, tmp_path / "out", config)
    before, after = torch.load(custom.source, weights_only=True), trained_weights(tmp_path / "out")
    moved = [(after[key] - before[key]).norm() for key in before if "running" not in key and "num_" not in key]
    assert torch.stack(moved).norm() == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_workers_and_sgd_and_weights_and_bf16(custom, five_classes, tmp_path):
    config = replace(
        QUICK,
        optimizer="sgd",
        lr=0.05,
        workers=1,
        class_weights=(1, 2, 1, 1, 0.5),
        precision="bf16",
        label_smoothing=0.1,
    )
    assert falls(finetune(custom, five_classes, tmp_path / "out", replace(config, head_lr_mult=2.0)))


def test_one_of_several_gpus_is_used(monkeypatch, tmp_path):
    """transformers would train on all of them, in nn.DataParallel, with as many times the batch."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)  # it is asked where NVML counts the devices
    task = SimpleNamespace(config=TrainConfig(max_steps=4).resolved(), device=torch.device("cuda"), val=None)
    assert arguments_of(task, str(tmp_path), pairs=10).train_batch_size == 8
    said: list[str] = []
    check_launch(task.device, said.append)
    check_launch(torch.device("cuda:0"), said.append)  # which the user chose
    check_launch(torch.device("cpu"), said.append)
    assert said == ["one of 2 GPUs trains; torchrun --nproc-per-node 2 -m equalize finetune ... takes all"]


def test_a_process_that_reads_images_dies(custom, five_classes, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingPairs, "_read", lambda *given: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ResourceError, match=r"workers: a process that reads images was killed.*; use fewer --workers"):
        finetune(custom, five_classes, tmp_path / "out", replace(QUICK, max_steps=1, workers=1))


def test_a_loss_that_is_not_finite_ends_the_training(custom, five_classes, tmp_path):
    with pytest.raises(NumericsError, match=r"step \d+: the loss is not finite.*smaller --lr"):
        finetune(custom, five_classes, tmp_path / "out", replace(QUICK, lr=1e30, clip=0.0, optimizer="sgd"))
    with pytest.raises(NumericsError, match=r"000\.png: makes the network give NaN or Inf; use a smaller --lr"):
        finetune(custom, five_classes, tmp_path / "b", replace(QUICK, lr=1e30, max_steps=1))


def test_a_full_disk_is_said_to_be_one(custom, tmp_path, monkeypatch):
    root = write_scenes(tmp_path / "data", 5, counts={None: 4})

    def full(*arguments, **options):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0")

    monkeypatch.setattr("equalize.commands.finetune.trainer.torch.save", full)
    with pytest.raises(ResourceError, match="the state cannot be written"):
        finetune(custom, root, tmp_path / "out", replace(QUICK, max_steps=1))
