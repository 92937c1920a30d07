"""`equalize finetune` and `equalize evaluate`, from the words typed to what is printed and written."""

import functools
import json
import os
import shlex
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from equalize.checkpoint.loading import ModelName
from equalize.commands.finetune.config_file import Subject, read_run
from equalize.commands.finetune.run_directory import RunDirectory
from equalize.errors import InputError
from tests.support.commands import Command
from tests.support.scenes import write_scenes
from tests.support.tolerance import TIE

QUICK = ("--batch-size", "2", "--max-steps", "3", "--device", "cpu", "--size", "48x64", "--lr", "0.01")


@pytest.fixture
def five_classes(tmp_path):
    return write_scenes(tmp_path / "data", 5, counts={"train": 4, "val": 2})


@pytest.fixture
def void_last(five_classes):
    """Labels without a class are stored as 5, as CamVid has them, in place of 255."""
    for path in (five_classes / "masks").rglob("*.png"):
        labels = np.array(Image.open(path))
        Image.fromarray(np.where(labels == 255, 5, labels).astype(np.uint8)).save(path)
    return five_classes


def test_evaluate_prints_the_object_of_the_contract(run_cli, segformer_dir, five_classes):
    ran = run_cli("evaluate", segformer_dir, "--data", five_classes, "--split", "val", "--device", "cpu", "--json")
    assert ran.code == 0, ran.err
    content = json.loads(ran.out)
    assert list(content) == ["mIoU", "mAcc", "aAcc", "classes", "images"]
    assert content["images"] == 2
    assert all(list(row) == ["id", "name", "IoU", "Acc", "pixels"] for row in content["classes"])
    assert "split val, 2 images, 2 pairs" in " ".join(ran.err.split())


def test_evaluate_prints_a_table_with_dashes_for_absent_classes(run_cli, segformer_dir, tmp_path):
    root = write_scenes(tmp_path / "one", 1, counts={"val": 1})
    ran = run_cli("evaluate", segformer_dir, "--data", root, "--device", "cpu")
    assert ran.code == 0, ran.err
    assert "mIoU" in ran.out
    rows = [line.split() for line in ran.out.splitlines() if "LABEL_" in line]
    assert [row[1] for row in rows] == [f"LABEL_{number}" for number in range(5)]
    assert all(row[3] == "-" for row in rows[1:])


def test_finetune_then_evaluate_then_resume(run_cli, segformer_dir, five_classes, tmp_path):
    out = tmp_path / "out"
    words = ("finetune", segformer_dir, "--data", five_classes, "-o", out, *QUICK)
    ran = run_cli(*words, "--json")
    assert ran.code == 0, ran.err
    done = json.loads(ran.out)
    assert (done["steps"], done["output"], done["train_as"]) == (3, str(out), None)
    assert {"config.json", "model.safetensors", "metrics.jsonl", "finetune.yaml", "last"} <= {
        each.name for each in out.iterdir()
    }
    told = [line for line in ran.err.splitlines() if line.startswith(("step ", "val ", "saved "))]
    assert [line for line in told if line.startswith("step")] == [
        f"step {row['step']}/3 loss {row['loss']:.3g} lr {row['lr']:.1e}" for row in read_metrics(out, "loss")
    ]
    first = read_metrics(out, "mIoU")[0]["mIoU"]
    assert told[2:4] == [f"val mIoU {first:.1f} (best) at step 2/3", f"saved {out}"]  # as it happened
    scored = json.loads(run_cli("evaluate", out, "--data", five_classes, "--device", "cpu", "--json").out)
    assert scored["mIoU"] == pytest.approx(done["best"]["mIoU"], abs=TIE)
    ran = run_cli(*words)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == f"error: {out}: exists; --resume goes on with it, --overwrite replaces it\n"
    ran = run_cli(*words, "--resume")
    assert ran.code == 0, ran.err
    assert "complete after step 3" in ran.out
    size = QUICK[QUICK.index("--size") + 1]
    assert ran.err.splitlines() == [
        f"next: equalize evaluate {out} --data {five_classes} --size {size}",
        f"next: equalize push {out} ORG/NAME",
    ]
    assert [line.split()[1] for line in ran.out.splitlines() if "LABEL_" in line] == [
        f"LABEL_{number}" for number in range(5)
    ]
    first, second = (out / "last" / "commands.txt").read_text().splitlines()  # without folders of this machine
    assert first.startswith(f"equalize finetune {segformer_dir.name} --data {five_classes.name} -o out ")
    assert f" --size {size}" in first
    assert "/" not in first
    assert second == f"{first} --resume"
    ran = run_cli(*words, "--resume", "--seed", "4")
    assert ran.code == 2
    assert "cannot be resumed as another run: seed was 0, now 4;" in ran.err


def test_flags_win_over_the_configuration_and_it_is_saved_resolved(run_cli, segformer_dir, five_classes, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "lr: 1e-3\nepochs: 7\nsize: [48, 64]\nbatch_size: 4\nfreeze-backbone: true\nrandom-resize: [1, 1.5]\n"
    )
    ran = run_cli(
        *("finetune", segformer_dir, "--data", five_classes, "-o", tmp_path / "out", "--config", config),
        *("--max-steps", "1", "--batch-size", "2", "--no-freeze-backbone", "--device", "cpu", "--calibrate"),
        *("--strategy", "preserve", "--scale", "paper", "--samples", "4", "--class-weights", "1,1,1,1,2"),
    )
    assert ran.code == 0, ran.err
    assert "the optimizer trains the equalized weights" in ran.out
    saved = yaml.safe_load((tmp_path / "out/finetune.yaml").read_text())
    expected = {
        "lr": 0.001,
        "max_steps": 1,
        "batch_size": 2,
        "freeze_backbone": False,
        "size": [48, 64],
        "random_resize": [1.0, 1.5],
        "scale": "paper",
        "weight_decay": 0.01,
        "calibrate": "preserve",
        "class_weights": [1, 1, 1, 1, 2],
    }
    assert {key: saved[key] for key in expected} == expected
    assert "epochs" not in saved
    assert (saved["model"], saved["data"]) == (str(segformer_dir), str(five_classes))
    assert (saved["crop"], saved["ignore_index"], saved["reduce_labels"]) == ([48, 64], 255, "no")


def read_metrics(out, key):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if key in line]


def test_what_was_written_repeats_the_training_from_anywhere(run_cli, segformer_dir, void_last, tmp_path, monkeypatch):
    """The same steps of the same kernels: to the last bit."""
    monkeypatch.chdir(void_last.parent)
    shutil.copytree(segformer_dir, "model")
    flags = ("--channel-order", "bgr", "--ignore-index", 5)
    ran = run_cli("finetune", "model", "--data", void_last.name, "-o", tmp_path / "a", *QUICK, *flags)
    assert ran.code == 0, ran.err
    monkeypatch.chdir(tmp_path / "a")
    ran = run_cli("finetune", "--config", "finetune.yaml", "-o", "../b")
    assert ran.code == 0, ran.err
    monkeypatch.chdir(tmp_path)
    for name in ("model.safetensors", "finetune.yaml"):
        assert Path("b", name).read_bytes() == Path("a", name).read_bytes()
    assert read_metrics(Path("b"), "mIoU") == read_metrics(Path("a"), "mIoU")
    size = QUICK[QUICK.index("--size") + 1]
    expected = f"next: equalize evaluate ../b --data {void_last} --channel-order bgr --size {size} --ignore-index 5"
    assert ran.err.splitlines()[0] == f"{expected} --reduce-labels no"
    ran = run_cli("finetune", "--config", "a/finetune.yaml", "-o", "b", "--resume")
    assert "the training was complete after step 3" in ran.text


def test_paths_in_a_record_and_in_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("config", "run"):
        Path(name).mkdir()
    for name in ("net.py", "net.pth", "table.parquet", "run/other.parquet"):
        Path(name).touch()
    name = ModelName(source="net.pth", arch="net.py:Net", arch_args={"width": 2})
    written = Subject.of(name, "table.parquet:image=picture")
    assert (written.model, written.arch) == (f"{tmp_path}/net.pth", f"{tmp_path}/net.py:Net")
    assert written.data == f"{tmp_path}/table.parquet:image=picture"
    assert written.name(seed=3) == replace(name, source=written.model, arch=written.arch, seed=3)
    known = Subject.of(ModelName(source="acme/net@v2", arch="transformers:config"), "acme/streets:config=small")
    assert (known.model, known.data) == ("acme/net@v2", "acme/streets:config=small")
    assert known.arch == f"transformers:{tmp_path}/config"
    Path("run/finetune.yaml").write_text("model: net.pth\ndata: other.parquet:label=mask\n")
    read, _ = read_run({}, "run/finetune.yaml")
    assert (read.model, read.data) == ("net.pth", "run/other.parquet:label=mask")


def test_a_file_names_model_and_data_but_no_code_to_run(run_cli, segformer_dir, five_classes, tmp_path):
    (tmp_path / "run.yaml").write_text(f"model: net.pth\ndata: {five_classes}\narch: net.py:Net\n")
    ran = run_cli("finetune", "--config", tmp_path / "run.yaml", "-o", tmp_path / "out")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "names code to run (net.py:Net), which a file may not; if you trust that code, say so: --arch" in ran.err
    (tmp_path / "run.yaml").write_text(f"model: {segformer_dir}\ndata: {five_classes}\n")
    ran = run_cli("compare", "--config", tmp_path / "run.yaml", "-o", tmp_path / "out", "--arms", "none,unknown")
    assert ran.err.startswith("error: --arms: has an arm that is unknown")  # not that MODEL is missing
    (tmp_path / "run.yaml").write_text("model: net.pth\n")
    ran = run_cli("finetune", "--config", tmp_path / "run.yaml", "-o", tmp_path / "out")
    assert "--data: is missing: give it, or a --config that holds it" in ran.err


def test_more_steps_of_a_training_that_is_complete(run_cli, segformer_dir, five_classes, tmp_path):
    words = ("finetune", segformer_dir, "--data", five_classes, "-o", tmp_path / "out", *QUICK, "--log-every", 1)
    assert run_cli(*words).code == 0
    ran = run_cli(*words, "--resume", "--max-steps", 2)
    assert ran.code == 2
    assert "cannot be resumed as another run: max_steps was 3, now 2;" in ran.err
    for _ in range(2):  # afterwards it is complete, with the new length
        ran = run_cli(*words, "--resume", "--max-steps", 6, "--json")
        assert ran.code == 0, ran.err
    assert "the training was complete after step 6" in ran.err
    losses = read_metrics(tmp_path / "out", "loss")
    assert [row["step"] for row in losses] == [1, 2, 3, 4, 5, 6]
    # So few steps have no warm-up: the rate of the step behind k of n is (1 - k/n)^0.9 of the peak.
    rates = [*((1 - k / 3) ** 0.9 for k in (0, 1, 2)), *((1 - k / 6) ** 0.9 for k in (3, 4, 5))]
    assert [row["lr"] for row in losses] == pytest.approx([0.01 * rate for rate in rates])
    assert yaml.safe_load((tmp_path / "out/finetune.yaml").read_text())["max_steps"] == 6


def test_evaluate_reads_labels_and_images_as_the_training_did(run_cli, segformer_dir, void_last, tmp_path):
    out = tmp_path / "out"
    flags = ("--ignore-index", 5, "--size", "32x32")
    ran = run_cli("finetune", segformer_dir, "--data", void_last, "-o", out, *QUICK, *flags, "--json")
    assert ran.code == 0, ran.err
    best = json.loads(ran.out)["best"]
    words = ("evaluate", out, "--data", void_last, "--device", "cpu", "--json")
    ran = run_cli(*words)
    assert json.loads(ran.out)["mIoU"] == pytest.approx(best["mIoU"], abs=TIE)
    assert "as it was trained (finetune.yaml): --size 32x32 --ignore-index 5" in ran.err
    ran = run_cli(*words, "--ignore-index", 0, "--size", "48x64", "--reduce-labels", "no")
    assert ran.code == 2  # for label 5 is now said to be a class
    assert "has label 5" in ran.err
    ran = run_cli(*words, "--ignore-index", 5, "--size", "48x64")
    assert "--size 48x64: it was trained with --size 32x32; the flag counts" in ran.err
    assert "as it was trained" not in ran.err


def test_a_relative_path_names_the_colors_of_the_training(run_cli, segformer_dir, void_last, tmp_path):
    out = shutil.copytree(segformer_dir, tmp_path / "out")
    (tmp_path / "mine.txt").write_text("".join(f"c{k} {k} 0 9\n" for k in range(6)))
    (tmp_path / "other.txt").write_text("".join(f"c{k} {k} 9 0\n" for k in range(6)))
    (out / "finetune.yaml").write_text(f"colors: {tmp_path / 'mine.txt'}\nignore_index: 5\n")
    for name, is_said in (("mine.txt", False), ("other.txt", True)):
        ran = run_cli("evaluate", out, "--data", void_last, "--colors", os.path.relpath(tmp_path / name), "--json")
        assert ran.code == 0, ran.err
        assert ("the flag counts" in " ".join(ran.err.split())) is is_said


def test_a_head_of_far_more_classes_than_labels_is_noticed(run_cli, segformer_dir, tmp_path, monkeypatch):
    root = write_scenes(tmp_path / "two", 2, counts={"train": 2, "val": 2})
    said = f"{root}: seen 2 of 5 classes, 0 to 1; did you mean --num-classes 2?"
    words = ("finetune", segformer_dir, "--data", root, *QUICK, "--max-steps", 1)
    monkeypatch.setenv("COLUMNS", "300")
    assert said in run_cli(*words, "-o", tmp_path / "a").err
    assert said in run_cli("evaluate", segformer_dir, "--data", root, "--device", "cpu").err
    ran = run_cli(*words, "-o", tmp_path / "b", "--num-classes", 2)
    assert (ran.code, "did you mean" in ran.err) == (0, False)


@pytest.mark.parametrize("every", [2, 2000])
def test_interrupted_it_says_what_is_saved_and_how_to_go_on(segformer_dir, five_classes, tmp_path, every):
    out = tmp_path / "out"
    words = ("finetune", segformer_dir, "--data", five_classes, "--batch-size", 2, "--max-steps", 2000)
    words = (*words, "--log-every", 1, "--eval-every", every, "--device", "cpu", "-o", out, "--overwrite")
    command = Command(*words, prepare=functools.partial(os.chdir, tmp_path))
    seen = out / ("last/checkpoint-4" if every == 2 else "metrics.jsonl")  # then that of step 2 is whole
    while command.is_running() and not (seen.exists() and seen.stat().st_size):
        time.sleep(0.02)
    command.send_signal(signal.SIGINT)
    ended = command.finish()
    state, following, last = ended.err.splitlines()[-3:]
    assert (ended.code, last) == (130, "interrupted")
    newest = RunDirectory(out, segformer_dir, resume=True, overwrite=False).newest_state()
    saved = newest and f"step {newest.name.removeprefix('checkpoint-')} is saved; repeat with --resume"
    assert state == (saved or "no step is saved yet; --resume starts at step 0")
    assert (newest is None) == (every == 2000)
    again = shlex.split(following)[2:]
    assert sorted(again) == sorted([*(str(word) for word in words if word != "--overwrite"), "--resume"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--epochs", "0"), "--epochs: is too small, got 0, expected at least 1"),
        (("--epochs", "2", "--max-steps", "3"), "--epochs: cannot stand with --max-steps"),
        (("--lr", "-1"), "--lr: is no learning rate"),
        (("--clip", "nan"), "--clip: is no number, got nan, expected at least 0"),
        (("--class-weights=-1,1,1,1,1",), "--class-weights: are no weights"),
        (("--class-weights", "0,0,0,0,0"), "--class-weights: are no weights"),
        (("--precision", "fp16"), "--precision: fp16 cannot be trained on a CPU"),
        (("--strategy", "auto"), "--strategy: needs --calibrate"),
        (("--random-resize", "a,b"), "--random-resize: is no list of numbers"),
        (("--random-resize", "2,1"), "--random-resize: is no range"),
        (("--scale", "0.5,2"), "'0.5,2' is not one of 'step', 'paper'"),
        (("--scale", "paper"), "--scale: needs --calibrate"),
        (("--warmup", "3"), "--warmup: is no share"),
        (("--train-as", "explicit"), "--train-as: there is no equalization to train through"),
        (("--val-split", "valid2"), "has no split 'valid2'"),
        (("--num-classes", "3"), "has label"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(run_cli, segformer_dir, five_classes, tmp_path, words, message):
    ran = run_cli("finetune", segformer_dir, "--data", five_classes, "-o", tmp_path / "out", "--device", "cpu", *words)
    assert ran.code == (3 if "fp16" in words else 2)
    assert message in ran.err
    assert ran.err.count("error: ") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrr: 1", "has unknown keys: lrr; did you mean lr?"),
        ("out: here", "has out; give -o OUT"),
        ("- lr", "is no configuration"),
        ("lr: [1", "cannot be read as YAML"),
        (None, "config.yaml: no such file"),
        ("lr: fast", "lr: has a value of another kind, got 'fast'"),
        ("batch_size: 2.5", "batch_size: has a value of another kind, got 2.5, expected int"),
        ("batch_size: true", "batch_size: has a value of another kind"),
        ("optimizer: adam", "optimizer: has a value of another kind"),
        ("size: [48, 64, 3]", "size: has a value of another kind"),
        ("scale: rms", "scale: has a value of another kind"),
    ],
)
def test_configurations_that_are_refused(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_run({}, path)
    assert message in str(caught.value)
