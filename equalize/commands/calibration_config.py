"""Which images a network is measured on, and how they are read."""

from dataclasses import dataclass
from pathlib import Path

from equalize.data.label_check import ReduceLabels
from equalize.data.masks import DrawnOn
from equalize.plan.indicator import Optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationConfig:
    """Which images are measured, and how."""

    samples: int | None = 256
    """How many are drawn, and measured at most; None for all."""
    tolerance: float = 0.05
    """Stop when the 95 % interval of every sigma is this tight, relative to it; 0 to measure all that are drawn."""
    size: tuple[int, int] | None = None
    """(H, W) that images are brought to; the checkpoint's own if None."""
    split: str | None = None
    batch_size: int | None = None
    """None for at most 8 images, and at most 4 megapixels."""
    device: str = "auto"
    precision: str = "fp32"
    workers: int | None = None
    """Processes that read images; None for a few where there is an accelerator, else none."""
    skip_bad: float | None = None
    """Share of the images that may be unreadable; None where the command has no such flag."""
    ignore_index: int | None = None
    """The label of pixels that do not count; None for 255, unless masks hold 0 and 255 alone."""
    reduce_labels: ReduceLabels = "auto"
    """Whether those of label 0 do not count either."""
    colors: str | Path | None = None
    """A file with the colors of classes, or ``none``; one in the data if None."""
    masks_drawn_on: DrawnOn = "auto"
    """Which way up masks are whose images alone have an EXIF orientation."""
    optimizer: Optimizer = "adamw"
    """What the network will be trained with: by it the indicator tells whether something is to be gained."""
    seed: int = 0
