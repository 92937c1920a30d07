"""Sharing blocks: every process gets the results of all, in order, however many there are."""

import itertools
import json

import pytest
import torch

from equalize.distributed import joined, rank_and_number
from equalize.errors import DataError, PeerError
from equalize.moments.blocks import Block, Blocks, as_blocks, is_due, rounds
from tests.support.side_by_side import in_processes

ROUND = 4
NUMBERS = [0, 1, 3, 4, 5, 11, 100]


class Numbers(Blocks):
    """Block i holds the number i, and says that image i was skipped where i is a multiple of 5; notes what was read."""

    shared = True
    between_decisions = ROUND

    def __init__(self, number: int, allowed: int = 1000) -> None:
        self._number = number
        self._allowed = allowed
        self.taken: list[int] = []
        self.skipped: list[str] = []

    def number(self) -> int:
        return self._number

    def read(self, first, step):
        for index in range(first, self._number, step):
            self.taken.append(index)
            bad = () if index % 5 else ((str(index), "cannot be read"),)
            yield Block(first=index, batches=(torch.tensor([float(index)]),), skipped=bad)

    def leave_out(self, skipped):
        self.skipped = [name for name, _ in skipped]
        if len(skipped) > self._allowed:
            raise DataError(self.skipped[self._allowed], "is one too many")


def squares(numbers: Numbers, *, decides: bool, enough: int | None = None) -> list[tuple[int, float]]:
    """(i, i squared) of every block of a pass; stops once there are enough."""
    results: list[tuple[int, float]] = []
    for part in rounds(numbers, decides=decides):
        results += part.gather([(block.first, float(block.batches[0]) ** 2) for block in part])
        if enough is not None and len(results) >= enough:
            break
    return results


def share(folder):
    """Run in each of several processes."""
    with joined(lambda error: 2):
        rank, _ = rank_and_number()
        found = {}
        for number in NUMBERS:
            for decides in (False, True):
                numbers = Numbers(number)
                results = squares(numbers, decides=decides)
                found[f"{number} {decides}"] = [results, numbers.taken, numbers.skipped]
        numbers = Numbers(100)
        found["enough"] = [squares(numbers, decides=True, enough=ROUND + 1), numbers.taken, numbers.skipped]
        with pytest.raises((DataError, PeerError)):
            squares(Numbers(100, allowed=2), decides=False)
        (folder / f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_all_results_in_order_and_every_block_once(number, tmp_path):
    assert in_processes(number, share, tmp_path) == [0] * number
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(number)]
    for case in found[0]:
        every = ROUND * 2 if case == "enough" else int(case.split()[0])
        taken = sorted(index for each in found for index in each[case][1])
        for results, _, skipped in (each[case] for each in found):
            assert results == [[index, index**2] for index in range(every)]
            assert skipped == [str(index) for index in range(0, every, 5)]
        assert taken == list(range(every))


def test_an_own_stream_is_not_shared_and_its_length_may_be_unknown():
    batches = (torch.full((2, 1), float(index)) for index in range(6))
    names: list[list[str]] = []
    for part in rounds(as_blocks(batches, ["a", "b", "c"]), decides=False):
        names += part.gather([list(block.names) for block in part])
    assert names == [["a", "b"], ["c", "3"], ["4", "5"], ["6", "7"], ["8", "9"], ["10", "11"]]


def test_blocks_are_read_as_they_are_worked_on_and_results_belong_to_blocks():
    numbers = Numbers(ROUND + 1)
    passed = rounds(numbers, decides=False)
    part = next(passed)
    blocks = iter(part)
    next(blocks)
    assert numbers.taken == [0]
    with pytest.raises(ValueError, match="argument"):
        part.gather([1, 2])


def test_too_many_that_cannot_be_read_are_refused_after_their_round():
    numbers = Numbers(100, allowed=1)
    with pytest.raises(DataError, match=r"^5: is one too many"):
        squares(numbers, decides=False)
    assert len(numbers.taken) == 2 * ROUND


def test_decisions_come_with_another_32_images_whatever_the_batches_are():
    for size in (1, 5, 8, 32, 40):
        counts = range(0, 200, size)
        due = [now for before, now in itertools.pairwise(counts) if is_due(before, now)]
        assert len(due) == max(counts) // max(size, 32)
        assert all(now % 32 < size for now in due)
