"""`equalize push` as its users run it: a process, exit codes, one line, one object."""

import json
import os
import subprocess
import sys

import pytest
from huggingface_hub import constants

from equalize.cli import main
from tests.support.loopback_hub import TOKEN, Hub
from tests.support.planned import planned


@pytest.fixture
def out(segformer_dir, tmp_path):
    return planned(segformer_dir, tmp_path / "out")


def run(hub, *arguments, **environment):
    """A real process against a Hub on loopback, with nothing of this machine's account."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    hub_only = {"HF_ENDPOINT": hub.url, "HF_HOME": "/nonexistent", "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-m", "equalize", *map(str, arguments)]
    return subprocess.run(command, env=kept | hub_only, capture_output=True, text=True, timeout=120)


def test_a_process_pushes_and_prints_one_object(out):
    with Hub() as hub:
        done = run(hub, "push", out, "acme/streets", "--json", HF_TOKEN=TOKEN)
        assert (done.returncode, done.stderr) == (0, "")
        printed = json.loads(done.stdout)
        received = hub.received("acme/streets")
    assert {file["path"]: file["size"] for file in printed["files"]} == {p: len(data) for p, data in received.items()}
    assert printed["repo"] == "acme/streets"
    assert printed["dry_run"] is False
    assert len(printed["commit"]) == 40
    assert received["model.safetensors"] == (out / "model.safetensors").read_bytes()


def test_a_process_that_is_refused_prints_one_line(out):
    with Hub() as hub:
        hub.fail("preupload", (403, f"{TOKEN} may not"))
        done = run(hub, "push", out, "acme/streets", HF_TOKEN=TOKEN)
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith("error: acme/streets: the access token may not write here (HTTP 403: *** may not); ")
    assert done.stderr.count("\n") == 1


def test_a_dry_run_for_people(out, capsys):
    (out / "last").mkdir()
    assert main(["push", str(out), "acme/streets", "--dry-run", "--public"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("5 files of ")
    assert lines[0].endswith(" would go to acme/streets, revision main")
    assert [line.split()[0] for line in lines[1:6]] == [
        *("README.md", "config.json", "equalize.json", "model.safetensors", "preprocessor_config.json"),
    ]
    assert lines[6] == "  last stays: state for resuming a training run"
    assert lines[7] == "Nothing was sent. If acme/streets does not exist, it will be made, public."


def test_a_dry_run_as_json(out, capsys):
    assert main(["push", str(out), "acme/streets", "--dry-run", "--json", "--revision", "dev"]) == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert captured.err == ""
    assert printed["revision"] == "dev"
    assert (printed["dry_run"], printed["commit"], printed["private"]) == (True, None, True)
    sizes = {file["path"]: file["size"] for file in printed["files"]}
    assert sizes["model.safetensors"] == (out / "model.safetensors").stat().st_size
    assert printed["bytes"] == sum(sizes.values())


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nowhere", "acme/streets"], 2, "error: nowhere: no such directory"),
        (["OUT", "streets"], 2, "error: 'streets': is no name of a repository, expected ORG/NAME"),
        (["OUT", "acme/streets", "--revision", "a b"], 2, "error: --revision: is no name of a branch"),
        (["OUT"], 2, "error: equalize push: missing argument 'ORG/NAME'"),
        (
            ["OUT", "acme/streets"],
            3,
            "error: acme/streets: no access token for the Hub was found; log in with `hf auth",
        ),
    ],
)
def test_each_mistake_is_one_line(out, arguments, code, says, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert main(["push", *(str(out) if each == "OUT" else each for each in arguments)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(says)
    assert captured.err.count("\n") == 1
