"""Paths of the user's machine in what is pushed."""

import json

import yaml

from equalize.commands.push.outgoing import OutgoingFile
from equalize.commands.push.places import without_places
from equalize.commands.push.push import push
from equalize.plan.plan import Plan
from tests.commands.push.test_push import _no_open_connections, hub, out  # noqa: F401
from tests.support.planned import plan, planned


def pushed(directory):
    return {file.path: file for file in push(directory, "acme/streets", dry_run=True).files}


def test_of_paths_the_last_names_go_out(segformer_dir, tmp_path):
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
    files = pushed(directory)
    content = files["equalize.json"].source
    assert isinstance(content, bytes)
    assert b"secret" not in content
    assert files["equalize.json"].size == len(content)
    told = json.loads(content)
    assert (told["source"], told["output"], told["arch"]) == ("mit-b0", "out", "net.py:make")
    assert told["data"] == {"path": "streets", "split": "train", "fingerprint": "f" * 64}
    assert (told["finetuned"]["source"], told["finetuned"]["data"]) == ("first", "streets")
    assert told["finetuned"]["recipe"] == {"class_names": "classes.txt", "lr": 0.1}
    assert told["finetuned"]["score"]["data"]["path"] == "streets"
    assert yaml.safe_load(files["finetune.yaml"].source) == {"lr": 0.1, "class_names": "classes.txt"}
    assert (directory / "equalize.json").read_bytes() == before


def test_it_is_still_the_same_plan(segformer_dir, tmp_path):
    directory = planned(segformer_dir, tmp_path / "out")
    content = pushed(directory)["equalize.json"].source
    (tmp_path / "equalize.json").write_bytes(content)
    arrived = Plan.read(tmp_path / "equalize.json")
    there = plan()
    assert (arrived.sites, arrived.edits, arrived.refusals) == (there.sites, there.edits, there.refusals)
    assert arrived.facts == {**there.facts, "data": {**there.facts["data"], "path": "streets"}, "output": "out"}


def test_names_that_others_know_stay(segformer_dir, tmp_path):
    known = {"source": "acme/base@v2", "arch": "smp:Unet", "output": "out", "data": {"path": "acme/streets"}}
    file = planned(segformer_dir, tmp_path / "out", **known) / "equalize.json"
    outgoing = OutgoingFile(path="equalize.json", size=1, source=file)
    assert without_places(outgoing) is outgoing


def test_the_record_of_an_architecture(tmp_path):
    file = tmp_path / "architecture.json"
    for arch, told in (
        ("/home/alice/net.py:make", "net.py:make"),
        ("torchvision:lraspp", "torchvision:lraspp"),
        ("transformers:/home/alice/config", "transformers:config"),
        ("transformers:.", "transformers:."),
    ):
        file.write_text(json.dumps({"arch": arch, "arch_args": {"width": 8}}))
        source = without_places(OutgoingFile(path=file.name, size=1, source=file)).source
        content = source if isinstance(source, bytes) else source.read_bytes()
        assert json.loads(content) == {"arch": told, "arch_args": {"width": 8}}


def test_what_arrives_on_the_hub(hub, out):  # noqa: F811
    push(out, "acme/streets")
    received = hub.received("acme/streets")
    assert b"secret" not in b"".join(received.values())
    assert json.loads(received["equalize.json"])["source"] == "acme/segformer-tiny"
