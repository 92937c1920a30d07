"""Reads one file, or cell of a table, as an RGB image.

How formats are converted, as torchvision, transformers and mmsegmentation users know it:

    grayscale, black and white      the same value in R, G and B
    palette                         its colors
    alpha (RGBA, LA, palette)       dropped, not blended with any background
    16 bit                          the upper 8 of the bits that the data set uses, see `Deep`; of 16 by default
    TIFF of four bands              the first three
    CMYK, YCbCr                     RGB, by PIL's formula, color profiles not applied
    EXIF orientation                applied
    several frames                  the first
    floating point                  refused: the range of its values is not known
"""

import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from equalize.errors import DataError
from equalize.messages import one_line

ORIENTATION = 0x0112  # of EXIF
QUARTER_TURNS = range(5, 9)
TURNS: Mapping[int, Callable[[Tensor], Tensor]] = {
    2: lambda x_HW: x_HW.flip(1),
    3: lambda x_HW: x_HW.flip(0, 1),
    4: lambda x_HW: x_HW.flip(0),
    5: lambda x_HW: x_HW.T,
    6: lambda x_HW: x_HW.rot90(-1),
    7: lambda x_HW: x_HW.flip(0, 1).T,
    8: lambda x_HW: x_HW.rot90(1),
}
"""What makes an image of that EXIF orientation upright (CIPA DC-008, tag Orientation)."""
_WIDTH, _HEIGHT = 256, 257  # tags of a TIFF, as it is stored
_MOST_LABELS = 64
_DEEP = "equalize: 16 bits"  # a key of `Image.info`
_HOT = 0.01  # share of the values that may lie above the range: they are clipped
_AS_ARRAY = "save it with 8 or 16 bits, or as .npy and say --rescale"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One cell of a table of Hugging Face `datasets`, which opens as a file does; nothing is read before.

    `table` has one column, in the format "arrow", memory-mapped, and is shared by all its cells; `origin` is the data
    set and the split, for people; rows count from 0.
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
        """The encoded picture as it was stored; a DataError for an empty cell, an OSError for a missing file."""
        stored = self.table[self.row].column(0)[0].as_py()
        if not isinstance(stored, dict):
            stored = {"bytes": stored}
        if stored.get("bytes") is not None:
            return BytesIO(stored["bytes"])
        if stored.get("path") is not None:
            return Path(stored["path"]).open(mode)
        raise DataError(self, "is empty")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deep:
    """A picture stored with 16 bits a channel of which a data set uses `bits`."""

    item: Path | Cell
    bits: int

    def __str__(self) -> str:
        return str(self.item)

    @property
    def name(self) -> str:
        """That of the picture."""
        return self.item.name

    def open(self, mode: Literal["rb"]) -> BinaryIO:
        """The encoded picture."""
        return self.item.open(mode)


Item = Path | Cell | Deep
"""An image or a mask: a path or a cell, with a name, that can be opened."""


def read_image(item: Item) -> Image.Image:
    """A picture as RGB, 8 bits a channel, upright; a DataError if it cannot be read or exceeds PIL's limit."""
    with open_picture(item) as image:
        turned = image.getexif().get(ORIENTATION, 1)
        if (values := deep_values(image, item)) is not None:
            bits = item.bits if isinstance(item, Deep) else 16
            _demand_range(values, bits, item)
            if values.ndim > len("HW"):
                values = values[..., :3] if values.shape[2] >= len("RGB") else values[..., 0]
            image = Image.fromarray((values >> (bits - 8)).clip(0, 255).astype(np.uint8))
            image.getexif()[ORIENTATION] = turned
        return _to_rgb(ImageOps.exif_transpose(image), item)


def _demand_range(values: NDArray[np.int64], bits: int, item: Item) -> None:
    """Refuses a picture whose values lie above the bits that its data set was found to use; a few are hot pixels."""
    above = float((values >= 2**bits).mean())
    if above > _HOT:
        what = f"uses more than the {bits} bits that other pictures of the data set use"
        got = f"values up to {values.max()}, {above:.0%} of them above"
        raise DataError(item, what, got=got, remedy="save all pictures on one scale, with 8 bits a channel for example")


def upright_size(item: Item) -> tuple[int, int] | None:
    """(H, W) of a picture as viewers show it, by its header; None where that cannot be read."""
    try:
        with opened(item) as image:
            turned = image.getexif().get(ORIENTATION, 1) in QUARTER_TURNS
            tags = getattr(image, "tag_v2", {})  # PIL gives the size that a TIFF has once it is loaded, which turns it
            width, height = tags.get(_WIDTH, image.width), tags.get(_HEIGHT, image.height)
            return (width, height) if turned else (height, width)
    except Exception:  # what cannot be read is named when it is
        return None


def orientation(item: Item) -> int:
    """The EXIF orientation of a picture, 1 to 8; 1 where it has none or cannot be read."""
    try:
        with opened(item) as image:
            turned = image.getexif().get(ORIENTATION, 1)
    except Exception:  # what cannot be read is named when it is
        return 1
    return turned if turned in range(1, 9) else 1


def is_deep(image: Image.Image) -> bool:
    """Whether an image that is not decoded yet has 16 bits a channel, or more."""
    tiles = image.tile if isinstance(image, ImageFile.ImageFile) else []
    return image.mode.startswith("I") or bool(tiles and _swapped(tiles[0].args))


def deep_values(image: Image.Image, item: Item) -> NDArray[np.int64] | None:
    """The values of a picture of 16 bits a channel from `open_picture`, (H, W) or (H, W, C); None for one of fewer.

    PIL keeps the upper 8 bits of each channel of colors. The lower ones are what it gives when it takes the bytes of
    a value for swapped.
    """
    if not image.info.get(_DEEP):
        return None
    if image.mode.startswith("I"):
        values = np.array(image, np.int64)
        least, most = values.min(), values.max()
        if least < 0 or most > 0xFFFF:
            raise DataError(item, "has pixels outside 16 bits", got=f"{least} to {most}", remedy=_AS_ARRAY)
        return values
    with opened(item) as again:
        assert isinstance(again, ImageFile.ImageFile)
        again.tile = [tile._replace(args=_swapped(tile.args)) for tile in again.tile]
        return np.array(image, np.int64) << 8 | np.array(again, np.int64)


def _swapped(arguments: Any) -> Any:
    """Arguments of a decoder, for the other order of bytes; None where values have no 16 bits."""
    mode, *rest = arguments if isinstance(arguments, tuple) else (arguments,)
    native = ";16B" if sys.byteorder == "little" else ";16L"
    order = {";16B": ";16L", ";16L": ";16B", ";16N": native}.get(str(mode)[-4:])
    return order and ((mode[:-4] + order, *rest) if isinstance(arguments, tuple) else mode[:-4] + order)


@contextmanager
def opened(item: Item) -> Iterator[Image.Image]:
    """Open an image without decoding it; PIL's limit is twice its setting, of which the first half only warns."""
    with item.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(file) as image:
            yield image


@contextmanager
def open_picture(item: Item) -> Iterator[Image.Image]:
    """Open an image and decode it; whatever goes wrong up to the end of the block is a `DataError`."""
    try:
        with opened(item) as image:
            image.info[_DEEP] = is_deep(image)
            image.load()
            yield image
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise DataError(item, "is not an image of a known format") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, ...
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        remedy = None
        if isinstance(error, Image.DecompressionBombError):
            remedy = f"allow it with --max-pixels {re.findall('[0-9]+', reason)[0]} if it is meant to be that large"
        raise DataError(item, f"cannot be read as an image ({reason})", remedy=remedy) from error


def load_array(item: Item) -> NDArray[np.generic]:
    """What a file of NumPy holds."""
    try:
        with item.open("rb") as file:
            array = np.load(file, allow_pickle=False)
    except MemoryError:
        raise
    except Exception as error:  # OSError, ValueError, EOFError, SyntaxError in a header
        raise DataError(item, f"cannot be read as an array ({one_line(error)})") from error
    if not isinstance(array, np.ndarray):
        raise DataError(item, "holds several arrays", expected="one array (H, W, channels)")
    return array


def looks_like_mask(path: Path) -> bool:
    """Whether a file holds few different values, and no JPEG: its labels, if anything asks whether it is a mask."""
    try:
        if path.suffix.lower() == ".npy":
            values = np.load(path, mmap_mode="r", allow_pickle=False)
            return values.ndim == 2 and values.dtype.kind in "bui"
        with opened(path) as image:
            if image.format in {"JPEG", "MPO"}:
                return False
            return image.getcolors(_MOST_LABELS) is not None
    except Exception:  # what cannot be read is named when it is
        return False


def _to_rgb(image: Image.Image, item: Item) -> Image.Image:
    if image.mode == "F":
        raise DataError(item, "has floating-point pixels, whose range is not known", remedy=_AS_ARRAY)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns about the direct way
    return image.convert("RGB")
