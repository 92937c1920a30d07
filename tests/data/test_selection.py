from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from equalize.data.selection import file_of, select_pictures
from equalize.errors import DataError


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """Noise pictures in folders."""
    noise = np.random.default_rng(0)
    for name in ("a/1.jpg", "a/deep/2.png", "b/1.png", "b/3.JPG"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (8, 9, 3)).astype(np.uint8)).save(path)
    (tmp_path / "a/notes.txt").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def named(*places):
    found = select_pictures(places)
    assert len(found.images) == len(found.names) == len({*found.names})
    assert all(file_of(image).is_absolute() for image in found.images)
    return [str(name) for name in found.names]


@pytest.mark.parametrize(
    ("places", "names"),
    [
        (["a/1.jpg"], ["1"]),
        (["a"], ["1", "deep/2"]),
        (["."], ["a/1", "a/deep/2", "b/1", "b/3"]),
        (["b/3.JPG", "b/1.png"], ["3", "1"]),  # as named
        (["a/1.jpg", "b/1.png"], ["a/1", "b/1"]),
        (["b", "a"], ["b/1", "b/3", "a/1", "a/deep/2"]),
        (["a", "a/1.jpg", "b/../a"], ["1", "deep/2"]),  # each once
        (["*/1.*"], ["a/1", "b/1"]),
        (["a/*.jpg", "b/*.JPG"], ["a/1", "b/3"]),
        (["**/*.png"], ["a/deep/2", "b/1"]),
        (["**"], ["a/1", "a/deep/2", "b/1", "b/3"]),
        (["*"], ["a/1", "a/deep/2", "b/1", "b/3"]),
        (["b/[0-2].png"], ["1"]),
    ],
)
def test_pictures_folders_and_patterns(tree, places, names):
    assert named(*places) == names


def test_pictures_that_differ_by_their_suffix_keep_it(tree):
    (tree / "a/1.png").write_bytes((tree / "b/1.png").read_bytes())
    assert named("a") == ["1.jpg", "1.png", "deep/2"]
    (tree / "a/1.jpg.png").write_bytes((tree / "b/1.png").read_bytes())
    assert named("a") == ["1.jpg", "1.jpg.png", "1.png", "deep/2.png"]


def test_a_name_with_brackets_is_a_name(tree):
    (tree / "x[1].png").write_bytes((tree / "b/1.png").read_bytes())
    assert named("x[1].png") == ["x[1]"]


def test_masks_beside_pictures_are_passed_over_and_said(tree):
    for number in (1, 2):
        Image.new("L", (9, 8)).save(tree / f"b/{number}_mask.png")
        Image.new("RGB", (9, 8)).save(tree / f"b/{number}.png")
    found = select_pictures(["b"])
    assert [str(name) for name in found.names] == ["1", "2", "3"]
    assert "b: 2 files passed over as masks or the like (1_mask.png, 2_mask.png)" in found.notes[0]
    assert named("b/1_mask.png") == ["1_mask"]  # who names it means it


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("c", "c: no such picture or folder"),
        ("c/*.jpg", r"c/\*\.jpg: matches no picture"),
        ("a/*.txt", "matches no picture"),
        ("*/../a", "no such picture or folder"),
        ("empty", "empty: holds no picture"),
        ("x" * 300, "cannot be read|no such picture"),
    ],
)
def test_what_is_no_picture_is_named(tree, place, what):
    (tree / "empty").mkdir()
    with pytest.raises(DataError, match=what):
        select_pictures([place])
