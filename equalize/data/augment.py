"""Pictures as training sees them: resized, cropped, flipped and discoloured at random, each time the same way.

The pipeline of mmsegmentation (`RandomResize`, `RandomCrop(cat_max_ratio=0.75)`, `RandomFlip`,
`PhotoMetricDistortion`, padding after normalisation) on torchvision.transforms.v2. H x W pixels.
"""

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

_CROPS_TRIED = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Augment:
    """What is done to a picture and its labels before training sees them.

    Attributes:
        crop: (H, W) of what comes out at most; smaller pictures stay smaller, see `pad`.
        base: (H, W) that a picture is brought to before the random factor; its own size if None.
        ignore_index: the label that `cat_max_ratio` does not count.
        scale: smallest and largest random factor.
        cat_max_ratio: a crop of which one class takes a larger share is drawn again, ten times at most.
        flip: probability of left and right exchanged.
        photometric: whether brightness, contrast, saturation and hue vary, each with probability 1/2.
    """

    crop: tuple[int, int]
    base: tuple[int, int] | None = None
    ignore_index: int = 255
    scale: tuple[float, float] = (0.5, 2.0)
    cat_max_ratio: float = 0.75
    flip: float = 0.5
    photometric: bool = True
    _pipeline: v2.Transform = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        steps: list[nn.Module] = [
            _RandomResize(self.base, self.scale),
            _RandomCrop(self.crop, self.ignore_index, self.cat_max_ratio),
            v2.RandomHorizontalFlip(self.flip),
        ]
        object.__setattr__(self, "_pipeline", v2.Compose(steps + (_photometric() if self.photometric else [])))

    def __call__(self, image: Image.Image, labels_HW: Tensor, seed: int) -> tuple[Image.Image, Tensor]:
        """A picture and its labels (H, W) -> the same pair under the random draws of `seed`.

        The global random numbers are left as they were.
        """
        generator = torch.default_generator  # torch.manual_seed would reseed the accelerators as well
        before = generator.get_state()
        try:
            generator.manual_seed(seed)
            picture, labels = self._pipeline(tv_tensors.Image(image), tv_tensors.Mask(labels_HW))
        finally:
            generator.set_state(before)
        return v2.functional.to_pil_image(picture), labels.as_subclass(Tensor)


def draw_seed(seed: int, epoch: int, index: int) -> int:
    """The seed of one picture in one epoch: the same whoever asks, in whatever order."""
    return random.Random(f"{seed} {epoch} {index}").getrandbits(63)


def pad(image_CHW: Tensor, labels_HW: Tensor, crop: tuple[int, int], ignore_index: int) -> tuple[Tensor, Tensor]:
    """Fills up to `crop` at the right and the bottom: 0, the mean of normalised pixels, under ignored labels."""
    height, width = labels_HW.shape
    border = (0, max(0, crop[1] - width), 0, max(0, crop[0] - height))
    return nn.functional.pad(image_CHW, border), nn.functional.pad(labels_HW, border, value=ignore_index)


class _RandomResize(v2.Transform):  # type: ignore[misc]
    """To the base size, or the picture's own, times a factor drawn uniformly."""

    def __init__(self, base: tuple[int, int] | None, scale: tuple[float, float]) -> None:
        super().__init__()
        self._base = base
        self._scale = scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        factor = float(torch.empty(1).uniform_(*self._scale))
        base = self._base or v2.functional.get_size(flat_inputs[0])
        return {"size": [max(1, round(side * factor)) for side in base]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return v2.functional.resize(inpt, params["size"], antialias=True)


class _RandomCrop(v2.Transform):  # type: ignore[misc]
    """A window of which no class takes more than a share, if one is found."""

    def __init__(self, crop: tuple[int, int], ignore_index: int, cat_max_ratio: float) -> None:
        super().__init__()
        self._crop = crop
        self._ignore_index = ignore_index
        self._cat_max_ratio = cat_max_ratio

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        labels_HW = next(each for each in flat_inputs if isinstance(each, tv_tensors.Mask)).as_subclass(Tensor)
        window = self._draw(labels_HW)
        for _ in range(_CROPS_TRIED):
            if self._cat_max_ratio >= 1 or self._is_varied(labels_HW, window):
                break
            window = self._draw(labels_HW)
        return window

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return v2.functional.crop(inpt, **params)

    def _draw(self, labels_HW: Tensor) -> dict[str, Any]:
        height, width = (min(side, most) for side, most in zip(labels_HW.shape, self._crop, strict=True))
        top = int(torch.randint(labels_HW.shape[0] - height + 1, ()))
        left = int(torch.randint(labels_HW.shape[1] - width + 1, ()))
        return {"top": top, "left": left, "height": height, "width": width}

    def _is_varied(self, labels_HW: Tensor, window: dict[str, Any]) -> bool:
        inside = v2.functional.crop(labels_HW[None], **window)
        pixels = torch.unique(inside[inside != self._ignore_index], return_counts=True)[1]
        return len(pixels) > 1 and bool(pixels.max() < self._cat_max_ratio * pixels.sum())


def _photometric() -> list[nn.Module]:
    """mmsegmentation's ranges: brightness 32 of 255, contrast and saturation 0.5 to 1.5, hue 18 of 360 degrees."""
    jitters = (
        v2.ColorJitter(brightness=32 / 255),
        v2.ColorJitter(contrast=(0.5, 1.5)),
        v2.ColorJitter(saturation=(0.5, 1.5)),
        v2.ColorJitter(hue=18 / 360),
    )
    return [v2.RandomApply([jitter], p=0.5) for jitter in jitters]
