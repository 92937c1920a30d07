"""`equalize push` as its users run it: exit codes, one line, one object."""

import json

import pytest
from huggingface_hub import constants

from equalize.cli import main
from tests.support.loopback_hub import logged_in
from tests.support.planned import planned


@pytest.fixture
def out(segformer_dir, tmp_path):
    return planned(segformer_dir, tmp_path / "out")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with logged_in(monkeypatch, tmp_path) as server:
        yield server


def test_a_push_prints_one_object(hub, out, run_cli):
    ran = run_cli("push", out, "acme/streets", "--json")
    assert (ran.code, ran.err) == (0, "")
    printed = json.loads(ran.out)
    received = hub.received("acme/streets")
    assert {file["path"]: file["size"] for file in printed["files"]} == {p: len(data) for p, data in received.items()}
    assert printed["repo"] == "acme/streets"
    assert printed["dry_run"] is False
    assert len(printed["commit"]) == 40
    assert received["model.safetensors"] == (out / "model.safetensors").read_bytes()


def test_a_push_for_people(hub, out, run_cli):
    ran = run_cli("push", out, "acme/streets", "--public")
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[0].endswith(" went to acme/streets, revision main")
    assert ran.out.splitlines()[-1] == f"{hub.url}/acme/streets (public)"


def test_what_the_client_logs_of_its_retries_stays_unsaid(hub, out, run_cli):
    """It names signed addresses."""
    hub.fail("PUT /store/", 503)
    ran = run_cli("push", out, "acme/streets")
    assert ran.err.startswith("error: acme/streets: the Hub has trouble (HTTP 503")
    assert (ran.code, ran.out, ran.err.count("\n")) == (3, "", 1)
    assert "Signature" not in ran.err


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


def test_a_dry_run_shows_the_card(out, run_cli):
    ran = run_cli("push", out, "acme/streets", "--dry-run", "--show-card")
    assert ran.code == 0, ran.err
    card = json.loads(run_cli("push", out, "acme/streets", "--dry-run", "--show-card", "--json").out)["card"]
    assert card.startswith("---\nbase_model: acme/segformer-tiny\n")
    assert ran.out.endswith("\n".join(line.rstrip() for line in card.splitlines()) + "\n")  # no line is wrapped


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
