"""Pictures with as many channels as a network takes."""

import struct

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from equalize.checkpoint.preprocess import Override, Preprocess
from equalize.data.augment import Augment
from equalize.data.bands import picture_size, read_picture
from equalize.data.dataset import open_data
from equalize.errors import DataError, InputError


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (6, 8, 4), dtype=np.uint8)


def test_three_channels_are_rgb(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    picture = read_picture(tmp_path / "a.png")
    assert picture.mode == "RGB"
    assert picture_size(picture) == (6, 8)


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.webp"])
def test_four_bands_of_a_picture(tmp_path, pixels, name):
    Image.fromarray(pixels).save(tmp_path / name, lossless=True, exact=True)
    bands = read_picture(tmp_path / name, 4)
    assert torch.equal(bands, torch.from_numpy(pixels).movedim(2, 0))
    assert picture_size(bands) == (6, 8)


def test_frames_of_a_tiff_are_bands(tmp_path, pixels):
    frames = [Image.fromarray(pixels[..., index % 4]) for index in range(5)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    bands = read_picture(tmp_path / "a.tif", 5)
    assert torch.equal(bands[:4], torch.from_numpy(pixels).movedim(2, 0))


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGB"])
def test_grayscale_in_any_mode(tmp_path, mode):
    gray = Image.fromarray(np.array([[0, 255, 0], [255, 255, 0]], np.uint8))
    gray.convert(mode).save(tmp_path / "a.png")
    picture = read_picture(tmp_path / "a.png", 1)
    assert picture.mode == "L"
    assert np.array_equal(np.asarray(picture), np.asarray(gray))


@pytest.mark.parametrize("shape", ["HWC", "CHW"])
def test_arrays(tmp_path, shape):
    array = np.arange(5 * 6 * 7, dtype=np.uint16).reshape(6, 7, 5)
    np.save(tmp_path / "a.npy", array if shape == "HWC" else np.moveaxis(array, 2, 0))
    bands = read_picture(tmp_path / "a.npy", 5)
    assert bands.dtype == torch.float32
    assert np.array_equal(bands.numpy(), np.moveaxis(array, 2, 0))
    np.save(tmp_path / "b.npy", array[..., 0])
    assert read_picture(tmp_path / "b.npy", 1).shape == (1, 6, 7)


@pytest.mark.parametrize(
    ("array", "channels", "said"),
    [
        (np.zeros((6, 7, 3), np.uint8), 5, "has 3 channels, and the network takes 5"),
        (np.zeros(6), 5, "is an array of shape"),
        (np.zeros((0, 7, 5)), 5, "is an array of shape"),
        (np.zeros((6, 7, 5), complex), 5, "type complex128"),
        (np.full((6, 7, 5), np.nan), 5, "holds NaN or Inf"),
        (np.array([{}]), 5, "cannot be read as an array"),
    ],
)
def test_arrays_that_are_no_pictures(tmp_path, array, channels, said):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=rf"a\.npy: .*{said}"):
        read_picture(tmp_path / "a.npy", channels)


def test_other_numbers_of_channels_are_named(tmp_path, pixels):
    Image.fromarray(pixels[..., :3]).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: has 3 channels, and the network takes 4"):
        read_picture(tmp_path / "a.png", 4)
    with pytest.raises(DataError, match=r"has 3 channels of different content, and the network takes 1"):
        read_picture(tmp_path / "a.png", 1)
    (tmp_path / "b.tif").write_bytes(b"II*\0 no TIFF")
    with pytest.raises(DataError, match=r"b\.tif: .*"):
        read_picture(tmp_path / "b.tif", 6)


def test_a_tiff_of_six_bands(tmp_path):
    array = np.random.default_rng(0).integers(0, 4096, (6, 8, 6), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", array)
    assert np.array_equal(read_picture(tmp_path / "a.tif", 6).numpy(), np.moveaxis(array, 2, 0))


@pytest.mark.parametrize(("bands", "kind"), [(4, "rgb"), (6, "minisblack")])
def test_a_turned_tiff_of_16_bits(tmp_path, bands, kind):
    array = np.random.default_rng(0).integers(0, 4096, (6, 8, bands), dtype=np.uint16)
    turned = [(274, "H", 1, 6)]  # of EXIF: by a quarter clockwise
    tifffile.imwrite(tmp_path / "a.tif", array, photometric=kind, planarconfig="contig", extratags=turned)
    if bands == 6:  # PIL does not open it, so nothing turns its mask
        with pytest.raises(DataError, match=r"a\.tif: has the orientation 6, which is not applied"):
            read_picture(tmp_path / "a.tif", 6)
    else:
        upright = np.moveaxis(np.rot90(array, -1), 2, 0)
        assert np.array_equal(read_picture(tmp_path / "a.tif", 4).numpy(), upright)


def test_bands_are_scaled_as_the_user_says():
    bands = torch.arange(2 * 4 * 6, dtype=torch.float32).view(2, 4, 6)
    with pytest.raises(InputError, match=r"--rescale: is needed for images of more than 8 bits"):
        Preprocess(bands=2, mean=(0.0,), std=(1.0,))(bands)
    preprocess = Override(mean=(1.0, 2.0), std=(4.0,), rescale=0.5).over(Preprocess(bands=2))
    expected = (bands * 0.5 - torch.tensor([1.0, 2.0]).view(2, 1, 1)) / 4
    torch.testing.assert_close(preprocess(bands), expected)
    assert preprocess(bands, (2, 3)).shape == (2, 2, 3)
    smooth = preprocess(torch.full((2, 4, 6), 8.0), (3, 5))
    torch.testing.assert_close(smooth[0], torch.full((3, 5), 0.75))


def test_bands_are_augmented_with_their_labels():
    labels = torch.randint(0, 5, (12, 16))
    bands = labels.expand(6, -1, -1).to(torch.uint8) * 10
    got, moved = Augment(crop=(8, 8), scale=(1.0, 1.0))(bands, labels, seed=3)
    assert torch.equal(got, (moved * 10).expand(6, -1, -1).to(torch.uint8))  # no colors vary


def test_arrays_count_where_there_are_no_pictures(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 4, 5), np.uint8))
    assert [path.name for path in open_data(tmp_path).images] == ["a.npy"]
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    data = open_data(tmp_path)
    assert [path.name for path in data.images] == ["b.png"]
    assert data.notes == ("1 file beside other pictures passed over (a.npy)",)


def test_the_fourth_band_of_a_tiff_that_says_nothing_of_it_is_named(tmp_path, pixels, monkeypatch):
    Image.frombytes("RGBX", (8, 6), pixels.tobytes()).save(tmp_path / "a.tif")
    data = open_data(tmp_path)
    assert data.notes == ("TIFFs of four bands: networks of 3 channels get the first three as red, green and blue",)
    assert np.array_equal(np.asarray(read_picture(data.images[0])), pixels[..., :3])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"a\.tif: has 4 bands of 8 bits; pip install equalize\[tiff\]"):
        read_picture(data.images[0], 4)  # PIL gives three of them


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_tiffs_of_six_bands_name_the_library_that_reads_them(tmp_path, pixels, channels, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    Image.frombytes("RGBX", (8, 6), pixels.tobytes()).save(tmp_path / "a.tif")
    four, six = (struct.pack("<HHIHH", 277, 3, 1, bands, 0) for bands in (4, 6))
    (tmp_path / "a.tif").write_bytes((tmp_path / "a.tif").read_bytes().replace(four, six))
    said = rf"a\.tif: is no TIFF of at most four bands, and the network takes {channels}; pip install equalize\[tiff\]"
    with pytest.raises(DataError, match=said):
        read_picture(tmp_path / "a.tif", channels)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_tiff_of_six_bands_for_fewer_channels(tmp_path, channels):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((6, 8, 6), np.uint8), photometric="minisblack", planarconfig="contig")
    with pytest.raises(DataError, match=rf"a\.tif: has 6 channels, and the network takes {channels}"):
        read_picture(tmp_path / "a.tif", channels)


def test_a_factor_for_more_bits_is_refused_where_pixels_are_of_8():
    preprocess = Override(rescale=1 / 4095).over(Preprocess(bands=1, mean=(0.5,), std=(0.2,)))
    with pytest.raises(InputError, match=r"--rescale: is too small for pixels of 0 to 255, .* got 0.000244"):
        preprocess(Image.new("L", (4, 4)))
    assert preprocess(torch.zeros(1, 4, 4)).shape == (1, 4, 4)
