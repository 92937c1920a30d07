"""Images become the tensors that the checkpoint's own library would make."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from equalize.checkpoint.loading import load
from equalize.checkpoint.preprocess import Preprocess
from equalize.errors import CheckpointError


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_normalization_against_torchvision(picture):
    from torchvision.transforms import v2

    expected = v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )(picture)
    torch.testing.assert_close(Preprocess()(picture), torch.as_tensor(expected))


def test_a_transformers_processor_gives_the_same(picture, segformer_dir):
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(segformer_dir)
    expected = processor(picture, return_tensors="pt")["pixel_values"][0]
    got = load(segformer_dir, weights=False).preprocess(picture)
    assert got.shape == expected.shape == (3, 48, 64)
    assert (got - expected).abs().mean() < 0.01  # both bilinear with antialiasing; they round at different places


def test_a_processor_that_resizes_otherwise_gives_the_same(picture, segformer_dir, tmp_path):
    from transformers import BeitImageProcessor

    (tmp_path / "config.json").symlink_to(segformer_dir / "config.json")
    processor = BeitImageProcessor(size={"height": 20, "width": 28}, do_center_crop=False)  # bicubic
    processor.save_pretrained(tmp_path)
    preprocess = load(tmp_path, weights=False).preprocess
    expected = processor(picture, return_tensors="pt")["pixel_values"][0]
    assert (preprocess(picture) - expected).abs().mean() < 0.01  # bilinear: 0.1
    assert "20x28 (bicubic)" in str(preprocess)


def test_a_processor_that_keeps_proportions_is_said_to(segformer_dir):
    kept = Preprocess.from_processor({"do_resize": True, "size": {"shortest_edge": 7}}, "from it")
    assert "from it, which keeps the proportions of pictures" in str(kept)
    assert "proportions" not in str(load(segformer_dir, weights=False).preprocess)


def test_size_wins_over_the_checkpoints_own(picture):
    assert Preprocess(size=(8, 9))(picture).shape == (3, 8, 9)
    assert Preprocess(size=(8, 9))(picture, (16, 12)).shape == (3, 16, 12)
    assert Preprocess()(picture).shape == (3, 40, 30)


def test_bgr_and_pixels_in_255(picture):
    plain = Preprocess(mean=(1, 2, 3), std=(1, 1, 2), rescale=1.0, channels="BGR")
    x_HWC = np.asarray(picture).astype(np.float32)
    expected = (x_HWC[..., ::-1] - [1, 2, 3]) / [1, 1, 2]
    np.testing.assert_allclose(plain(picture).numpy(), expected.transpose(2, 0, 1), rtol=1e-6)


def test_other_modes_are_converted(picture):
    assert Preprocess()(picture.convert("L")).shape == (3, 40, 30)
    assert Preprocess()(picture.convert("RGBA")).shape == (3, 40, 30)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"rescale": 1.0, "mean": (0, 0, 0), "std": (1, 1, 1), "size": None, "reduce_labels": None}),
        ({"do_resize": True, "size": {"shortest_edge": 7}}, {"size": (7, 7)}),
        ({"do_resize": False, "size": {"height": 7, "width": 8}}, {"size": None}),
        ({"do_resize": True, "size": 7}, {"size": (7, 7)}),
        ({"do_center_crop": True, "crop_size": {"height": 5, "width": 6}, "size": 9}, {"size": (5, 6)}),
        ({"do_resize": True, "size": 7, "resample": 0}, {"resampling": "nearest"}),
        ({"do_flip_channel_order": True}, {"channels": "BGR"}),
        ({"do_rescale": False, "rescale_factor": 0.5}, {"rescale": 1.0}),
        ({"rescale_factor": 0.5}, {"rescale": 0.5}),
        ({"do_normalize": True, "image_mean": 0.5, "image_std": [1, 2, 3]}, {"mean": (0.5,) * 3, "std": (1, 2, 3)}),
        ({"do_reduce_labels": True}, {"reduce_labels": True}),
        ({"reduce_labels": False}, {"reduce_labels": False}),
    ],
)
def test_fields_of_image_processors(fields, expected):
    got = Preprocess.from_processor(fields, "test")
    assert {key: getattr(got, key) for key in expected} == expected


def test_what_was_used_is_one_line(segformer_dir, smp_resnet_dir):
    for directory in (segformer_dir, smp_resnet_dir):
        line = str(load(directory, weights=False).preprocess)
        assert "\n" not in line
        assert "mean 0.485 0.456 0.406" in line
    assert "ImageNet defaults" in str(load(smp_resnet_dir, weights=False).preprocess)


def test_smp_settings_of_timm_encoders_are_known_offline():
    from equalize.checkpoint.families.smp.loader import preprocessing

    lite = preprocessing("tu-tf_efficientnet_lite0", "imagenet")
    assert lite.mean == (0.5, 0.5, 0.5)
    assert "tf_efficientnet_lite0" in str(lite)
    assert "defaults" in str(preprocessing("tu-no_such_encoder", "imagenet"))


@pytest.mark.parametrize(
    "fields",
    [
        {"do_resize": True, "size": -1},
        {"do_resize": True, "size": {"height": 10**9, "width": 4}},
        {"do_normalize": True, "image_mean": [0, None, 0], "image_std": [1, 1, 1]},
        {"do_normalize": True, "image_mean": [0.5], "image_std": [1, 1, 1]},
        {"do_rescale": True, "rescale_factor": float("nan")},
    ],
)
def test_numbers_that_no_image_can_be_prepared_with(segformer_dir, tmp_path, fields):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(segformer_dir / name)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "SegformerImageProcessor", **fields})
    )
    with pytest.raises(CheckpointError, match="is not a valid image processor config"):
        load(tmp_path, weights=False)
