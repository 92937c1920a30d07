"""Small data sets with labels that can be learned: colored rectangles, a color a class."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_scenes(
    root: Path, classes: int, *, counts: dict[str | None, int], size: tuple[int, int] = (48, 64), seed: int = 0
) -> Path:
    """Writes images/[SPLIT/] and masks/[SPLIT/] with as many pairs a split; pixels on the top row are ignored (255)."""
    random = np.random.default_rng(seed)
    colors = np.linspace(0, 255, classes).astype(np.uint8)
    for split, count in counts.items():
        for number in range(count):
            labels = np.zeros(size, np.uint8)
            for _ in range(3):
                top, left = random.integers(0, size[0] // 2), random.integers(0, size[1] // 2)
                labels[top : top + size[0] // 2, left : left + size[1] // 2] = random.integers(0, classes)
            pixels = np.stack([colors[labels], colors[::-1][labels], random.integers(0, 60, size)], axis=-1)
            labels[0] = 255
            for kind, array in (("images", pixels.astype(np.uint8)), ("masks", labels)):
                path = root / kind / (split or "") / f"{number:03}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    return root
