"""Reads a picture with as many channels as a network takes.

    3       RGB, as `read_image` has it
    1       grayscale; colors are refused, since nothing says how they were made gray
    N       the bands of a TIFF or a picture with alpha, or the frames of a TIFF; `.npy` arrays (H, W, N) or (N, H, W)

TIFFs of more than four bands, or of more than 8 bits in several bands, need the library `tifffile`.
"""

import importlib.util

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, ImageSequence
from torch import Tensor

from equalize.data.images import ORIENTATION, TURNS, Item, load_array, open_picture, orientation, read_image
from equalize.errors import DataError
from equalize.messages import one_line

Picture = Image.Image | Tensor
"""An image of PIL, or bands (C, H, W): uint8, or float32 of any range."""

_TIFF = (".tif", ".tiff")
_BITS = 258  # the tag of a TIFF: bits of each sample
_REMEDY = "pip install equalize[tiff], or save it as .npy (H, W, channels)"


def read_picture(item: Item, channels: int = 3) -> Picture:
    """A picture with that many channels, upright; a DataError if it has others or cannot be read."""
    name = item.name.lower()
    if name.endswith(".npy"):
        return _as_bands(load_array(item), channels, item)
    try:
        if channels in (1, 3):
            return read_image(item) if channels == 3 else _gray(read_image(item), item)
        if not (name.endswith(_TIFF) and _has_tifffile()):
            return _as_bands(_load_bands(item), channels, item)
    except DataError as error:
        if not name.endswith(_TIFF) or not error.what.startswith("is not an image"):
            raise
        if not _has_tifffile():
            what = f"is no TIFF of at most four bands, and the network takes {channels}"
            raise DataError(item, what, remedy=_REMEDY) from error
    array, turned = _load_tiff(item)
    if turned != orientation(item):  # PIL does not open it, so masks would not be turned along
        what = f"has the orientation {turned}, which is not applied to TIFFs of such bands"
        raise DataError(item, what, remedy="save it upright")
    turn = TURNS.get(turned, torch.clone)
    return torch.stack([turn(band_HW) for band_HW in _as_bands(array, channels, item)])


def _has_tifffile() -> bool:
    return importlib.util.find_spec("tifffile") is not None


def picture_size(picture: Picture) -> tuple[int, int]:
    """(H, W)."""
    if isinstance(picture, Tensor):
        return picture.shape[1], picture.shape[2]
    return picture.height, picture.width


def _gray(picture: Image.Image, item: Item) -> Image.Image:
    red, green, blue = picture.split()
    if red.tobytes() != green.tobytes() or red.tobytes() != blue.tobytes():
        what = "has 3 channels of different content, and the network takes 1"
        raise DataError(item, what, remedy="convert the pictures to grayscale as for its training")
    return red


def _load_tiff(item: Item) -> tuple[NDArray[np.generic], int]:
    """All bands as they are stored, and the orientation, 1 to 8."""
    import tifffile

    try:
        with item.open("rb") as file, tifffile.TiffFile(file) as tiff:
            tag = tiff.pages.first.tags.get(ORIENTATION)
            turned = 1 if tag is None else int(tag.value)
            return np.asarray(tiff.asarray()), turned if turned in TURNS else 1
    except MemoryError:
        raise
    except Exception as error:  # tifffile's own errors, and those of its decoders
        raise DataError(item, f"cannot be read as a TIFF ({one_line(error)})") from error


def _load_bands(item: Item) -> NDArray[np.generic]:
    """(H, W, bands) of what PIL reads: at most four bands a frame, of 8 bits each."""
    with open_picture(item) as image:
        bits = getattr(image, "tag_v2", {}).get(_BITS, (8,))
        if len(bits) > max(1, len(image.getbands())) or (max(bits) > 8 and len(bits) > 1):
            raise DataError(item, f"has {len(bits)} bands of {max(bits)} bits", remedy=_REMEDY)
        frames = [np.asarray(ImageOps.exif_transpose(frame)) for frame in ImageSequence.Iterator(image)]
    same = frames if len({frame.shape for frame in frames}) == 1 else frames[:1]  # others are smaller versions
    return np.concatenate([frame.reshape(*frame.shape[:2], -1) for frame in same], axis=2)


def _as_bands(array: NDArray[np.generic], channels: int, item: Item) -> Tensor:
    """An array (H, W), (H, W, C) or (C, H, W) as (C, H, W)."""
    if array.ndim == 2:
        array = array[..., np.newaxis]
    if array.ndim != 3 or array.dtype.kind not in "buif" or not array.size:
        what = f"is an array of shape {list(array.shape)} and type {array.dtype}"
        raise DataError(item, what, expected=f"(H, W, {channels}) numbers")
    if array.shape[2] == channels:
        array = np.moveaxis(array, 2, 0)
    elif array.shape[0] != channels:
        got = min(array.shape[0], array.shape[2])
        what = f"has {got} channels, and the network takes {channels}"
        raise DataError(item, what, remedy=f"give it as TIFF or .npy with {channels}")
    if array.dtype in (np.uint8, np.bool_):
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.uint8))
    values = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if not values.isfinite().all():
        raise DataError(item, "holds NaN or Inf", remedy="replace what is missing, by the mean for example")
    return values
