"""The real client of the Hub against a small server: what arrives, and what each refusal says."""

import json
import re

import pytest
import torch
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file
from transformers import SegformerForSemanticSegmentation

from equalize.checkpoint.loading import load
from equalize.commands.push.push import push
from equalize.errors import InputError, ResourceError
from equalize.version import __version__
from tests.support.loopback_hub import TOKEN, logged_in
from tests.support.planned import planned


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with logged_in(monkeypatch, tmp_path) as server:
        yield server


@pytest.fixture
def out(segformer_dir, tmp_path):
    return planned(segformer_dir, tmp_path / "out")


def test_what_arrives_is_what_lay_there(hub, out):
    pushed = push(out, "acme/streets")
    received = hub.received("acme/streets")
    assert {file.path: file.size for file in pushed.files} == {path: len(data) for path, data in received.items()}
    for path in ("config.json", "model.safetensors", "preprocessor_config.json"):
        assert received[path] == (out / path).read_bytes()
    assert b"## Scale equalization" in received["README.md"]
    assert not (out / "README.md").exists()
    assert hub.repositories["acme/streets"].private
    assert hub.repositories["acme/streets"].summaries == [f"Upload with equalize {__version__}"]
    assert pushed.to_json() == {
        "repo": "acme/streets",
        "revision": "main",
        "url": f"{hub.url}/acme/streets",
        "private": True,
        "dry_run": False,
        "commit": hub.repositories["acme/streets"].commits[-1],
        "pull_request": None,
        "files": [{"path": path, "size": len(received[path])} for path in sorted(received)],
        "bytes": sum(map(len, received.values())),
        "left_out": [],
    }


def test_a_dry_run_lists_what_a_push_sends_and_asks_nobody(hub, out, monkeypatch):
    listed = push(out, "acme/streets", dry_run=True)
    monkeypatch.delenv("HF_TOKEN")
    assert push(out, "acme/streets", dry_run=True) == listed
    assert hub.requests == []
    assert listed.commit is None
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert [(file.path, file.size) for file in push(out, "acme/streets").files] == [
        (file.path, file.size) for file in listed.files
    ]


def test_weights_that_are_links_are_not_silently_left_out(hub, out, tmp_path):
    (out / "model.safetensors").rename(tmp_path / "blob")
    (out / "model.safetensors").symlink_to(tmp_path / "blob")
    with pytest.raises(InputError, match=r"model.safetensors: would stay behind \(symbolic link\)"):
        push(out, "acme/streets")
    assert hub.requests == []


def test_shards_arrive_all(hub, upernet_dir):
    push(upernet_dir, "acme/upernet")
    there = {path.name for path in upernet_dir.iterdir()}
    assert set(hub.received("acme/upernet")) == there | {"README.md"}
    assert len(hub.uploads()) == sum(name.endswith(".safetensors") for name in there) > 1


def test_pushing_again_sends_no_weights_twice(hub, out):
    push(out, "acme/streets")
    said = []
    again = push(out, "acme/streets", private=False, notify=said.append)
    assert len(hub.uploads()) == 1
    assert again.private is True
    assert said == ["acme/streets exists and stays private"]


def test_public_only_when_asked_for(hub, out):
    assert push(out, "acme/streets", private=False).private is False
    assert not hub.repositories["acme/streets"].private
    said = []
    assert push(out, "acme/streets", notify=said.append).private is False
    assert said == ["acme/streets exists and stays public"]
    with pytest.raises(InputError, match=r"exists and is public; make it private .*or drop --private"):
        push(out, "acme/streets", private=True)


def test_a_branch_is_made(hub, out):
    pushed = push(out, "acme/streets", revision="exp/1")
    assert hub.received("acme/streets") == {}
    assert "model.safetensors" in hub.received("acme/streets", "exp/1")
    assert pushed.url == f"{hub.url}/acme/streets/tree/exp/1"
    assert pushed.revision == "exp/1"
    assert b'revision="exp/1"' in hub.received("acme/streets", "exp/1")["README.md"]


def test_a_pull_request_leaves_the_branch_alone(hub, out):
    pushed = push(out, "acme/streets", create_pr=True)
    assert hub.received("acme/streets") == {}
    assert "model.safetensors" in hub.received("acme/streets", "refs/pr/1")
    assert pushed.revision == "refs/pr/1"
    assert pushed.url == pushed.pull_request == f"{hub.url}/acme/streets/discussions/1"


def test_the_token_goes_nowhere_but_into_headers(hub, out):
    pushed = push(out, "acme/streets")
    assert TOKEN not in repr(pushed)
    assert not any(TOKEN.encode() in body for body in hub.bodies)
    assert not any(TOKEN in line for line in hub.requests)


def test_the_hubs_remarks_on_the_card_are_passed_on(hub, out):
    hub.remarks.append("base_model does not exist")
    heard = []
    push(out, "acme/streets", warn=heard.append)
    assert len(heard) == 1
    assert "base_model does not exist" in heard[0]


def test_metadata_that_the_hub_refuses_are_the_users(hub, out):
    (out / "README.md").write_text("---\nlicense: [mit]\n---\nMine.\n")
    hub.fail("POST /api/validate-yaml$", (400, "license must be a string"))
    with pytest.raises(InputError, match=r"README.md: the Hub refuses its metadata"):
        push(out, "acme/streets")
    assert hub.uploads() == []


CREATE = "POST /api/repos/create"
PREUPLOAD = "POST .*/preupload/"
STORE = "PUT /store/"
COMMIT = "POST .*/commit/"

REFUSALS = {
    401: r"the Hub does not accept the access token \(HTTP 401.*\); log in again with `hf auth login`",
    403: r"the access token may not write here \(HTTP 403.*\); use one with write permission",
    404: r"the Hub has no such repository, or hides it from this access token \(HTTP 404.*\); check the name",
    409: r"the Hub reports a conflict with another change \(HTTP 409.*\); push again",
    418: r"the Hub refuses the request \(HTTP 418: no, \*\*\* may not\)$",
    429: r"the Hub limits the rate of requests \(HTTP 429.*\); wait",
    503: r"the Hub has trouble \(HTTP 503.*\); try again later",
    "drop": r"the connection to http://127.0.0.1:\d+ failed \(.+\); check the network",
}


@pytest.mark.parametrize(
    ("where", "what"),
    [
        *((COMMIT, what) for what in REFUSALS),
        ("GET /api/models/", "drop"),
        *((CREATE, what) for what in (401, 403)),
        (PREUPLOAD, 403),
        ("POST .*/objects/batch", 403),
        *((STORE, what) for what in (403, 503, "drop")),
    ],
)
def test_each_refusal_is_one_clear_line(hub, out, where, what):
    hub.fail(where, what if what == "drop" else (what, f"no, {TOKEN} may not"))
    with pytest.raises(ResourceError, match=f"^acme/streets: {REFUSALS[what]}") as caught:
        push(out, "acme/streets")
    line = str(caught.value)
    assert "\n" not in line
    assert TOKEN not in line
    assert "Signature" not in line
    assert caught.value.exit_code == 3
    assert what == "drop" or caught.value.__cause__ is None  # it would show the token that the server repeats
    assert where == COMMIT or hub.objects == {}
    assert not hub.repositories or hub.received("acme/streets") == {}


def test_a_pull_request_to_a_repository_that_one_may_not_create(hub, out):
    push(out, "acme/streets", private=False)
    hub.fail(CREATE, 403)
    assert push(out, "acme/streets", create_pr=True).revision == "refs/pr/1"


@pytest.mark.parametrize("what", [b"<html>Welcome to this hotel's network</html>", b"{}"])
def test_an_answer_that_is_no_answer(hub, out, what):
    hub.fail(COMMIT, (200, what))
    with pytest.raises(ResourceError, match=r"the upload failed \(.+\); push again"):
        push(out, "acme/streets")


def test_a_file_that_vanishes_on_the_way(hub, out, monkeypatch):
    made = HfApi.create_repo

    def vanish(*args, **options):
        (out / "model.safetensors").unlink()
        return made(*args, **options)

    monkeypatch.setattr(HfApi, "create_repo", vanish)
    with pytest.raises(ResourceError, match=r"the upload failed \(.*model.safetensors.*\); push again"):
        push(out, "acme/streets")


def test_no_token(hub, out, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ResourceError, match=r"no access token for the Hub was found; log in with `hf auth login`"):
        push(out, "acme/streets")
    assert hub.requests == []


def test_offline(hub, out, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ResourceError, match=r"the Hub is switched off; unset HF_HUB_OFFLINE"):
        push(out, "acme/streets")


def test_malformed_names_are_refused():
    for name in ("streets", "a/b/c", "acme/", "/streets", "", "acme/ streets", "a/b@c"):
        with pytest.raises(InputError, match=r"is no name of a repository, expected ORG/NAME"):
            push("out", name)


@pytest.fixture
def lraspp_dir(lraspp_state, tmp_path):
    """torchvision's network as `save` writes it where training wrapped its keys."""
    directory = tmp_path / "lraspp"
    directory.mkdir()
    save_file({f"module.{key}": value for key, value in lraspp_state.items()}, directory / "model.safetensors")
    architecture = {"arch": "torchvision:lraspp_mobilenet_v3_large", "arch_args": {"num_classes": 4}}
    (directory / "architecture.json").write_text(json.dumps(architecture))
    return directory


@pytest.mark.parametrize("saved", ["segformer_dir", "smp_dir", "lraspp_dir"])
def test_each_card_says_how_its_own_library_loads_what_arrived(hub, saved, request):
    """The card's own code, run against the Hub; the very bytes of the weights must come back."""
    directory = request.getfixturevalue(saved)
    push(directory, "acme/streets")
    card = hub.received("acme/streets")["README.md"].decode()
    names = {}
    exec(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[-1], names)  # above may stand a card by the library
    if saved == "segformer_dir":  # transformers has other keys on disk
        state = SegformerForSemanticSegmentation.from_pretrained(directory).state_dict()
    else:
        state = load_file(directory / "model.safetensors")
    loaded = names["model"].state_dict()
    assert {key.removeprefix("module.") for key in state} == loaded.keys()
    assert all(torch.equal(loaded[key.removeprefix("module.")], value) for key, value in state.items())
    assert any(line.startswith("GET /acme/streets/resolve/") for line in hub.requests)


def test_what_was_pushed_is_a_model_again(hub, out):
    pushed = push(out, "acme/streets")
    checkpoint = load("acme/streets")
    assert checkpoint.revision == pushed.commit
    written = json.loads((out / "equalize.json").read_text())
    assert checkpoint.plan_json == {**written, "data": {**written["data"], "path": "streets"}, "output": "out"}
    here = load(out).model.state_dict()
    assert all(torch.equal(value, here[key]) for key, value in checkpoint.model.state_dict().items())
