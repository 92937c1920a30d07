import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from equalize.checkpoint.loading import ModelName
from tests.support.scenes import write_scenes
from tests.support.training import FACTORY, named


@pytest.fixture(scope="session")
def five_classes(tmp_path_factory) -> Path:
    """Eight pairs to train on (two batches an epoch), three to score. Read only."""
    return write_scenes(tmp_path_factory.mktemp("five"), 5, counts={"train": 8, "val": 3})


@pytest.fixture(scope="session")
def custom(tmp_path_factory) -> ModelName:
    """A network of no library."""
    directory = tmp_path_factory.mktemp("custom")
    (directory / "tiny_net.py").write_text(FACTORY)
    sys.path.insert(0, str(directory))
    import tiny_net

    sys.path.remove(str(directory))
    torch.manual_seed(11)
    torch.save(tiny_net.Net().state_dict(), directory / "net.pth")
    return named(directory / "net.pth", arch=f"{directory / 'tiny_net.py'}:Net")


@pytest.fixture(scope="session")
def calm(custom, tmp_path_factory) -> ModelName:
    """`custom` without dropout."""
    place = tmp_path_factory.mktemp("calm") / "calm_net.py"
    place.write_text(FACTORY.replace("nn.Dropout(0.2)", "nn.Identity()"))
    return replace(custom, arch=f"{place}:Net")


@pytest.fixture(autouse=True)
def _without_report(monkeypatch):
    """The pictures take a second; test_report.py has them."""
    monkeypatch.setattr("equalize.commands.finetune.finetune.write_report", lambda *_: None)
