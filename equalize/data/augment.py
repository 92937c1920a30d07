"""Random augmentation for training (resize, crop, flip, color), reproducible from a seed.

The pipeline of mmsegmentation (`RandomResize`, `RandomCrop(cat_max_ratio=0.75)`, `RandomFlip`,
`PhotoMetricDistortion`, padding after normalization) on torchvision.transforms.v2. H x W pixels.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from equalize.data.bands import Picture
from equalize.seeded import seeded

_CROPS_TRIED = 10
# As mmsegmentation varies the colors.
_RANGES = {"brightness": 32 / 255, "contrast": (0.5, 1.5), "saturation": (0.5, 1.5), "hue": 18 / 360}
_PHOTOMETRIC = v2.Compose([v2.RandomApply([v2.ColorJitter(**{name: by})], p=0.5) for name, by in _RANGES.items()])


@dataclass(frozen=True, slots=True, kw_only=True)
class Augment:
    """The augmentation of an image and its labels.

    Attributes:
        crop: (H, W) of what comes out at most; smaller pictures stay smaller, see `pad`.
        base: (H, W) that a picture is brought to before the random factor; its own size if None.
        ignore_index: the label that `cat_max_ratio` does not count.
        scale: smallest and largest random factor.
        cat_max_ratio: a crop of which one class takes a larger share is drawn again, ten times at most.
        flip: probability of left and right exchanged.
        photometric: whether brightness, contrast, saturation and hue vary, each with probability 1/2; not of bands.
    """

    crop: tuple[int, int]
    base: tuple[int, int] | None = None
    ignore_index: int = 255
    scale: tuple[float, float] = (0.5, 2.0)
    cat_max_ratio: float = 0.75
    flip: float = 0.5
    photometric: bool = True

    def __call__(self, image: Picture, labels_HW: Tensor, seed: int) -> tuple[Picture, Tensor]:
        """A picture and its labels (H, W) -> the augmented pair, labels (h, w), from the random draws of `seed`.

        The global random numbers are left as they were.
        """
        with seeded(seed):
            flipped = float(torch.rand(())) < self.flip  # first, so that `flips` need draw nothing else
            factor = float(torch.empty(1).uniform_(*self.scale))
            size = [max(1, round(side * factor)) for side in self.base or labels_HW.shape]
            picture = F.resize(tv_tensors.Image(image), size, antialias=True)
            labels = F.resize(tv_tensors.Mask(labels_HW), size)
            window = self._draw_window(labels.as_subclass(Tensor))
            picture, labels = F.crop(picture, *window), F.crop(labels, *window)
            if flipped:
                picture, labels = F.horizontal_flip(picture), F.horizontal_flip(labels)
            whole = picture.as_subclass(Tensor) if isinstance(image, Tensor) else F.to_pil_image(picture)
            if self.photometric and not isinstance(whole, Tensor):
                whole = _PHOTOMETRIC(whole)  # three times as fast on PIL's images as on tensors
        return whole, labels.as_subclass(Tensor)

    def flips(self, seed: int) -> bool:
        """Whether the pair of this seed is flipped."""
        return float(torch.rand((), generator=torch.Generator().manual_seed(seed))) < self.flip

    def _draw_window(self, labels_HW: Tensor) -> tuple[int, int, int, int]:
        """Top, left, height and width of a crop of which no class takes more than its share, if one is found."""
        height, width = (min(side, most) for side, most in zip(labels_HW.shape, self.crop, strict=True))
        for _ in range(1 + _CROPS_TRIED):
            top = int(torch.randint(labels_HW.shape[0] - height + 1, ()))
            left = int(torch.randint(labels_HW.shape[1] - width + 1, ()))
            if self.cat_max_ratio >= 1 or self._is_varied(labels_HW[top : top + height, left : left + width]):
                break
        return top, left, height, width

    def _is_varied(self, labels_HW: Tensor) -> bool:
        pixels = torch.bincount(labels_HW[labels_HW != self.ignore_index])
        return bool((pixels > 0).sum() > 1 and pixels.max() < self.cat_max_ratio * pixels.sum())


def draw_seed(seed: int, epoch: int, index: int) -> int:
    """The seed of one image in one epoch, independent of process and order."""
    return random.Random(f"{seed} {epoch} {index}").getrandbits(63)


def pad(image_CHW: Tensor, labels_HW: Tensor, size: tuple[int, int], ignore_index: int) -> tuple[Tensor, Tensor]:
    """Pads (C, H, W) and (H, W) to `size` at the right and bottom with 0 (the normalized mean) and ignored labels."""
    height, width = labels_HW.shape
    border = (0, max(0, size[1] - width), 0, max(0, size[0] - height))
    return nn.functional.pad(image_CHW, border), nn.functional.pad(labels_HW, border, value=ignore_index)
