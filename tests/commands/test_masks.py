"""What commands make of masks: the same in all of them, and said."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from equalize.commands.calibration_config import CalibrationConfig
from equalize.commands.evaluate import EvalConfig, evaluate
from equalize.commands.images import open_images
from equalize.errors import DataError
from tests.support.scenes import write_scenes
from tests.support.trained import trained_net

COLORS = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0]], np.uint8)


@pytest.fixture
def net(photos, tmp_path):
    return trained_net(tmp_path, photos, lambda x: x / 255)


def redrawn(tmp_path, draw, classes=3):
    """Scenes whose masks are saved by `draw` from their labels."""
    data = write_scenes(tmp_path / "data", classes, counts={"train": 4, "val": 2})
    for path in data.glob("masks/*/*.png"):
        labels = np.asarray(Image.open(path)).copy()
        labels[0] = labels[1]
        draw(labels, path)
    return data


def labels_seen(data, name, **config):
    """The labels of the first block that calibration reads, and what it says of them."""
    said = []
    _, images = open_images(data, name.load(), CalibrationConfig(**config), notify=said.append, labels=True)
    labels = next(images.read()).labels
    return {*labels[0].flatten().tolist()} if labels else None, next(line for line in said if line.startswith("masks:"))


def test_calibration_says_what_masks_mean(net, tmp_path):
    data = redrawn(tmp_path, lambda labels, path: Image.fromarray(labels).save(path))
    assert labels_seen(data, net) == ({0, 1, 2}, "masks: labels as stored (labels are 0 to 2)")
    seen, said = labels_seen(data, net, ignore_index=2)
    assert (seen, said) == ({0, 1, -1}, "masks: labels as stored (labels are 0 to 1)")
    data = redrawn(tmp_path, lambda labels, path: Image.fromarray((labels > 0).astype(np.uint8) * 255).save(path))
    seen, said = labels_seen(data, net)
    assert seen == {0, 1}
    assert said.startswith("masks: 255 is class 1 (labels are 0 and 255 alone;")


def test_calibration_reads_colors_as_evaluation_does(net, run_cli, tmp_path):
    data = redrawn(tmp_path, lambda labels, path: Image.fromarray(COLORS[labels]).save(path))
    seen, said = labels_seen(data, net)
    assert seen is None
    assert "of 4 masks looked at do not count" in said
    assert "has colors, of which no file says the classes; " in said
    assert said.endswith(
        "as if there were no masks: delta is of targets that lie in every branch alike, not of your labels"
    )
    colors = tmp_path / "mine.txt"
    colors.write_text("a 0 0 0\nb 128 0 0\nc 0 128 0\n")
    assert labels_seen(data, net, colors=colors)[0] == {0, 1, 2}
    for command in ("scan", "evaluate"):
        ran = run_cli(command, net.source, "--arch", net.arch, "--data", data, "--colors", colors)
        assert ran.code == 0, ran.err
        assert "labels as stored (labels are 0 to 2)" in ran.text
    (data / "labelmap.txt").write_text("a:0,0,0::\nvoid:128,0,0::\nc:0,128,0::\n")
    assert labels_seen(data, net)[0] == {-1, 0, 1}


def test_calibration_names_masks_that_do_not_count(net, tmp_path):
    data = redrawn(tmp_path, lambda labels, path: Image.fromarray(labels).save(path))
    Image.new("L", (8, 8)).save(data / "masks/train/002.png")
    seen, said = labels_seen(data, net)
    assert seen == {-1, 0, 1, 2}
    assert "1 of 4 masks looked at do not count" in said
    assert "002.png: has another size than its image" in said


def test_calibration_turns_masks_or_asks(net, run_cli, tmp_path):
    data = redrawn(tmp_path, lambda labels, path: Image.fromarray(labels).save(path))
    exif = Image.Exif()
    exif[0x0112] = 3
    for path in data.glob("images/*/*.png"):
        Image.open(path).save(path, exif=exif)
    said = labels_seen(data, net)[1]
    assert "set --masks-drawn-on upright" in said
    assert labels_seen(data, net, masks_drawn_on="stored")[0] == {0, 1, 2}
    ran = run_cli(
        "calibrate",
        net.source,
        "--arch",
        net.arch,
        "--data",
        data,
        "--masks-drawn-on",
        "stored",
        "--dry-run",
        "--force-preprocessing",
        "-o",
        tmp_path / "o",
    )
    assert ran.code == 0, ran.err
    assert "4 masks lack the EXIF orientation" in ran.text


def test_a_mask_of_another_size_behind_the_sample_is_refused(net, tmp_path):
    data = write_scenes(tmp_path / "data", 3, counts={None: 66}, size=(8, 12))
    checked = {*random.Random(0).sample(range(66), 64)}
    number = next(each for each in range(66) if each not in checked)
    Image.new("L", (6, 4)).save(data / f"masks/{number:03}.png")
    with pytest.raises(DataError, match=rf"{number:03}\.png: has another size than .*, got 4x6, expected 8x12"):
        evaluate(net, data, EvalConfig(device="cpu"))


def test_the_channel_order_of_other_channels_is_refused(run_cli, tmp_path):
    name = trained_net(tmp_path, tmp_path, lambda _: torch.randn(4, 4, 32, 32), channels=4)
    Image.new("RGBA", (16, 16), (1, 2, 3, 255)).save(tmp_path / "a.png")
    words = (name.source, "--arch", name.arch, "--arch-arg", "channels=4", "--data", tmp_path)
    ran = run_cli("scan", *words, "--channel-order", "bgr")
    assert ran.code == 2
    assert "--channel-order: is that of three channels, and the network takes 4" in ran.err
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    Image.new("L", (16, 16)).save(tmp_path / "a_mask.png")
    ran = run_cli("evaluate", *words)
    assert ran.code == 2
    assert "has 3 channels, and the network takes 4" in ran.err
    assert "--skip-bad" not in ran.err  # which it does not have
