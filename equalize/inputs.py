"""What is run through a network: which images, at what size, on which device, in which precision."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from equalize.checkpoint import Checkpoint
from equalize.data import DataSet, Item, batches, open_data, sample
from equalize.errors import DataError, InputError, ResourceError

__all__ = ["Images", "Measuring", "Progress", "device_of", "input_shape", "precision_of", "traced_shape"]

Progress = Callable[[int, int], None]
"""Called with the images done in this pass over them, and with all that there are."""

_DEFAULT_SIZE = (512, 512)
_PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measuring:
    """How the images are read and measured.

    Attributes:
        samples: how many images are drawn; None for all.
        tolerance: stop when the 95 % interval of every sigma is this tight.
        size: (H, W) that images are brought to; the checkpoint's own if None.
        skip_bad: share of images that may be unreadable.
    """

    samples: int | None = 256
    tolerance: float | None = None
    size: tuple[int, int] | None = None
    split: str | None = None
    batch_size: int = 8
    device: str = "auto"
    precision: str = "fp32"
    workers: int = 0
    skip_bad: float = 0.0
    seed: int = 0


class Images:
    """The images that are measured: iterable as often as needed, counted, named.

    Attributes:
        dataset: where they come from.
        paths: those drawn.
        names: of the images of the running pass, in the order they came.
    """

    def __init__(
        self, data: str | Path, checkpoint: Checkpoint, how: Measuring, progress: Progress = lambda done, of: None
    ) -> None:
        self.dataset: DataSet = open_data(data, split=how.split)
        self.paths = list(sample(self.dataset, how.samples, how.seed))
        if how.tolerance is not None:  # neighbours are alike: a run that stops early must have seen all kinds
            random.Random(how.seed).shuffle(self.paths)
        self.size = how.size or checkpoint.preprocess.size
        self._batches = batches(
            self.paths,
            checkpoint.preprocess,
            size=self.size,
            batch_size=how.batch_size,
            workers=how.workers,
            skip_bad=how.skip_bad,
        )
        self._batch_size = how.batch_size
        self.names: list[str] = []
        self._progress = progress

    @property
    def skipped(self) -> list[tuple[Item, str]]:
        """Images that could not be read, and why."""
        return [(path, reason) for path, reason in self._batches.skipped]

    def __len__(self) -> int:
        """About how many batches there are; sizes that differ make more."""
        return math.ceil(len(self.paths) / self._batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        self.names.clear()
        for batch in self._batches:
            self.names += [str(path) for path in batch.paths]
            self._progress(len(self.names), len(self.paths))
            yield batch.images


def input_shape(checkpoint: Checkpoint, size: tuple[int, int] | None) -> tuple[int, ...]:
    """What a network is traced with: two images of the size asked for, else the checkpoint's, else 512 x 512."""
    return (2, 3, *(size or checkpoint.preprocess.size or _DEFAULT_SIZE))


def device_of(name: str) -> torch.device:
    """The device of that name; "auto" is the accelerator if there is one.

    Raises:
        ResourceError: it is not there.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError("--device", "is no device", got=name, expected="auto, cpu, cuda, cuda:0, mps") from error
    if device.type not in {"cpu", getattr(accelerator, "type", "cpu")}:
        raise ResourceError("--device", f"there is no {device.type} device here", remedy="use --device cpu")
    return device


def precision_of(name: str, device: torch.device) -> torch.autocast:
    """The forward pass in that precision; moments are float32 and float64 whatever it is."""
    if name not in _PRECISIONS:
        raise InputError("--precision", "is unknown", got=name, expected=" or ".join(_PRECISIONS))
    dtype = _PRECISIONS[name]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def traced_shape(images: Images, checkpoint: Checkpoint) -> tuple[int, ...]:
    """The shape that the network is traced with: that of the images, two of them."""
    if images.size:
        return input_shape(checkpoint, images.size)
    first = next(iter(images), None)
    if first is None:
        raise DataError(images.dataset.root, "holds no readable image")
    return (2, *first.shape[1:])
