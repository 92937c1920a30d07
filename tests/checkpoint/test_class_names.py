"""Names of classes survive in formats that have no place for them."""

import json

import pytest
import torch
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from equalize.checkpoint.loading import load
from equalize.errors import CheckpointError


@pytest.fixture(scope="module")
def lraspp(lraspp_state, tmp_path_factory):
    path = tmp_path_factory.mktemp("lraspp") / "lraspp.pth"
    torch.save({"model": lraspp_state}, path)
    return path


def check_names(source, names, tmp_path):
    checkpoint = load(source)
    assert checkpoint.classes is None
    checkpoint.with_names(names).save(tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.classes == names
    again.save(tmp_path / "copy")
    other = load(tmp_path / "out", num_classes=len(names) + 1, init_missing=True)
    assert other.classes is None
    other.save(tmp_path / "other")
    again.with_names(names[::-1]).save(tmp_path / "renamed")
    for place, expected in (("out", names), ("copy", names), ("other", None), ("renamed", names[::-1])):
        assert load(tmp_path / place, weights=False).classes == expected


def test_of_an_smp_directory(smp_dir, tmp_path):
    import segmentation_models_pytorch as smp

    check_names(smp_dir, ("Straße", "sky"), tmp_path)
    smp.from_pretrained(str(tmp_path / "out"))  # minds no further file


def test_of_a_state_dict_of_torchvision(lraspp, tmp_path):
    check_names(lraspp, ("sky", "road", "car", "tree"), tmp_path)
    state = torch.load(tmp_path / "out/model.pth", weights_only=True)["model"]
    lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4).load_state_dict(state)


@pytest.fixture(scope="module")
def recorded(lraspp, tmp_path_factory):
    directory = tmp_path_factory.mktemp("recorded") / "out"
    load(lraspp).with_names("abcd").save(directory)
    return directory


def test_a_damaged_record_is_named(recorded):
    place = recorded / "class_names.json"
    before = place.read_text()
    assert json.loads(before) == {"0": "a", "1": "b", "2": "c", "3": "d"}
    place.write_text("[")
    try:
        with pytest.raises(CheckpointError, match=r"class_names\.json: is not valid JSON"):
            load(recorded, weights=False)
    finally:
        place.write_text(before)
