"""`Preprocess`: how a checkpoint's images are resized and normalized; callable on a PIL image.

`Override` is what the user says of it, and what equalize keeps beside weights whose format has no place for it.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from equalize.errors import InputError

PREPROCESS_FILE = "preprocess.json"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_LONGEST_SIDE = 4096  # pixels; the limit for a size in a file, not for --size
_SMALLEST_RANGE = 0.25  # of rescaled pixels: 1/4095 and 1/65535 are meant for pictures of 12 and 16 bits
_PROPORTIONS = "which keeps the proportions of pictures; --size HxW can too"
PREPROCESS_FLAGS = "--mean, --std, --rescale, --channel-order"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocess:
    """Resizes, scales and normalizes an image as in the checkpoint's training.

    A pixel x in 0..255 becomes ``(x * rescale - mean) / std``, per channel in the order ``channels``.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    """Per channel, or one for all, in the units of the rescaled pixel."""
    std: tuple[float, ...] = IMAGENET_STD
    rescale: float = 1 / 255
    size: tuple[int, int] | None = None
    """(height, width) to resize to; None leaves images as they are."""
    resampling: str = "bilinear"
    """How pictures are resized, as PIL calls it; antialiased."""
    channels: Literal["RGB", "BGR"] = "RGB"
    bands: int = 3
    """How many channels the network takes; their order matters where they are three."""
    given: tuple[str, ...] = ()
    """The fields that the user set; the values of images may have any range if ``rescale`` is one of them."""
    reduce_labels: bool | None = None
    """Whether label 0 is background to be ignored, as ADE20K models have it; None if unknown."""
    origin: str = "ImageNet defaults"
    """Where the numbers come from."""
    assumed: bool = False
    """Whether they are a guess: nothing that belongs to the weights says so."""
    windows: tuple[tuple[int, int], tuple[int, int]] | None = None
    """(H, W) of the windows that the checkpoint's own library tests in, and how far apart they start."""

    def __call__(self, image: Image.Image | Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Turn a picture into the (C, H, W) float32 input of the model.

        Args:
            image: of any mode, converted to RGB, or to gray where the network takes one channel; or bands (C, H, W).
            size: (height, width) instead of the checkpoint's own; with antialiasing; bands are resized bilinearly.

        Raises:
            InputError: bands of more than 8 bits, of a range that nobody named; a factor for pictures of more bits.
        """
        height_width = size or self.size
        x_HWC = self._bands(image, height_width) if isinstance(image, Tensor) else self._pixels(image, height_width)
        if self.channels == "BGR" and self.bands == 3:
            x_HWC = x_HWC.flip(-1)
        x_HWC = (x_HWC * self.rescale - torch.tensor(self.mean)) / torch.tensor(self.std)
        return x_HWC.permute(2, 0, 1).contiguous()

    def _pixels(self, image: Image.Image, size: tuple[int, int] | None) -> Tensor:
        """A picture as (H, W, C), 0 to 255."""
        if "rescale" in self.given and 255 * abs(self.rescale) < _SMALLEST_RANGE:
            what = "is too small for pixels of 0 to 255, to which pictures of more bits are brought as well"
            raise InputError("--rescale", what, got=f"{self.rescale:.3g}", remedy="such as 1/255 or 1")
        mode = "L" if self.bands == 1 else "RGB"
        picture = image if image.mode == mode else image.convert(mode)
        if size is not None and picture.size != (size[1], size[0]):
            picture = picture.resize((size[1], size[0]), Image.Resampling[self.resampling.upper()])
        x = torch.from_numpy(np.array(picture)).to(torch.float32)
        return x if x.ndim == 3 else x.unsqueeze(-1)

    def _bands(self, image_CHW: Tensor, size: tuple[int, int] | None) -> Tensor:
        """Bands as (H, W, C), as they are stored."""
        if image_CHW.dtype != torch.uint8 and "rescale" not in self.given:
            what, remedy = "is needed for images of more than 8 bits, whose range is not known", "such as 1 or 1/65535"
            raise InputError("--rescale", what, expected="what values are multiplied by", remedy=remedy)
        x_CHW = image_CHW.to(torch.float32)
        if size is not None and x_CHW.shape[1:] != size:
            resized = F.interpolate(x_CHW[None], size=size, mode="bilinear", antialias=True, align_corners=False)
            x_CHW = resized[0]
        return x_CHW.permute(1, 2, 0)

    @property
    def numbers(self) -> str:
        """What is done, and where it stands, in one line."""
        size = f"resize to {self.size[0]}x{self.size[1]}" if self.size else "no resize"
        size += f" ({self.resampling})" if self.size and self.resampling != "bilinear" else ""
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        scale = "" if abs(self.rescale * 255 - 1) < 1e-6 else f", pixels times {self.rescale:.4g}"
        order = self.channels if self.bands == 3 else "1 channel" if self.bands == 1 else f"{self.bands} channels"
        return f"{order}, {size}{scale}, mean {mean}, std {std} ({self.origin})"

    def __str__(self) -> str:
        return self.numbers + f"; assumed: if it was trained otherwise, say so, {PREPROCESS_FLAGS}" * self.assumed

    @classmethod
    def from_processor(cls, processor: Mapping[str, object], origin: str) -> "Preprocess":
        """The fields of a transformers image processor (its ``to_dict()``); a ValueError if one is not usable."""
        normalize = bool(processor.get("do_normalize")) and processor.get("image_mean") is not None
        factor = processor.get("rescale_factor")
        rescale = _floats(factor)[0] if processor.get("do_rescale", True) and factor is not None else 1.0
        reduce = processor.get("do_reduce_labels", processor.get("reduce_labels"))
        return cls(
            mean=_floats(processor["image_mean"]) if normalize else (0.0, 0.0, 0.0),
            std=_floats(processor["image_std"]) if normalize else (1.0, 1.0, 1.0),
            rescale=rescale,
            size=_processor_size(processor),
            resampling=_resampling(processor.get("resample")),
            channels="BGR" if processor.get("do_flip_channel_order") else "RGB",
            reduce_labels=None if reduce is None else bool(reduce),
            origin=origin + f", {_PROPORTIONS}" * _keeps_proportions(processor),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """Preprocessing as the user says it; None where the checkpoint's own holds."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    rescale: float | None = None
    channels: Literal["RGB", "BGR"] | None = None

    def given(self) -> dict[str, Any]:
        """The fields that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def over(self, found: Preprocess, origin: str = "") -> Preprocess:
        """`found`, of the checkpoint, with the fields that are set; `origin` says where they come from, else the flags.

        An InputError if the mean is given in other units than the pixels are rescaled to.
        """
        given = self.given()
        if not given:
            return found
        scaled = replace(found, **given, given=tuple(given))
        largest = 255 * scaled.rescale
        mean = max(map(abs, self.mean or (0.0,)))
        if self.rescale is None and mean and not largest / 255 < mean <= largest:
            what = f"is not in the units of the pixels, which reach {largest:.4g}"
            remedy = f"say what pixels are multiplied by: --rescale {'1' if mean > largest else '1/255'}"
            raise InputError("--mean", what, got=f"{mean:.4g}", remedy=remedy)
        names = " ".join("--channel-order" if name == "channels" else f"--{name}" for name in given)
        whole = len(given) == len(fields(self))
        where = origin or (names if whole else f"{names}; else {found.origin}")
        return replace(scaled, origin=where, assumed=found.assumed and not {"mean", "std", "rescale"} <= given.keys())

    @classmethod
    def read(cls, content: Mapping[str, Any], where: object) -> Self:
        """The fields of a JSON object; an InputError if it holds something else, or numbers that are not usable."""
        try:
            given: dict[str, Any] = {
                name: tuple(map(float, value)) if isinstance(value, list) else value for name, value in content.items()
            }
            override = cls(**given)
            numbers = [*(override.mean or ()), *(override.std or ()), given.get("rescale") or 1.0]
            if not all(map(math.isfinite, numbers)) or 0 in (override.std or ()):
                raise ValueError("numbers that are not usable")
            if override.channels not in (None, "RGB", "BGR"):
                raise ValueError(f"channels {override.channels!r}")
        except (TypeError, ValueError) as error:
            expected = '{"mean": [...], "std": [...], "rescale": ..., "channels": "RGB"}'
            raise InputError(where, f"is no record of a preprocessing ({error})", expected=expected) from error
        return override

    @classmethod
    def of(cls, preprocess: Preprocess) -> Self:
        """All fields of a preprocessing."""
        return cls(**{each.name: getattr(preprocess, each.name) for each in fields(cls)})


def _floats(values: object) -> tuple[float, ...]:
    """One finite number a channel."""
    each = values if isinstance(values, (list, tuple)) else (values,) * 3
    numbers = tuple(float(str(value)) for value in each)
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"three numbers are needed, not {values!r}")
    return numbers


def _resampling(value: object) -> str:
    """The name of one of PIL's filters; bilinear if the processor does not say."""
    return "bilinear" if value is None else Image.Resampling(int(str(value))).name.lower()


def _keeps_proportions(processor: Mapping[str, object]) -> bool:
    """Whether the processor resizes pictures to a side, or cuts them, where `Preprocess` brings them to one size."""
    size = processor.get("size")
    edge = isinstance(size, Mapping) and bool(size.get("shortest_edge"))
    return bool(processor.get("do_resize")) and (edge or bool(processor.get("keep_aspect_ratio")))


def _processor_size(processor: Mapping[str, object]) -> tuple[int, int] | None:
    """The size at the end of the processor's resize and crop; a shortest edge is taken as a square."""
    crop = processor.get("crop_size") if processor.get("do_center_crop") else None
    size = crop or (processor.get("size") if processor.get("do_resize") else None)
    if isinstance(size, int):
        size = {"shortest_edge": size}
    if not isinstance(size, Mapping):
        return None
    edge = size.get("shortest_edge")
    height, width = size.get("height", edge), size.get("width", edge)
    if not height or not width:
        return None
    if not (1 <= int(height) <= _LONGEST_SIDE and 1 <= int(width) <= _LONGEST_SIDE):
        raise ValueError(f"a size of {height} x {width} pixels; at most {_LONGEST_SIDE} a side are understood")
    return int(height), int(width)
