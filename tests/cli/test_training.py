"""`equalize finetune` and `equalize evaluate`, from the words typed to what is printed and written."""

import json

import pytest
import yaml

from equalize.commands.finetune.config import TrainConfig
from equalize.errors import InputError
from tests.support.scenes import write_scenes
from tests.support.tolerance import TIE

QUICK = ("--batch-size", "2", "--max-steps", "3", "--device", "cpu", "--size", "48x64", "--lr", "0.01")


@pytest.fixture
def five_classes(tmp_path):
    return write_scenes(tmp_path / "data", 5, counts={"train": 4, "val": 2})


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


def test_evaluate_ignores_the_label_it_is_told_to(run_cli, segformer_dir, five_classes):
    ran = run_cli("evaluate", segformer_dir, "--data", five_classes, "--device", "cpu", "--ignore-index", 0)
    assert ran.code == 2
    assert "has label 255" in ran.err
    assert ran.err.count("\n") <= 2


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
    scored = json.loads(
        run_cli("evaluate", out, "--data", five_classes, "--size", "48x64", "--device", "cpu", "--json").out
    )
    assert scored["mIoU"] == pytest.approx(done["best"]["mIoU"], abs=TIE)
    ran = run_cli(*words)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == f"error: {out}: exists; --overwrite replaces it\n"
    ran = run_cli(*words, "--resume")
    assert ran.code == 0, ran.err
    assert "complete after step 3" in ran.out
    (line,) = [line for line in ran.err.splitlines() if line.startswith("next: ")]
    size = QUICK[QUICK.index("--size") + 1]
    assert line == f"next: equalize evaluate {out} --data {five_classes} --size {size}"
    first, second = (out / "last" / "commands.txt").read_text().splitlines()  # without folders of this machine
    assert first.startswith(f"equalize finetune {segformer_dir.name} --data {five_classes.name} --out out ")
    assert f" --size {size}" in first
    assert "/" not in first
    assert second == f"{first} --resume"
    ran = run_cli(*words, "--resume", "--seed", "4")
    assert ran.code == 2
    assert "cannot be resumed as another run" in ran.err


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
    assert "explicit equalization" in ran.out
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
    again = TrainConfig.make({}, tmp_path / "out/finetune.yaml")
    assert again.resolved() == again
    assert again.to_yaml() == (tmp_path / "out/finetune.yaml").read_text()


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
        (("--scale", "0.5,2"), "--scale: is step or paper, got '0.5,2'; the range of the random resize is --random-"),
        (("--scale", "paper"), "--scale: needs --calibrate"),
        (("--calibrate", "--keep-norm"), "--keep-norm: was removed: --scale step"),
        (("--warmup", "3"), "--warmup: is no share"),
        (("--size", "7"), "--size: is too small"),
        (("--train-as", "explicit"), "--train-as: there is no equalization to train through"),
        (("--val-split", "valid2"), "has no split 'valid2'"),
        (("--num-classes", "3"), "has label"),
        (("--config", "nowhere.yaml"), "nowhere.yaml: cannot be read as YAML"),
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
        ("lrr: 1", "has unknown keys: lrr"),
        ("- lr", "is no configuration"),
        ("lr: [1", "cannot be read as YAML"),
        ("lr: fast", "lr: has a value of another kind, got 'fast'"),
        ("batch_size: 2.5", "batch_size: has a value of another kind"),
        ("batch_size: true", "batch_size: has a value of another kind"),
        ("optimizer: adam", "optimizer: has a value of another kind"),
        ("size: [48, 64, 3]", "size: has a value of another kind"),
        ("keep-norm: true", "has keep_norm as earlier versions did; remove it: scale: step"),
        ("scale: [0.5, 2]", "has scale as earlier versions did; call it random_resize"),
        ("scale: rms", "scale: has a value of another kind"),
    ],
)
def test_configurations_that_are_refused(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        TrainConfig.make({}, path)
    assert message in str(caught.value)
