"""Which images a pass runs over: blocks, their names, and what depends on nothing but the images."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from equalize.checkpoint.preprocess import Preprocess
from equalize.commands.calibration_config import CalibrationConfig
from equalize.commands.images import Images
from equalize.data.dataset import open_data
from equalize.errors import DataError


def images(folder, preprocess=None, **config):
    checkpoint = SimpleNamespace(preprocess=preprocess or Preprocess(), multiple=1)
    return Images(open_data(folder), checkpoint, CalibrationConfig(device="cpu", **config))


@pytest.mark.parametrize(
    ("size", "expected"),
    [((64, 64), 8), ((512, 1024), 8), ((768, 768), 7), ((1024, 1024), 4), ((1024, 2048), 2), ((4096, 4096), 1)],
)
def test_the_batch_is_as_large_as_four_megapixels_allow(photos, size, expected):
    found = images(photos, size=size)
    assert found.batch_size == expected
    assert images(photos, size=size, batch_size=3).batch_size == 3
    assert found.shapes == ((min(expected, 4), 3, *size),)
    assert found.pixels == 4 * size[0] * size[1]


def test_without_a_size_the_first_image_that_can_be_read_gives_it(photos, tmp_path):
    for path in photos.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "0.png").write_bytes(b"no image")
    found = images(tmp_path, skip_bad=0.5)
    assert found.shape == (2, 3, 48, 64)
    assert images(tmp_path, Preprocess(size=(32, 40))).shape == (2, 3, 32, 40)
    with pytest.raises(DataError, match=r"0\.png"):
        images(tmp_path)


def test_blocks_name_their_images_and_what_they_left_out(photos, tmp_path):
    for path in photos.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "1.png").write_bytes(b"no image")
    found = images(tmp_path, size=(32, 32), batch_size=2, skip_bad=0.3, tolerance=0.0)
    first, second = found.read()
    assert first.names == [str(tmp_path / "0.png")]
    assert [name for name, _ in first.skipped] == [str(tmp_path / "1.png")]
    assert second.names == [str(tmp_path / "2.png"), str(tmp_path / "3.png")]
    (again,) = found.read(1, 2)
    assert again.first == second.first
    assert torch.equal(again.batches[0], second.batches[0])  # the same files, read twice
    with pytest.raises(DataError, match="is bad image number 3 of 4"):
        found.leave_out([("a", "x"), ("b", "y"), ("c", "z")])
    assert len(found.skipped) == 3


def test_the_first_images_alone(photos):
    few = images(photos, size=(32, 32)).few(2)
    (block,) = images(photos, size=(32, 32)).read()
    assert torch.equal(few, block.batches[0][:2])


def test_a_run_that_may_stop_early_sees_the_images_in_random_order(tmp_path):
    for index in range(12):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{index:02}.png")
    assert [path.name for path in images(tmp_path, tolerance=0.0).paths] == [f"{index:02}.png" for index in range(12)]
    orders = [[path.name for path in images(tmp_path, tolerance=0.1, seed=seed).paths] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) != orders[0]


@pytest.mark.parametrize("size", [(8, 8), None])
def test_decisions_fall_on_the_same_images_for_any_batch_size(tmp_path, size):
    for index in range(70):
        Image.new("RGB", (8, 8) if index % 3 else (16, 8)).save(tmp_path / f"{index:02}.png")
    seen = []
    for batch_size in (3, 8, 50):
        found = images(tmp_path, size=size, batch_size=batch_size)
        blocks = list(found.read())
        assert all(str(found.paths[block.first]) in block.names for block in blocks)
        every = found.between_decisions
        rounds = [blocks[start : start + every] for start in range(0, len(blocks), every)]
        seen.append([sorted(name for block in each for name in block.names) for each in rounds])
        assert [len(names) for names in seen[-1]] == [32, 32, 6]
    assert seen[0] == seen[1] == seen[2]
