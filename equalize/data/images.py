"""One file, or cell of a table -> one RGB picture.

What a file holds and what it becomes, as torchvision, transformers and mmsegmentation users know it:

    grayscale, black and white      the same value in R, G and B
    palette                         its colours
    alpha (RGBA, LA, palette)       dropped, not blended with any background
    16 bit                          the upper 8 bits (PIL does so by itself for RGB)
    CMYK, YCbCr                     RGB, by PIL's formula, colour profiles not applied
    EXIF orientation                applied
    several frames                  the first
    floating point                  refused: the range of its values is not known
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from equalize.data.cells import Item, as_item
from equalize.errors import DataError


def read_image(path: str | Item) -> Image.Image:
    """Read a picture as RGB, 8 bits a channel, upright.

    Raises:
        DataError: the file is missing, truncated, not an image, or so large when decoded that PIL takes it for a
            decompression bomb.
    """
    item = as_item(path)
    with open_picture(item) as image:
        return _to_rgb(ImageOps.exif_transpose(image), item)


@contextmanager
def open_picture(item: Item) -> Iterator[Image.Image]:
    """Open an image and decode it; whatever goes wrong up to the end of the block is a `DataError`."""
    try:
        with item.open("rb") as file, Image.open(file) as image:
            if (
                Image.MAX_IMAGE_PIXELS and math.prod(image.size) > Image.MAX_IMAGE_PIXELS
            ):  # PIL but warns up to twice that
                raise Image.DecompressionBombError
            image.load()
            yield image
    except (DataError, MemoryError):
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, ...
        raise _unreadable(item, error) from error


def _to_rgb(image: Image.Image, item: Item) -> Image.Image:
    if image.mode == "F":
        raise DataError(item, "has floating-point pixels, whose range is not known", remedy="save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = _upper_8_bits(image, item)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns about the direct way
    return image.convert("RGB")


def _upper_8_bits(image: Image.Image, item: Item) -> Image.Image:
    values = np.asarray(image)  # (H, W), 16 or 32 bits
    if values.min() < 0 or values.max() > 0xFFFF:
        raise DataError(item, "has pixels outside 16 bits", got=f"{values.min()} to {values.max()}")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _unreadable(item: Item, error: Exception) -> DataError:
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        limit = f"at most {Image.MAX_IMAGE_PIXELS} pixels"
        return DataError(item, "is so large when decoded that it may be a decompression bomb", expected=limit)
    if isinstance(error, UnidentifiedImageError):
        with item.open("rb") as file:
            empty = not file.read(1)
        return DataError(item, "is an empty file" if empty else "is not an image of a known format")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
    return DataError(item, f"cannot be read as an image ({reason})")
