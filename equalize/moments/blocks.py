"""A pass over the images in fixed blocks, which several processes can share with the same result to the last bit.

Process r of n takes the blocks r, r + n, ...; every process gets the results of all in their order. So nothing depends
on n.
"""

import contextlib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from equalize.distributed import gather, rank_and_number
from equalize.moments.watch import Batch, images_in, inputs_of

FEWEST_IMAGES = 32
"""Images between two decisions whether to stop. Fewer are not reliable: on CamVid intervals then held the truth in 90
rather than 95 of 100 random subsets."""

_ROUND = 4  # blocks that a process works through before the results of all are gathered

Skip = tuple[str, str]
"""The name of an image that could not be read, and why."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Some of the images.

    Attributes:
        batches: the network's inputs. first: index of the first image in the pass.
        names: of the images, in order. skipped: those that could not be read.
        labels: for each batch, (N, H, W) of any integer type, see `covariance.CLASSES`; empty if there are none.
    """

    batches: tuple[Batch, ...]
    first: int = 0
    names: Sequence[str] = ()
    skipped: tuple[Skip, ...] = ()
    labels: tuple[Tensor, ...] = ()


class Blocks(ABC):
    """Images in blocks; may be passed over more than once.

    Attributes:
        shared: whether the processes of the group pass over them together.
        shapes: of the first batch's tensors, (N, C, H, W) each; None if not known. dtypes: theirs if not float32.
        pixels: of all images together; 0 if not known.
        between_decisions: blocks, where a pass may stop early; where their size is known, those of `FEWEST_IMAGES`.
    """

    shared: bool = False
    shapes: tuple[tuple[int, ...], ...] | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    pixels: int = 0
    between_decisions: int = 1

    @abstractmethod
    def read(self, first: int, step: int) -> Generator[Block, None, None]:
        """The blocks `first`, `first + step`, ..."""

    def number(self) -> float:
        """Of blocks; infinite if not known, which only a single process supports."""
        return math.inf

    def leave_out(self, skipped: Sequence[Skip]) -> None:  # noqa: B027
        """Receives the images that could not be read, of all blocks so far; may raise an InputError."""


class _Batches(Blocks):
    """Every batch a block, for one process."""

    def __init__(self, batches: Iterable[Batch], names: Sequence[str]) -> None:
        self._names = names
        self._batches = iter(batches)
        if isinstance(batches, Sized):
            first = next(self._batches, None)
            if first is not None:
                self._batches = itertools.chain([first], self._batches)
                self.shapes = tuple(tuple(tensor.shape) for tensor in inputs_of(first))
                self.dtypes = tuple(tensor.dtype for tensor in inputs_of(first))
                number, *sides = *self.shapes[0], 1
                self.pixels = len(batches) * number * math.prod(sides[1:])

    def read(self, first: int, step: int) -> Generator[Block, None, None]:
        assert (first, step) == (0, 1)
        done = 0
        for batch in self._batches:
            until = done + images_in(batch)
            known = [self._names[image] if image < len(self._names) else str(image) for image in range(done, until)]
            yield Block(batches=(batch,), first=done, names=known)
            done = until


def as_blocks(batches: Iterable[Batch] | Blocks, names: Sequence[str] = ()) -> Blocks:
    """Blocks as they are; of anything else every batch is one, and `names` are those of its images in order."""
    return batches if isinstance(batches, Blocks) else _Batches(batches, names)


class Round:
    """Consecutive blocks of a pass: iterating gives those of this process, `gather` the results of all.

    Once they are gathered, `is_last` says whether the pass ends with it.
    """

    def __init__(self, source: Blocks, blocks: Iterator[Block], indices: range, skipped: list[Skip]) -> None:
        rank, self._number = _sharing(source)
        self._source = source
        self._blocks = itertools.islice(blocks, sum(index % self._number == rank for index in indices))
        self._indices = indices
        self._own: list[tuple[Skip, ...]] = []
        self._skipped = skipped
        self.is_last = False

    def __iter__(self) -> Iterator[Block]:
        for block in self._blocks:
            self._own.append(block.skipped)
            yield block

    def gather(self, results: Sequence[Result]) -> list[Result]:
        """The results of all processes, in the order of the blocks; to be called once.

        Args:
            results: one for each block of this process: plain Python values and tensors on the CPU.

        Raises:
            PeerError, ResourceError: another process failed, or is gone.
            InputError: too many images could not be read.
        """
        own = list(zip(results, self._own, strict=True))
        parts = [iter(part) for part in (gather(own) if self._number > 1 else [own])]
        found = [pair for index in self._indices for pair in itertools.islice(parts[index % self._number], 1)]
        self.is_last = len(found) < len(self._indices) or self._indices.stop >= self._source.number()
        self._skipped += [skip for _, skipped in found for skip in skipped]
        self._source.leave_out(self._skipped)
        return [result for result, _ in found]


def rounds(blocks: Blocks, *, decides: bool) -> Generator[Round, None, None]:
    """One pass, in rounds of a few blocks.

    Where the next round `decides` on the results so far, rounds end after the same blocks for any number of processes.
    """
    rank, number = _sharing(blocks)
    size = blocks.between_decisions if decides else _ROUND * number
    skipped: list[Skip] = []
    with contextlib.closing(blocks.read(rank, number)) as stream:
        for start in itertools.count(0, size):
            current = Round(blocks, stream, range(start, int(min(start + size, blocks.number()))), skipped)
            yield current
            if current.is_last:
                break


def is_due(before: int, images: int) -> bool:
    """Whether to decide now that there are so many images, and were so many before the last round."""
    return before // FEWEST_IMAGES < images // FEWEST_IMAGES


def _sharing(blocks: Blocks) -> tuple[int, int]:
    """Rank and number of the processes that share the blocks."""
    return rank_and_number() if blocks.shared else (0, 1)
