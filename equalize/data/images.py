"""Reads one file, or cell of a table, as an RGB image.

How formats are converted, as torchvision, transformers and mmsegmentation users know it:

    grayscale, black and white      the same value in R, G and B
    palette                         its colors
    alpha (RGBA, LA, palette)       dropped, not blended with any background
    16 bit                          the upper 8 bits (PIL does so by itself for RGB)
    CMYK, YCbCr                     RGB, by PIL's formula, color profiles not applied
    EXIF orientation                applied
    several frames                  the first
    floating point                  refused: the range of its values is not known
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from equalize.errors import DataError

_MOST_LABELS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One cell of a table of Hugging Face `datasets`, which opens as a file does; nothing is read before.

    Attributes:
        table: a `datasets.Dataset` of one column in the format "arrow", memory-mapped; all cells of a column share it.
        origin: the data set and the split, for people.
        row: from 0.
        column: its name.
    """

    table: Any = field(repr=False, compare=False)
    origin: str
    row: int
    column: str

    def __str__(self) -> str:
        return f"{self.origin}[{self.row}].{self.column}"

    @property
    def name(self) -> str:
        """Row and column, without the data set, as the name of a path is without its folder."""
        return f"[{self.row}].{self.column}"

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        """The encoded picture, byte by byte as it was stored.

        Raises:
            DataError: the cell is empty. OSError: it names a file, and that cannot be opened.
        """
        stored = self.table[self.row].column(0)[0].as_py()
        if not isinstance(stored, dict):
            stored = {"bytes": stored}
        if stored.get("bytes") is not None:
            return BytesIO(stored["bytes"])
        if stored.get("path") is not None:
            return Path(stored["path"]).open(mode)
        raise DataError(self, "is empty")


Item = Path | Cell
"""An image or a mask: a path or a cell, with a name, that can be opened."""


def read_image(item: Item) -> Image.Image:
    """Read a picture as RGB, 8 bits a channel, upright.

    Raises:
        DataError: it is missing, truncated, not an image, or so large that PIL takes it for a decompression bomb.
    """
    with open_picture(item) as image:
        return _to_rgb(ImageOps.exif_transpose(image), item)


@contextmanager
def open_picture(item: Item) -> Iterator[Image.Image]:
    """Open an image and decode it; whatever goes wrong up to the end of the block is a `DataError`."""
    try:
        with item.open("rb") as file, Image.open(file) as image:
            image.load()
            yield image
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise DataError(item, "is not an image of a known format") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, ...
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(item, f"cannot be read as an image ({reason})") from error


def looks_like_mask(path: Path) -> bool:
    """Whether a file holds few different values, and no JPEG: its labels, if anything asks whether it is a mask."""
    try:
        if path.suffix.lower() == ".npy":
            values = np.load(path, mmap_mode="r", allow_pickle=False)
            return values.ndim == 2 and values.dtype.kind in "bui"
        with Image.open(path) as image:
            if image.format in {"JPEG", "MPO"}:
                return False
            return image.getcolors(_MOST_LABELS) is not None
    except Exception:  # what cannot be read is named when it is
        return False


def _to_rgb(image: Image.Image, item: Item) -> Image.Image:
    if image.mode == "F":
        raise DataError(item, "has floating-point pixels, whose range is not known", remedy="save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        values_HW = np.asarray(image)  # 16 or 32 bits
        if values_HW.min() < 0 or values_HW.max() > 0xFFFF:
            raise DataError(item, "has pixels outside 16 bits", got=f"{values_HW.min()} to {values_HW.max()}")
        image = Image.fromarray((values_HW >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns about the direct way
    return image.convert("RGB")
