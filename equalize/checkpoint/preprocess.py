"""`Preprocess`: how a checkpoint's images are resized and normalized; callable on a PIL image."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Preprocess"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_LONGEST_SIDE = 4096  # pixels; the limit for a size in a file, not for --size


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocess:
    """Resizes, scales and normalizes an image as in the checkpoint's training.

    A pixel x in 0..255 becomes ``(x * rescale - mean) / std``, per channel in the order ``channels``.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    """Per channel, in the units of the rescaled pixel."""
    std: tuple[float, ...] = IMAGENET_STD
    rescale: float = 1 / 255
    size: tuple[int, int] | None = None
    """(height, width) to resize to; None leaves images as they are."""
    channels: Literal["RGB", "BGR"] = "RGB"
    reduce_labels: bool | None = None
    """Whether label 0 is background to be ignored, as ADE20K models have it; None if unknown."""
    origin: str = "ImageNet defaults"
    """Where the numbers come from."""

    def __call__(self, image: Image.Image, size: tuple[int, int] | None = None) -> Tensor:
        """Turn an RGB image into the (3, H, W) float32 input of the model.

        Args:
            image: the picture; any mode but RGB is converted.
            size: (height, width) instead of the checkpoint's own; the resize is bilinear with antialiasing.
        """
        height_width = size or self.size
        picture = image if image.mode == "RGB" else image.convert("RGB")
        if height_width is not None and picture.size != (height_width[1], height_width[0]):
            picture = picture.resize((height_width[1], height_width[0]), Image.Resampling.BILINEAR)
        x_HWC = torch.from_numpy(np.array(picture)).to(torch.float32)
        if self.channels == "BGR":
            x_HWC = x_HWC.flip(-1)
        x_HWC = (x_HWC * self.rescale - torch.tensor(self.mean)) / torch.tensor(self.std)
        return x_HWC.permute(2, 0, 1).contiguous()

    def __str__(self) -> str:
        size = f"resize to {self.size[0]}x{self.size[1]}" if self.size else "no resize"
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        scale = "" if abs(self.rescale * 255 - 1) < 1e-6 else f", pixels times {self.rescale:.4g}"
        return f"{self.channels}, {size}{scale}, mean {mean}, std {std} ({self.origin})"

    @classmethod
    def from_processor(cls, processor: Mapping[str, object], origin: str) -> "Preprocess":
        """Read the fields of a transformers image processor (its ``to_dict()``).

        Raises:
            ValueError: a mean, std or size that is not usable.
        """
        normalize = bool(processor.get("do_normalize")) and processor.get("image_mean") is not None
        factor = processor.get("rescale_factor")
        rescale = _floats(factor)[0] if processor.get("do_rescale", True) and factor is not None else 1.0
        reduce = processor.get("do_reduce_labels", processor.get("reduce_labels"))
        return cls(
            mean=_floats(processor["image_mean"]) if normalize else (0.0, 0.0, 0.0),
            std=_floats(processor["image_std"]) if normalize else (1.0, 1.0, 1.0),
            rescale=rescale,
            size=_processor_size(processor),
            channels="BGR" if processor.get("do_flip_channel_order") else "RGB",
            reduce_labels=None if reduce is None else bool(reduce),
            origin=origin,
        )


def _floats(values: object) -> tuple[float, ...]:
    """One finite number a channel."""
    each = values if isinstance(values, (list, tuple)) else (values,) * 3
    numbers = tuple(float(str(value)) for value in each)
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"three numbers are needed, not {values!r}")
    return numbers


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
