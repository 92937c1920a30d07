"""A factory in the user's own code finds its neighbors, while it is imported and while it runs."""

import sys
from pathlib import Path

import pytest
import torch

from equalize.checkpoint.loading import load
from equalize.errors import CheckpointError

BLOCKS = "from torch import nn\n\ndef head(classes):\n    return nn.Conv2d(3, classes, 1)\n"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """`write({"models/unet.py": text})` gives a folder of code; what is imported from it is forgotten afterwards."""
    before, known = list(sys.path), set(sys.modules)
    torch.save({"weight": torch.ones(2, 3, 1, 1), "bias": torch.zeros(2)}, tmp_path / "net.pth")

    def write(files: dict[str, str]) -> Path:
        for name, text in files.items():
            (tmp_path / "code" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "code" / name).write_text(text)
        monkeypatch.chdir(tmp_path)
        return tmp_path / "code"

    yield write
    assert sys.path == before
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


LATE = "def net(classes=2):\n    from {} import head\n    return head(classes)\n"
EARLY = "from {} import head\n\ndef net(classes=2):\n    return head(classes)\n"


@pytest.mark.parametrize("text", [EARLY, LATE], ids=["while it is imported", "while the factory runs"])
@pytest.mark.parametrize(
    ("place", "module"),
    [
        ({"unet.py": ""}, "blocks_beside"),
        ({"nets_a/__init__.py": "", "nets_a/unet.py": ""}, "nets_a.blocks"),
        ({"nets_b/__init__.py": "", "nets_b/deep/__init__.py": "", "nets_b/deep/unet.py": ""}, "nets_b.blocks"),
        ({"nets_c/__init__.py": "", "nets_c/deep/__init__.py": "", "nets_c/deep/unet.py": ""}, "utils_of_root"),
    ],
)
def test_imports_of_neighbors_and_from_the_root_of_a_package(repository, place, module, text):
    file = next(name for name in place if name.endswith("unet.py"))
    code = repository({**place, f"{module.replace('.', '/')}.py": BLOCKS, file: text.format(module)})
    for _ in range(2):
        assert load("net.pth", f"{code / file}:net").model.out_channels == 2
    assert load("net.pth", f"code/{file}:net", weights=False).model.out_channels == 2


def test_imports_from_the_working_directory(repository, monkeypatch):
    """A repository without __init__.py, whose scripts are run from its root."""
    files = {"models/unet.py": LATE.format("models.blocks_of_root"), "models/blocks_of_root.py": BLOCKS}
    monkeypatch.chdir(repository(files))
    assert load("../net.pth", "models/unet.py:net").model.out_channels == 2
    assert load("../net.pth", "models.unet:net").model.out_channels == 2


@pytest.mark.parametrize("text", [EARLY, LATE], ids=["while it is imported", "while the factory runs"])
@pytest.mark.parametrize(
    ("packages", "blocks", "dots", "form"),
    [
        (["parts_a"], "parts_a/blocks.py", ".blocks", "parts_a.unet"),
        (["parts_b", "parts_b/deep"], "parts_b/blocks.py", "..blocks", "parts_b.deep.unet"),
        (["parts_c", "parts_c/deep"], "parts_c/deep/blocks.py", ".blocks", "parts_c.deep.unet"),
        ([], "parts_d/blocks.py", ".blocks", "parts_d.unet"),  # a package without __init__.py
    ],
)
def test_a_relative_import_names_the_form_that_works(repository, monkeypatch, text, packages, blocks, dots, form):
    file = f"{form.replace('.', '/')}.py"
    code = repository({f"{each}/__init__.py": "" for each in packages} | {blocks: BLOCKS, file: text.format(dots)})
    with pytest.raises(CheckpointError) as caught:
        load("net.pth", f"code/{file}:net")
    sentence = str(caught.value)
    assert "attempted relative import" in sentence
    assert sentence.endswith(f"in {code}, name its package: --arch {form}:net")
    monkeypatch.chdir(code)
    assert load("../net.pth", f"{form}:net").model.out_channels == 2


def test_a_module_that_is_not_there_is_one_line(repository):
    code = repository({"unet.py": LATE.format("nowhere_to_be_found")})
    with pytest.raises(
        CheckpointError, match=r"cannot import what it needs .ModuleNotFoundError: No module named 'nowh"
    ):
        load("net.pth", f"{code}/unet.py:net")
