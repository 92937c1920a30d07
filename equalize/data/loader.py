"""Pictures -> batches of tensors, read by worker processes if asked for, with a share of bad files allowed.

N images a batch, H x W pixels.
"""

import math
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError, EqualizeError, InputError, ResourceError
from .cells import Item
from .images import read_image

Size = tuple[int, int] | None
"""(H, W), or None: as the checkpoint says, else the image's own."""

Preprocessor = Callable[[Image.Image, Size], Tensor]
"""What a checkpoint does to a picture: (RGB image, size) -> (3, H, W) float32."""

_HELD_BATCHES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Images of one size.

    Attributes:
        images: (N, 3, H, W) float32.
        paths: where each of the N came from.
    """

    images: Tensor
    paths: tuple[Item, ...]


class Skipped(NamedTuple):
    """An image that could not be read, and why."""

    path: Item
    reason: str


class Batches:
    """Batches of the images in `paths`; every `iter()` reads them anew.

    Images that come out of `preprocess` with different sizes never share a batch: they wait in one queue a size, and
    when `_HELD_BATCHES` batches are waiting in all, the oldest queue leaves although it is short. So memory is bounded,
    and a folder of portraits and landscapes still makes full batches. With one size the order of `paths` is kept.

    Attributes:
        skipped: the bad files of the pass that is running, or that ran last.
    """

    def __init__(
        self,
        paths: Sequence[Item],
        preprocess: Preprocessor,
        *,
        size: Size = None,
        batch_size: int,
        workers: int = 0,
        skip_bad: float = 0.0,
    ) -> None:
        if batch_size < 1:
            raise InputError("batch_size", "out of range", got=batch_size, expected="at least 1")
        if workers < 0:
            raise InputError("workers", "out of range", got=workers, expected="0 or more")
        if not 0 <= skip_bad <= 1:
            raise InputError("skip_bad", "is not a share", got=skip_bad, expected="0 to 1")
        self.paths = tuple(paths)
        self.skipped: list[Skipped] = []
        self._reader = _Reader(self.paths, preprocess, size)
        self._batch_size = batch_size
        self._workers = workers
        self._skip_bad = skip_bad

    def __iter__(self) -> Iterator[Batch]:
        """Read, preprocess and group.

        Raises:
            DataError: more files are bad than `skip_bad` allows.
            ResourceError: a worker died.
        """
        self.skipped = []
        waiting: dict[torch.Size, list[tuple[Item, Tensor]]] = {}
        for path, image in self._read():
            queue = waiting.setdefault(image.shape, [])
            queue.append((path, image))
            if len(queue) == self._batch_size:
                yield _stack(waiting.pop(image.shape))
            elif sum(map(len, waiting.values())) >= _HELD_BATCHES * self._batch_size:
                yield _stack(waiting.pop(next(iter(waiting))))
        yield from map(_stack, waiting.values())

    def _read(self) -> Iterator[tuple[Item, Tensor]]:
        """The images that can be read, one by one, in the order of `paths`."""
        for path, item in zip(self.paths, _survive_dead_workers(self._loader()), strict=True):
            if isinstance(item, Tensor):
                yield path, item
            elif isinstance(item, DataError):
                self._skip(path, item)
            else:
                raise item

    def _skip(self, path: Item, error: DataError) -> None:
        if self._skip_bad == 0:
            error.remedy = error.remedy or "repair or remove it, or allow a share of bad images with --skip-bad"
            raise error
        self.skipped.append(Skipped(path, str(error).removeprefix(f"{path}: ")))
        # Rounded up, so that any share above 0 allows one bad image in a small folder; 1e-9 is for 0.01 * 700 > 7.
        allowed = math.ceil(self._skip_bad * len(self.paths) - 1e-9)
        if len(self.skipped) > allowed or len(self.skipped) == len(self.paths):
            raise DataError(
                path,
                f"is bad image number {len(self.skipped)} of {len(self.paths)} ({self.skipped[-1].reason})",
                expected=f"at most {allowed} (--skip-bad {self._skip_bad:g})",
                remedy="repair or remove them, or allow a larger share",
            ) from error

    def _loader(self) -> "DataLoader[Tensor | EqualizeError]":
        """One image a step; the start method of processes is the platform's, as everywhere in PyTorch."""
        ahead = 2 * self._batch_size  # images, so that workers fill the next batches while one is being computed
        return DataLoader(
            self._reader,
            batch_size=None,
            collate_fn=_as_is,
            num_workers=self._workers,
            prefetch_factor=max(2, math.ceil(ahead / self._workers)) if self._workers else None,
            worker_init_fn=_leave_interrupts_to_parent,
            generator=torch.Generator(),  # else each pass would draw from the global random numbers
        )


def batches(
    paths: Sequence[Item],
    preprocess: Preprocessor,
    *,
    size: Size = None,
    batch_size: int,
    workers: int = 0,
    skip_bad: float = 0.0,
) -> Batches:
    """Batches of the images in `paths`, an iterable that can be passed over several times.

    Args:
        paths: files or cells, as from `sample`.
        preprocess: makes a (3, H, W) tensor of an RGB picture; with workers on a platform that does not fork, it must
            pickle.
        size: (H, W) handed to `preprocess`.
        batch_size: the most images in a batch; images of different sizes never share one.
        workers: processes that read; 0 reads in this one.
        skip_bad: share of `paths`, rounded up, that may be unreadable; they end up in ``.skipped``. At 0 the first bad
            file is an error.

    Raises:
        InputError: an argument is out of range.
    """
    return Batches(paths, preprocess, size=size, batch_size=batch_size, workers=workers, skip_bad=skip_bad)


class _Reader(Dataset[Tensor | EqualizeError]):
    """Errors of ours come back as values: torch cannot carry them from a worker, having only their message."""

    def __init__(self, paths: tuple[Item, ...], preprocess: Preprocessor, size: Size) -> None:
        self._paths = paths
        self._preprocess = preprocess
        self._size = size

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Tensor | EqualizeError:
        try:
            return self._preprocess(read_image(self._paths[index]), self._size)
        except EqualizeError as error:
            return error


def _survive_dead_workers(items: Iterable[Tensor | EqualizeError]) -> Iterator[Tensor | EqualizeError]:
    try:
        yield from items
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise ResourceError(
            "workers",
            "a process that reads images was killed, most often for want of memory or shared memory",
            remedy="use fewer --workers, or none, or smaller batches",
        ) from error


def _stack(queue: list[tuple[Item, Tensor]]) -> Batch:
    return Batch(images=torch.stack([image for _, image in queue]), paths=tuple(path for path, _ in queue))


def _as_is(item: Any) -> Any:
    return item


def _leave_interrupts_to_parent(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the parent alone answers it and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
