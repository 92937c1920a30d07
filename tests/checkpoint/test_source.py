"""What is said of a model on the Hub that is not at hand."""

import re

import pytest
from huggingface_hub import constants

from equalize.checkpoint.loading import load
from equalize.errors import ResourceError

COMMIT = "c0ffee" * 6 + "cafe"


@pytest.fixture
def cache(tmp_path, monkeypatch, segformer_dir):
    """The Hub's cache with the small files of acme/net's main branch; without its weights."""
    root = tmp_path / "models--acme--net"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    (root / "snapshots" / COMMIT).mkdir(parents=True)
    (root / "snapshots" / COMMIT / "config.json").write_bytes((segformer_dir / "config.json").read_bytes())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("acme/net@dev", "the Hub's cache lacks revision dev of it (it has main)"),
        ("acme/other", "the Hub's cache lacks revision main of it,"),
        ("acme/net", f"the Hub's cache lacks the weights of revision {COMMIT} of it,"),
    ],
)
def test_offline_the_switch_and_the_missing_revision_are_named(cache, name, lacking):
    with pytest.raises(ResourceError, match=re.escape(lacking)) as caught:
        load(name)
    assert "and HF_HUB_OFFLINE is set; " in str(caught.value)
    assert "unset HF_HUB_OFFLINE" in str(caught.value)
    assert f"hf download {name.partition('@')[0]}" in str(caught.value)
