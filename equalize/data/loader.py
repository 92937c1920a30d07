"""Pictures -> batches of tensors, read ahead while the last ones are computed with, with a share of bad files allowed.

N images a batch, H x W pixels.
"""

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from equalize.data.ahead import read_ahead
from equalize.data.cells import Item
from equalize.data.images import read_image
from equalize.errors import DataError, EqualizeError, InputError

Size = tuple[int, int] | None
"""(H, W), or None: as the checkpoint says, else the image's own."""

Preprocessor = Callable[[Image.Image, Size], Tensor]
"""What a checkpoint does to a picture: (RGB image, size) -> (3, H, W) float32."""

_HELD_BATCHES = 4
_READ_AHEAD = 2  # batches


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A fixed run of `paths` in batches.

    Attributes:
        index: its place among the groups.
        batches: of it alone.
        skipped: its bad files.
    """

    index: int
    batches: tuple[Batch, ...]
    skipped: tuple[Skipped, ...]


class Batches:
    """Batches of the images in `paths`; every pass reads them anew.

    Images that come out of `preprocess` with different sizes never share a batch. So `paths` is taken in groups, whose
    bounds depend on nothing that is read: a batch long where a size is given, else four batches, in which the images
    wait in one queue a size. So memory is bounded, and a folder of portraits and landscapes still makes full batches.
    With one size the order of `paths` is kept.

    Attributes:
        skipped: the bad files of the iteration that is running, or that ran last.
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
        pinned: bool = False,
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
        self._group = batch_size if size is not None else _HELD_BATCHES * batch_size
        self._workers = workers
        self._skip_bad = skip_bad
        self._pinned = pinned

    def __len__(self) -> int:
        """How many groups there are."""
        return math.ceil(len(self.paths) / self._group)

    def __iter__(self) -> Iterator[Batch]:
        """Read, preprocess and group.

        Raises:
            DataError: more files are bad than `skip_bad` allows.
            ResourceError: a worker died.
        """
        self.skipped = []
        with self._read(range(len(self.paths))) as items:
            for group in range(len(self)):
                yield from self._batches(self._indices(group), items, self.skipped)

    def groups(self, first: int = 0, step: int = 1) -> Generator[Group, None, None]:
        """The groups `first`, `first + step`, ...; their bad files are counted against those of this iteration alone.

        Raises:
            DataError, ResourceError: as iterating.
        """
        places = range(first, len(self), step)
        every: list[Skipped] = []
        with self._read([index for place in places for index in self._indices(place)]) as items:
            for place in places:
                before = len(every)
                found = tuple(self._batches(self._indices(place), items, every))
                yield Group(index=place, batches=found, skipped=tuple(every[before:]))

    def _indices(self, group: int) -> range:
        return range(group * self._group, min((group + 1) * self._group, len(self.paths)))

    def _batches(
        self, indices: Sequence[int], items: Iterator[Tensor | EqualizeError], skipped: list[Skipped]
    ) -> Iterator[Batch]:
        """Those of one group, as soon as they are full; takes as many items as there are indices."""
        waiting: dict[torch.Size, list[tuple[Item, Tensor]]] = {}
        for index in indices:
            path, item = self.paths[index], next(items)
            if isinstance(item, Tensor):
                queue = waiting.setdefault(item.shape, [])
                queue.append((path, item))
                if len(queue) == self._batch_size:
                    yield self._stack(waiting.pop(item.shape))
            elif isinstance(item, DataError):
                self._skip(path, item, skipped)
            else:
                raise item
        yield from map(self._stack, waiting.values())

    def _stack(self, queue: list[tuple[Item, Tensor]]) -> Batch:
        images = torch.empty((len(queue), *queue[0][1].shape), pin_memory=self._pinned)
        torch.stack([image for _, image in queue], out=images)
        return Batch(images=images, paths=tuple(path for path, _ in queue))

    def _skip(self, path: Item, error: DataError, skipped: list[Skipped]) -> None:
        if self._skip_bad == 0:
            error.remedy = error.remedy or "repair or remove it, or allow a share of bad images with --skip-bad"
            raise error
        skipped.append(Skipped(path, str(error).removeprefix(f"{path}: ")))
        self.demand_few([(str(path), reason) for path, reason in skipped])

    def demand_few(self, skipped: Sequence[tuple[str, str]]) -> None:
        """Refuses more bad files, by name and reason, than the share that is allowed.

        Raises:
            DataError: names the first that is one too many.
        """
        # Rounded up, so that any share above 0 allows one bad image in a small folder; 1e-9 is for 0.01 * 700 > 7.
        allowed = min(math.ceil(self._skip_bad * len(self.paths) - 1e-9), len(self.paths) - 1)
        if len(skipped) > allowed:
            path, reason = skipped[allowed]
            raise DataError(
                path,
                f"is bad image number {allowed + 1} of {len(self.paths)} ({reason})",
                expected=f"at most {allowed} (--skip-bad {self._skip_bad:g})",
                remedy="repair or remove them, or allow a larger share",
            )

    def _read(self, indices: Sequence[int]) -> "contextlib.closing[Generator[Tensor | EqualizeError, None, None]]":
        """The images of these places in `paths`, or why they cannot be read, in order."""
        return read_ahead(self._reader, indices, workers=self._workers, ahead=_READ_AHEAD * self._batch_size)


def batches(
    paths: Sequence[Item],
    preprocess: Preprocessor,
    *,
    size: Size = None,
    batch_size: int,
    workers: int = 0,
    skip_bad: float = 0.0,
    pinned: bool = False,
) -> Batches:
    """Batches of the images in `paths`, an iterable that can be passed over several times.

    Args:
        paths: files or cells, as from `sample`.
        preprocess: makes a (3, H, W) tensor of an RGB picture; with workers on a platform that does not fork, it must
            pickle.
        size: (H, W) handed to `preprocess`.
        batch_size: the most images in a batch; images of different sizes never share one.
        workers: processes that read; with 0 a thread of this one does.
        skip_bad: share of `paths`, rounded up, that may be unreadable; they end up in ``.skipped``. At 0 the first bad
            file is an error.
        pinned: put batches into memory that a CUDA device copies from by itself.

    Raises:
        InputError: an argument is out of range.
    """
    return Batches(
        paths, preprocess, size=size, batch_size=batch_size, workers=workers, skip_bad=skip_bad, pinned=pinned
    )


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
