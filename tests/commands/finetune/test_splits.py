"""Which split is trained on, and which is scored."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from equalize.commands.finetune.config import TrainConfig
from equalize.commands.finetune.splits import open_splits, open_task
from equalize.errors import DataError
from tests.support.scenes import write_scenes
from tests.support.training import QUICK


def plant(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 3)).save(path)
    return root


def splits(data: Path, **config: str) -> tuple[object, object, list[str]]:
    said: list[str] = []
    train, val = open_splits(data, TrainConfig(**config), said.append, said.append)
    return train.split, val and val.split, said


def test_images_that_are_trained_on_and_scored_are_counted(tmp_path: Path) -> None:
    data = plant(tmp_path, *(f"{kind}/{k}.png" for k in "abc" for kind in ("JPEGImages", "SegmentationClass")))
    (data / "ImageSets/Segmentation").mkdir(parents=True)
    for split, listed in (("train", "a"), ("val", "b\nc"), ("trainval", "a\nb\nc")):
        (data / f"ImageSets/Segmentation/{split}.txt").write_text(listed)
    assert splits(data) == ("train", "val", [])
    said = [f"{data}: 2 of 2 images that are scored are trained on as well"]
    assert splits(data, train_split="trainval") == ("trainval", "val", said)


def test_a_split_that_is_named_is_there_or_refused(tmp_path: Path) -> None:
    flat = plant(tmp_path, "images/a.png", "masks/a.png")
    assert splits(flat)[:2] == (None, None)
    for field in ("train_split", "val_split"):
        with pytest.raises(DataError, match="has no split 'mine'"):
            splits(flat, **{field: "mine"})


def test_a_validation_split_that_is_not_asked_for_need_not_be_whole(tmp_path: Path) -> None:
    plant(tmp_path, *(f"{kind}/{split}/a.png" for kind in ("images", "masks") for split in ("train", "val", "test")))
    plant(tmp_path, "images/val/bare.png")
    assert splits(tmp_path, val_split="test")[:2] == ("train", "test")


def test_labels_of_far_fewer_classes_than_pascal_voc_has(custom, tmp_path: Path) -> None:
    """As what annotation tools export in its layout."""
    data = write_scenes(tmp_path / "data", 2, counts={None: 2})
    (data / "images").rename(data / "JPEGImages")
    (data / "masks").rename(data / "SegmentationClass")
    warned: list[str] = []
    task = open_task(custom, data, QUICK, torch.device("cpu"), warn=warned.append)
    assert task.train.num_classes == 21
    assert f"{data}: seen 2 of 21 classes, 0 to 1; did you mean --num-classes 2?" in warned[0]
    (data / "class_names.txt").write_text("_background_\ncat\n")
    task = open_task(custom, data, QUICK, torch.device("cpu"), warn=warned.append)
    assert task.checkpoint.classes == ("_background_", "cat")
    assert len(warned) == 1
