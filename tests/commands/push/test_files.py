"""Which files go, without access tokens and paths of the user's machine."""

import json

import pytest
import yaml

from equalize.commands.push.files import OutgoingFile, without_local_paths, without_paths
from equalize.commands.push.push import push
from equalize.errors import InputError
from tests.support.loopback_hub import TOKEN
from tests.support.planned import planned

STATE = "state for resuming a training run"


def pushed(directory):
    return {file.path: file for file in push(directory, "acme/streets", dry_run=True).files}


def test_links_hidden_files_and_training_states_stay(segformer_dir, tmp_path):
    out = planned(segformer_dir, tmp_path / "out")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.txt").write_text("secret")
    (out / "folder").symlink_to(tmp_path / "outside")
    for name in ("link.txt", "README.md"):
        (out / name).symlink_to(tmp_path / "outside" / "secret.txt")
    states = {"last/model.safetensors", "checkpoint-5/config.json", "optimizer.pt", "a/model.optimizer.bin"}
    states |= {"training_args.bin", "trainer_state.json", "rng_state_0.pth"}
    for name in (*states, ".env", ".git/config", "runs/x", "notes/a.txt"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("x")
    kept = {"README.md", "config.json", "equalize.json", "model.safetensors", "preprocessor_config.json", "notes/a.txt"}
    files = pushed(out)
    assert set(files) == kept
    assert b"secret" not in files["README.md"].read()
    assert push(out, "acme/streets", dry_run=True).left_out == {
        **dict.fromkeys(("folder", "link.txt", "README.md"), "symbolic link"),
        **dict.fromkeys((".env", ".git"), "hidden"),
        **dict.fromkeys(states - {"last/model.safetensors", "checkpoint-5/config.json"}, STATE),
        **dict.fromkeys(("last", "checkpoint-5"), STATE),
        "runs": "log of a training run",
    }


@pytest.mark.parametrize("content", [TOKEN, "token = hf_" + "a1B2" * 9 + "\n", "my own secret"])
def test_a_file_with_a_token_is_refused(segformer_dir, tmp_path, monkeypatch, content):
    monkeypatch.setenv("HF_TOKEN", "my own secret")
    out = planned(segformer_dir, tmp_path / "out")
    (out / "notes.txt").write_text(content)
    with pytest.raises(InputError, match=r"notes.txt: holds what looks like an access token") as caught:
        push(out, "acme/streets", dry_run=True)
    assert content.strip() not in str(caught.value)


def test_only_last_components_of_paths_go_out(segformer_dir, tmp_path):
    trained = {
        "source": "/home/alice/secret-project/runs/first",
        "data": "/home/alice/secret-project/streets",
        "recipe": {"class_names": "secret/classes.txt", "lr": 0.1},
        "score": {"mIoU": 50.0, "data": {"path": "/home/alice/secret-project/streets", "split": "val"}},
    }
    facts = {"source": "/home/alice/secret-project/mit-b0", "revision": None, "arch": "~/secret/net.py:make"}
    directory = planned(segformer_dir, tmp_path / "out", **facts, finetuned=trained)
    before = (directory / "equalize.json").read_bytes()
    (directory / "finetune.yaml").write_text(
        "model: acme/streets@main\nlr: 0.1\ncolors: /home/alice/secret/colors.txt\n"
    )
    files = pushed(directory)
    assert not any(b"secret" in file.read() or b"alice" in file.read() for file in files.values())
    assert files["equalize.json"].size == len(files["equalize.json"].read())
    told = json.loads(files["equalize.json"].read())
    assert (told["source"], told["output"], told["arch"]) == ("mit-b0", "out", "net.py:make")
    assert told["data"] == {"path": "streets", "split": "train", "fingerprint": "f" * 64}
    assert (told["finetuned"]["source"], told["finetuned"]["data"]) == ("first", "streets")
    assert told["finetuned"]["recipe"] == {"class_names": "classes.txt", "lr": 0.1}
    assert told["finetuned"]["score"]["data"]["path"] == "streets"
    assert yaml.safe_load(files["finetune.yaml"].read()) == {
        "model": "acme/streets@main",
        "lr": 0.1,
        "colors": "colors.txt",
    }
    assert (directory / "equalize.json").read_bytes() == before


def test_pictures_of_the_data_go_only_where_they_are_asked_for(segformer_dir, tmp_path):
    directory = planned(segformer_dir, tmp_path / "out", source="secret/base", revision=None)
    for name in ("curves.png", "panels.png"):
        (directory / name).write_bytes(b"\x89PNG")
    (directory / "look").mkdir()
    for place in ("report.html", "look/report.html"):
        (directory / place).write_text(f"<p>{tmp_path}</p>")
    plain = push(directory, "acme/streets", dry_run=True)
    names = [file.path for file in plain.files]
    assert "curves.png" in names
    assert not {"panels.png", "report.html", "look/report.html"} & {*names}
    assert {"panels.png", "report.html", "look/report.html"} <= plain.left_out.keys()
    assert "](curves.png)" in plain.card
    assert "panels.png" not in plain.card
    shown = push(directory, "acme/streets", dry_run=True, with_panels=True)
    assert "](panels.png)" in shown.card
    assert shown.left_out.keys() == plain.left_out.keys() - {"panels.png"}


def test_names_that_others_know_stay(segformer_dir, tmp_path):
    known = {"source": "acme/base@v2", "arch": "smp:Unet", "output": "out", "data": {"path": "acme/streets"}}
    file = planned(segformer_dir, tmp_path / "out", **known) / "equalize.json"
    outgoing = OutgoingFile(path="equalize.json", source=file)
    assert without_local_paths(outgoing) is outgoing


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (
            {"arch": "/home/alice/net.py:make", "arch_args": {"width": 8}},
            {"arch": "net.py:make", "arch_args": {"width": 8}},
        ),
        (
            {"arch_args": {"weights": "/home/alice/w.pth", "name": "timm/resnet", "at": "~/w"}},
            {"arch_args": {"weights": "w.pth", "name": "timm/resnet", "at": "w"}},
        ),
        ({"arch": "transformers:/home/alice/config"}, {"arch": "transformers:config"}),
        ({"arch": "transformers:."}, {"arch": "transformers:."}),
        ({"arch": "torchvision:lraspp"}, {"arch": "torchvision:lraspp"}),
        ({"source": "runs/first", "revision": None}, {"source": "first", "revision": None}),
        ({"data": "acme/streets:config=small"}, {"data": "acme/streets:config=small"}),
        ({"data": "here/streets"}, {"data": "streets"}),
        ({"recipes": [{"path": "/a/b"}, 1]}, {"recipes": [{"path": "b"}, 1]}),
    ],
)
def test_records(record, told, tmp_path, monkeypatch):
    (tmp_path / "here" / "streets").mkdir(parents=True)  # what lies here is no id on the Hub
    monkeypatch.chdir(tmp_path)
    assert without_paths(record) == told
