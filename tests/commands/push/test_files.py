"""Paths of the user's machine in what is pushed."""

import json

import pytest
import yaml

from equalize.commands.push.files import OutgoingFile, without_local_paths, without_paths
from equalize.commands.push.push import push
from equalize.plan.plan import Plan
from tests.support.planned import plan, planned


def pushed(directory):
    return {file.path: file for file in push(directory, "acme/streets", dry_run=True).files}


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
    (directory / "finetune.yaml").write_text("lr: 0.1\nclass_names: /home/alice/secret/classes.txt\n")
    (directory / "evaluation.json").write_text('{"mIoU": 50.0, "data": "/home/alice/secret/streets"}')
    files = pushed(directory)
    assert not any(b"secret" in file.read() or b"alice" in file.read() for file in files.values())
    assert files["equalize.json"].size == len(files["equalize.json"].read())
    told = json.loads(files["equalize.json"].read())
    assert (told["source"], told["output"], told["arch"]) == ("mit-b0", "out", "net.py:make")
    assert told["data"] == {"path": "streets", "split": "train", "fingerprint": "f" * 64}
    assert (told["finetuned"]["source"], told["finetuned"]["data"]) == ("first", "streets")
    assert told["finetuned"]["recipe"] == {"class_names": "classes.txt", "lr": 0.1}
    assert told["finetuned"]["score"]["data"]["path"] == "streets"
    assert yaml.safe_load(files["finetune.yaml"].read()) == {"lr": 0.1, "class_names": "classes.txt"}
    assert (directory / "equalize.json").read_bytes() == before


def test_it_is_still_the_same_plan(segformer_dir, tmp_path):
    directory = planned(segformer_dir, tmp_path / "out")
    (tmp_path / "equalize.json").write_bytes(pushed(directory)["equalize.json"].read())
    arrived = Plan.read(tmp_path / "equalize.json")
    there = plan()
    assert (arrived.sites, arrived.edits, arrived.refusals) == (there.sites, there.edits, there.refusals)
    assert arrived.facts == {**there.facts, "data": {**there.facts["data"], "path": "streets"}, "output": "out"}


def test_names_that_others_know_stay(segformer_dir, tmp_path):
    known = {"source": "acme/base@v2", "arch": "smp:Unet", "output": "out", "data": {"path": "acme/streets"}}
    file = planned(segformer_dir, tmp_path / "out", **known) / "equalize.json"
    outgoing = OutgoingFile(path="equalize.json", size=1, source=file)
    assert without_local_paths(outgoing) is outgoing


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (
            {"arch": "/home/alice/net.py:make", "arch_args": {"width": 8}},
            {"arch": "net.py:make", "arch_args": {"width": 8}},
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
