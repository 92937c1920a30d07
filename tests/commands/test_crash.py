"""A process that is killed leaves OUT whole or absent, and what was there before; the next one works and cleans up.

EQUALIZE_KILLS=30 kills as many times, at moments spread over the whole command; the default is a few.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest

from equalize.checkpoint.files.atomic import atomic_directory, check_target
from equalize.checkpoint.loading import load
from equalize.errors import ResourceError
from tests.support.commands import Command
from tests.support.scenes import write_scenes

KILLS = int(os.environ.get("EQUALIZE_KILLS", "2"))


def age(directory: Path) -> None:
    for path in (*directory.rglob("*"), directory):
        os.utime(path, (1, 1))


def leftovers(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if path.name.startswith("."))


def kill_while_writing(arguments, place: Path, generator: random.Random, writing: float, whole: float) -> None:
    """Kills at a random moment: every other time once the temporary directory is there, else at any."""
    before = set(leftovers(place))
    command = Command(*arguments)
    if generator.random() < 0.5:
        time.sleep(generator.uniform(0, whole))
    else:
        while command.is_running() and not set(leftovers(place)) - before:
            time.sleep(0.002)
        time.sleep(generator.uniform(0, writing))
    with contextlib.suppress(ProcessLookupError):  # it may have come to its end
        command.send_signal(signal.SIGKILL)
    command.finish()


def undisturbed(arguments, out: Path) -> tuple[float, bytes]:
    """How many seconds a command takes, and the weights it writes: the same bytes whenever it runs."""
    ended = Command(*arguments).finish()
    assert ended.code == 0, ended.err
    return ended.seconds, (out / "model.safetensors").read_bytes()


def report(met) -> None:
    if path := os.environ.get("EQUALIZE_KILLS_REPORT"):
        with open(path, "a") as file:
            file.write(json.dumps(met) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["calibrate", "apply"])
def test_killed_at_any_moment(run_cli, command, segformer_dir, photos, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    out, plan = place / "out", tmp_path / "plan"
    assert run_cli("calibrate", segformer_dir, "--data", photos, "-o", plan, "--strategy", "migrate").code == 0
    arguments = ["calibrate", segformer_dir, "--data", photos, "-o", out, "--strategy", "migrate"]
    if command == "apply":
        arguments = ["apply", plan, segformer_dir, "-o", out]
    whole, weights = undisturbed(arguments, out)
    generator = random.Random(command)
    met = {"absent": 0, "whole": 0, "kept": 0, "replaced": 0}
    for kill in range(KILLS):
        overwrite = kill % 2 == 1
        shutil.rmtree(out, ignore_errors=True)
        if overwrite:
            out.mkdir()
            (out / "mine.txt").write_text("keep")
            (out / "equalize.json").touch()
        flags = ["--overwrite"] if overwrite else []
        kill_while_writing([*arguments, *flags], place, generator, 0.2 * whole, whole)
        if overwrite and (out / "mine.txt").exists():
            met["kept"] += 1
            assert {path.name for path in out.iterdir()} == {"mine.txt", "equalize.json"}
        elif out.exists():
            met["replaced" if overwrite else "whole"] += 1
            assert run_cli("verify", out, "--against", segformer_dir).code == 0
        else:
            assert not overwrite
            met["absent"] += 1
    for left in leftovers(place):
        age(place / left)  # only what is older than an hour goes
    assert run_cli(*arguments, "--overwrite").code == 0
    assert leftovers(place) == []
    assert (out / "model.safetensors").read_bytes() == weights
    assert run_cli("verify", out, "--against", segformer_dir).code == 0
    report({command: met})


@pytest.mark.slow
def test_a_training_killed_at_any_moment_is_resumed(run_cli, segformer_dir, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    out = place / "out"
    data = write_scenes(tmp_path / "data", 5, counts={"train": 4, "val": 2})
    arguments = ["finetune", segformer_dir, "--data", data, "-o", out, "--batch-size", "2", "--max-steps", "4"]
    arguments += ["--eval-every", "1", "--device", "cpu", "--size", "48x64", "--lr", "0.01"]
    whole, weights = undisturbed(arguments, out)
    generator = random.Random("finetune")
    met = {"absent": 0, "without a model": 0, "whole": 0}
    for _ in range(max(1, KILLS // 2)):
        shutil.rmtree(out)
        kill_while_writing(arguments, place, generator, 0.3 * whole, whole)
        if not out.exists():
            met["absent"] += 1
        elif not (out / "config.json").exists():
            met["without a model"] += 1  # the first has not been saved yet
        else:
            met["whole"] += 1
            load(out)
        ran = run_cli(*arguments, "--resume")
        assert ran.code == 0, ran.err
        assert (out / "model.safetensors").read_bytes() == weights
    report({"finetune": met})


def test_what_the_dead_left_goes_and_what_the_living_write_stays(tmp_path):
    stale = tmp_path / ".out.tmp-0123abcd"
    stale.mkdir()
    (stale / "half").write_text("x")
    other = tmp_path / ".another.tmp-0123abcd"
    other.mkdir()
    for path in (stale, other):
        age(path)
    with atomic_directory(tmp_path / "out") as first:
        assert not stale.exists()
        (first / "masks").mkdir()
        age(first)
        (first / "masks/0.png").touch()  # does not change the time of `first`
        with atomic_directory(tmp_path / "out") as second:
            assert first.exists()
            (second / "file").write_text("second")
        (first / "file").write_text("first")
        shutil.rmtree(tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "first"
    assert leftovers(tmp_path) == [".another.tmp-0123abcd"]


def let_files_end_early() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then fails with EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def test_a_write_that_fails_gives_exit_3_and_leaves_nothing(segformer_dir, photos, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    arguments = ("calibrate", segformer_dir, "--data", photos, "-o", place / "out", "--strategy", "migrate")
    ended = Command(*arguments, prepare=let_files_end_early).finish()
    assert ended.code == 3, ended.err
    assert ended.err.strip().splitlines()[-1].startswith(f"error: {place / 'out'}: ")
    assert list(place.iterdir()) == []


def test_a_place_that_cannot_be_written_is_noticed_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ResourceError, match="cannot be written"):
        check_target(tmp_path / "a" / "out", overwrite=False, source=None)


def test_a_file_above_is_noticed(run_cli, segformer_dir, photos, tmp_path):
    (tmp_path / "file").touch()
    ran = run_cli("calibrate", segformer_dir, "--data", photos, "-o", tmp_path / "file" / "out")
    assert ran.code == 2
    assert "is not a directory" in ran.err
