"""A pass over the images in fixed blocks, which several processes can share with the same result to the last bit.

Which images make a block depends on the images alone; process r of n takes the blocks r, r + n, ...; every process gets
the results of all blocks in their order. So nothing depends on n, and no image counts twice.
"""

import contextlib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, TypeVar

from equalize.moments.watch import Batch, images_in, inputs_of
from equalize.peers import ALONE, Peers

__all__ = ["ROUND", "Block", "Blocks", "Skip", "as_blocks", "each_block"]

ROUND = 4
"""Blocks between two looks at what is known so far, which is then the same in all processes."""

Skip = tuple[str, str]
"""The name of an image that could not be read, and why."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Some of the images.

    Attributes:
        index: its place among the blocks.
        batches: the network's own inputs.
        names: of the images, in the order of the batches.
        skipped: those that could not be read.
    """

    index: int
    batches: tuple[Batch, ...]
    names: Sequence[str] = ()
    skipped: tuple[Skip, ...] = ()


class Blocks(ABC):
    """Images in blocks; may be passed over more than once.

    Attributes:
        peers: the processes that share them.
        shapes: of the first batch's tensors, (N, C, H, W) each; None if not known.
        pixels: of all images together; 0 if not known.
    """

    peers: Peers = ALONE
    shapes: tuple[tuple[int, ...], ...] | None = None
    pixels: int = 0

    @abstractmethod
    def read(self, first: int, step: int) -> Generator[Block, None, None]:
        """The blocks `first`, `first + step`, ..."""

    def number(self) -> float:
        """Of blocks; infinite if not known, which one process alone can do with."""
        return math.inf

    def leave_out(self, skipped: Sequence[Skip]) -> None:  # noqa: B027
        """Is told which images, of all blocks that are done, could not be read; may refuse."""


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
                number, *sides = *self.shapes[0], 1
                self.pixels = len(batches) * number * math.prod(sides[1:])

    def read(self, first: int, step: int) -> Generator[Block, None, None]:
        assert (first, step) == (0, 1)
        done = 0
        for index, batch in enumerate(self._batches):
            until = done + images_in(batch)
            known = [self._names[image] if image < len(self._names) else str(image) for image in range(done, until)]
            yield Block(index=index, batches=(batch,), names=known)
            done = until


def as_blocks(batches: Iterable[Batch] | Blocks, names: Sequence[str] = ()) -> Blocks:
    """Blocks as they are; of anything else every batch is one, and `names` are those of its images in order."""
    return batches if isinstance(batches, Blocks) else _Batches(batches, names)


def each_block(
    blocks: Blocks,
    work: Callable[[Block], Callable[[], Result]],
    look: Callable[[Sequence[Result]], bool] | None = None,
) -> list[Result]:
    """Does the work on every block, by whichever process, and gives all results in the order of the blocks.

    Args:
        blocks: the images.
        work: begins the work on a block; what it returns waits for the result, of plain Python values and tensors on
            the CPU. It is called a few blocks later, so that an accelerator need not be waited for in between.
        look: sees after every `ROUND` blocks but the last ones the results so far, and says whether they are enough.

    Raises:
        PeerError, ResourceError: another process failed, or is gone.
    """
    total = blocks.number()
    results: list[Result] = []
    skipped: list[Skip] = []
    exchange = _Exchange(blocks.peers)
    with contextlib.closing(blocks.read(blocks.peers.rank, blocks.peers.number)) as stream:
        for start in itertools.count(0, ROUND):
            indices = range(start, int(min(start + ROUND, total)))
            exchange.put_all(_begun(stream, work, indices, blocks.peers))
            at_end = indices.stop == total or exchange.is_short_of(indices)
            if look is not None or at_end:
                for result, left_out in exchange.get_all(len(results), indices.stop):
                    results.append(result)
                    skipped += left_out
                blocks.leave_out(skipped)
            if at_end or (look is not None and look(results)):
                break
    exchange.clear(len(results))
    return results


def _begun(
    stream: Iterator[Block], work: Callable[[Block], Callable[[], Result]], indices: range, peers: Peers
) -> list[tuple[int, tuple[Skip, ...], Callable[[], Result]]]:
    """The work on this process's blocks among those of the indices, begun."""
    mine = sum(index % peers.number == peers.rank for index in indices)
    begun = []
    for block in itertools.islice(stream, mine):
        peers.demand_health()
        begun.append((block.index, block.skipped, work(block)))
    return begun


class _Exchange:
    """The results of one pass, of all processes."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._name = peers.name_of_pass()
        self._own: dict[int, tuple[Any, tuple[Skip, ...]]] = {}

    def put_all(self, begun: Sequence[tuple[int, tuple[Skip, ...], Callable[[], Any]]]) -> None:
        for index, skipped, wait in begun:
            self._own[index] = (wait(), skipped)
            self._peers.put(f"{self._name}/{index}", self._own[index])

    def is_short_of(self, indices: range) -> bool:
        """Whether the images ended within a round; their number is then known to their only process alone."""
        return self._peers.number == 1 and indices[-1] not in self._own

    def get_all(self, start: int, stop: int) -> Iterator[tuple[Any, tuple[Skip, ...]]]:
        """Results in order, waiting for those of other processes; each once."""
        for index in range(start, stop):
            if index % self._peers.number != self._peers.rank:
                yield self._peers.get(f"{self._name}/{index}")
            elif index in self._own:
                yield self._own.pop(index)

    def clear(self, number: int) -> None:
        """Frees what the store holds, once every process has it."""
        if self._peers.all_passed(f"{self._name}/passed"):
            for index in range(number):
                self._peers.forget(f"{self._name}/{index}")
