"""Every kind of pixel becomes RGB as documented; every kind of damage is named."""

import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from equalize.data.dataset import open_data
from equalize.data.images import Deep, Item, orientation, read_image, upright_size
from equalize.errors import DataError


def pixels(path: Item) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_gray_becomes_rgb(tmp_path: Path) -> None:
    gray = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    expected = np.stack([gray] * 3, axis=-1)
    np.testing.assert_array_equal(pixels(saved(Image.fromarray(gray), tmp_path / "a.png")), expected)
    bilevel = Image.fromarray(gray > 100)
    assert bilevel.mode == "1"
    np.testing.assert_array_equal(pixels(saved(bilevel, tmp_path / "b.png"))[..., 1], (gray > 100) * np.uint8(255))


def test_alpha_is_dropped_not_blended(tmp_path: Path) -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[..., :3] = (10, 200, 30)
    rgba[0, 0, 3] = 255
    np.testing.assert_array_equal(pixels(saved(Image.fromarray(rgba), tmp_path / "a.png")), rgba[..., :3])
    gray_alpha = Image.fromarray(np.array([[[9, 0], [8, 255]]], np.uint8), mode=None)
    assert gray_alpha.mode == "LA"
    np.testing.assert_array_equal(pixels(saved(gray_alpha, tmp_path / "b.png"))[0, :, 2], [9, 8])


def test_palette_becomes_its_colors(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 0]], np.uint8))
    image.putpalette([1, 2, 3, 40, 50, 60, 255, 0, 128])
    expected = np.array([[[1, 2, 3], [40, 50, 60]], [[255, 0, 128], [1, 2, 3]]])
    np.testing.assert_array_equal(pixels(saved(image, tmp_path / "a.png")), expected)
    transparent = saved(image, tmp_path / "b.png", transparency=bytes([0, 128, 255]))
    np.testing.assert_array_equal(pixels(transparent), expected)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_keep_the_upper_8(tmp_path: Path, suffix: str) -> None:
    deep = np.array([[0, 255, 256], [0x1234, 0xFF00, 0xFFFF]], np.uint16)
    result = pixels(saved(Image.fromarray(deep), tmp_path / f"a.{suffix}"))
    np.testing.assert_array_equal(result[..., 0], [[0, 0, 1], [0x12, 0xFF, 0xFF]])
    np.testing.assert_array_equal(result[..., 0], result[..., 2])


def test_16_bit_rgb_png_keeps_the_upper_8(tmp_path: Path) -> None:
    row = b"\0" + b"".join(value.to_bytes(2, "big") for value in (0x12FF, 0x3400, 0xFFFF))
    chunks = [(b"IHDR", bytes([0, 0, 0, 1, 0, 0, 0, 1, 16, 2, 0, 0, 0])), (b"IDAT", zlib.compress(row)), (b"IEND", b"")]
    body = b"".join(
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big") for kind, data in chunks
    )
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), [[[0x12, 0x34, 0xFF]]])


@pytest.mark.parametrize("kind", ["gray.png", "gray.tif", "rgb.png", "rgb.tif", "lzw.tif", "rgba.tif"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_16_bits_are_scaled_by_what_the_data_set_uses(tmp_path: Path, kind: str, bits: int) -> None:
    """Written by OpenCV, whose channels are BGR."""
    cv2 = pytest.importorskip("cv2")
    shape = {"gray": (9, 12), "rgba": (9, 12, 4)}.get(kind.partition(".")[0], (9, 12, 3))
    random = np.random.default_rng(0)
    for number, most in enumerate((2**bits, 2**bits // 3, 2**bits // 200 + 1)):  # a dark one keeps the scale
        deep = random.integers(0, most, shape).astype(np.uint16)
        deep.flat[:4] = most - 1
        flags = [cv2.IMWRITE_TIFF_COMPRESSION, 5 if kind == "lzw.tif" else 1] if kind.endswith("tif") else []
        cv2.imwrite(
            str(tmp_path / f"{number}_{kind}"), deep[..., [2, 1, 0, 3][: shape[-1]]] if len(shape) > 2 else deep, flags
        )
        np.save(tmp_path / f"{number}", deep)
    for path in tmp_path.glob("*.npy"):
        path.rename(path.with_suffix(".values"))
    data = open_data(tmp_path)
    for number, image in enumerate(data.images):
        deep = np.load(tmp_path / f"{number}.values", allow_pickle=False)
        expected = np.stack([deep] * 3, -1) if deep.ndim == 2 else deep[..., :3]
        np.testing.assert_array_equal(pixels(image), expected >> (bits - 8))
    said = f"pictures of 16 bits use {bits} (the largest value of 3 is {2**bits - 1}); networks of 1 or 3 channels get"
    assert said in data.describe()
    assert ("TIFFs of four bands" in data.describe()) == (kind == "rgba.tif")


def test_what_a_file_declares_of_its_16_bits_is_followed(tmp_path: Path) -> None:
    dark = Image.fromarray(np.array([[0, 1000]], np.uint16))
    dark.save(tmp_path / "a.tif", tiffinfo={281: 4095})
    data = open_data(tmp_path)
    assert pixels(data.images[0])[0, :, 0].tolist() == [0, 1000 >> 4]
    assert (
        "pictures of 16 bits use 12 (as the files declare); networks of 1 or 3 channels get the upper" in data.notes[0]
    )
    (tmp_path / "map").mkdir()
    (tmp_path / "map/a.pgm").write_bytes(b"P5 2 1 4095\n" + (1000).to_bytes(2, "big") + (4095).to_bytes(2, "big"))
    assert pixels(open_data(tmp_path / "map").images[0])[0, :, 0].tolist() == [1000 * 16 // 256, 255]


def test_a_picture_beyond_the_range_of_the_others_is_refused_and_hot_pixels_are_clipped(tmp_path: Path) -> None:
    values = np.full((10, 20), 4000, np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    values[0, :2] = 65535  # one in a hundred
    Image.fromarray(values).save(tmp_path / "hot.png")
    assert set(pixels(Deep(item=tmp_path / "hot.png", bits=12)).flatten().tolist()) == {4000 >> 4, 255}
    values[1, 0] = 65535
    Image.fromarray(values).save(tmp_path / "hot.png")
    with pytest.raises(DataError, match=r"hot\.png: uses more than the 12 bits that other .* up to 65535, 2% of them"):
        read_image(Deep(item=tmp_path / "hot.png", bits=12))


def test_pictures_of_8_bits_stay_as_they_are_and_nothing_is_said(tmp_path: Path) -> None:
    for suffix in ("png", "tif", "jpg", "bmp"):
        Image.new("RGB", (4, 3), (1, 2, 3)).save(tmp_path / f"a.{suffix}")
    data = open_data(tmp_path)
    assert data.notes == ()
    assert all(isinstance(item, Path) for item in data.images)


def test_32_bits_and_floats(tmp_path: Path) -> None:
    wide = Image.fromarray(np.array([[256, 512]], np.int32))
    np.testing.assert_array_equal(pixels(saved(wide, tmp_path / "a.tif"))[0, :, 0], [1, 2])
    wider = saved(Image.fromarray(np.array([[-1, 70000]], np.int32)), tmp_path / "b.tif")
    with pytest.raises(
        DataError, match=r"b\.tif: has pixels outside 16 bits, got -1 to 70000; .*\.npy and say --rescale"
    ):
        read_image(wider)
    floating = saved(Image.fromarray(np.array([[0.5]], np.float32)), tmp_path / "c.tif")
    with pytest.raises(DataError, match=r"c\.tif: has floating-point pixels"):
        read_image(floating)


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    path = saved(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), tmp_path / "a.jpg", quality=95)
    assert np.abs(pixels(path).astype(int) - [0, 255, 255]).max() < 10


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 16), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 16, 16))  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright: the left half comes to the top
    for path in (saved(image, tmp_path / "a.jpg", exif=exif, quality=95), saved(image, tmp_path / "a.tif", exif=exif)):
        upright = pixels(path)
        assert upright.shape == (32, 16, 3)
        assert (upright_size(path), orientation(path)) == ((32, 16), 6)
        assert upright[:12].min() > 200
        assert upright[20:].max() < 50


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    for suffix in ("jpg", "png", "webp", "tif"):
        path = saved(Image.fromarray(noise), tmp_path / f"cut.{suffix}")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(DataError, match=rf"cut\.{suffix}: "):
            read_image(path)


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<html></html>")
    with pytest.raises(DataError, match=r"page\.jpg: is not an image of a known format"):
        read_image(tmp_path / "page.jpg")
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(DataError, match=r"empty\.jpg: is not an image of a known format"):
        read_image(tmp_path / "empty.jpg")
    with pytest.raises(DataError, match=r"absent\.jpg: cannot be read as an image \(No such file or directory\)"):
        read_image(tmp_path / "absent.jpg")


def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL raises above twice its limit."""
    path = saved(Image.new("L", (10, 10)), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    with pytest.raises(
        DataError, match=r"bomb\.png: cannot be read .* exceeds limit of .*; allow it with --max-pixels 100"
    ):
        read_image(path)
