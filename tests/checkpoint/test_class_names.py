"""Names of classes survive in formats that have no place for them."""

import json

import pytest
import torch
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from equalize.checkpoint import load
from equalize.errors import CheckpointError


@pytest.fixture
def lraspp(lraspp_state, tmp_path):
    torch.save({"model": lraspp_state}, tmp_path / "lraspp.pth")
    return tmp_path / "lraspp.pth"


def check_names(source, names, tmp_path):
    assert load(source).classes is None
    load(source).with_names(names).save(tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.classes == load(tmp_path / "out", weights=False).classes == names
    again.save(tmp_path / "copy")
    assert load(tmp_path / "copy").classes == names
    other = load(tmp_path / "out", num_classes=len(names) + 1, init_missing=True)
    assert other.classes is None
    other.save(tmp_path / "other")
    assert load(tmp_path / "other").classes is None
    again.with_names(names[::-1]).save(tmp_path / "renamed")
    assert load(tmp_path / "renamed").classes == names[::-1]


def test_of_an_smp_directory(smp_dir, tmp_path):
    import segmentation_models_pytorch as smp

    check_names(smp_dir, ("Straße", "sky"), tmp_path)
    smp.from_pretrained(str(tmp_path / "out"))  # minds no further file


def test_of_a_state_dict_of_torchvision(lraspp, tmp_path):
    check_names(lraspp, ("sky", "road", "car", "tree"), tmp_path)
    state = torch.load(tmp_path / "out/model.pth", weights_only=True)["model"]
    lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4).load_state_dict(state)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"0": "sky", "2": "road"}', "is no record of class names"),
        ('{"0": 1}', "is no record of class names"),
        ("{}", "is no record of class names"),
        ("[", "is not valid JSON"),
    ],
)
def test_a_damaged_record_is_named(lraspp, tmp_path, text, message):
    load(lraspp).with_names("abcd").save(tmp_path / "out")
    place = tmp_path / "out/class_names.json"
    assert json.loads(place.read_text()) == {"0": "a", "1": "b", "2": "c", "3": "d"}
    place.write_text(text)
    with pytest.raises(CheckpointError, match=f"class_names.json: {message}"):
        load(tmp_path / "out")
