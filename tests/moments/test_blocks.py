"""Sharing blocks: every process gets the results of all, in order, however many there are. Threads stand for them."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from equalize import peers as peers_module
from equalize.errors import PeerError, ResourceError
from equalize.moments.blocks import ROUND, Block, Blocks, as_blocks, each_block
from equalize.peers import Peers


class Numbers(Blocks):
    """Block i holds the number i; notes what was read."""

    def __init__(self, number: int, peers: Peers) -> None:
        self._number = number
        self.peers = peers
        self.taken: list[int] = []

    def number(self) -> int:
        return self._number

    def read(self, first, step):
        for index in range(first, self._number, step):
            self.taken.append(index)
            yield Block(index=index, batches=(torch.tensor([float(index)]),))


def in_threads(number: int, work: Callable[[Peers], Any]) -> list[Any]:
    """What `work` returns, or raises, for each of so many processes."""
    store = HashStore()
    ended: dict[int, Any] = {}

    def one(rank: int) -> None:
        try:
            ended[rank] = work(Peers(rank, number, store))
        except Exception as error:
            ended[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [ended[rank] for rank in range(number)]


def square(block: Block) -> Callable[[], list[Any]]:
    return lambda: [block.index, block.batches[0] ** 2]


@pytest.mark.parametrize("blocks", [0, 1, 3, 4, 11])
@pytest.mark.parametrize("number", [1, 2, 3, 5])
@pytest.mark.parametrize("looks", [False, True])
def test_all_results_in_order_and_every_block_once(blocks, number, looks):
    def work(peers):
        numbers = Numbers(blocks, peers if number > 1 else Peers())
        seen: list[int] = []
        results = each_block(numbers, square, (lambda found: seen.append(len(found))) if looks else None)
        return [(index, float(value)) for index, value in results], numbers.taken, seen

    ended = in_threads(number, work)
    for results, _, seen in ended:
        assert results == [(index, index**2) for index in range(blocks)]
        assert seen == (list(range(ROUND, blocks, ROUND)) if looks else [])  # at the end nothing is decided
    assert sorted(index for _, taken, _ in ended for index in taken) == list(range(blocks))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_all_stop_after_the_same_round(number):
    def work(peers):
        numbers = Numbers(100, peers if number > 1 else Peers())
        return len(each_block(numbers, square, lambda found: len(found) > ROUND)), numbers.taken

    ended = in_threads(number, work)
    assert [results for results, _ in ended] == [2 * ROUND] * number
    assert max(index for _, taken in ended for index in taken) < 2 * ROUND


def test_nothing_stays_in_the_store():
    stores = []

    def work(peers):
        stores.append(peers._store)
        for _ in range(2):
            each_block(Numbers(9, peers), square)

    assert in_threads(2, work) == [None, None]
    assert stores[0].num_keys() == 2  # how many have passed, each time


def test_results_are_waited_for_a_round_later_so_that_work_can_run_ahead():
    log: list[str] = []

    def begin(block):
        log.append(f"begin {block.index}")
        return lambda: log.append(f"wait {block.index}")

    each_block(Numbers(ROUND + 1, Peers()), begin)
    first = [f"{what} {index}" for what in ("begin", "wait") for index in range(ROUND)]
    assert log == [*first, f"begin {ROUND}", f"wait {ROUND}"]


def test_the_end_of_a_stream_of_unknown_length():
    batches = (torch.full((2, 1), float(index)) for index in range(6))
    found = each_block(as_blocks(batches, ["a", "b", "c"]), lambda block: lambda: list(block.names))
    assert found == [["a", "b"], ["c", "3"], ["4", "5"], ["6", "7"], ["8", "9"], ["10", "11"]]


def test_one_that_fails_ends_the_others_with_its_code():
    def work(peers):
        watcher = threading.Thread(target=peers.watch)
        watcher.start()
        try:
            if peers.rank == 1:
                time.sleep(0.1)
                return peers.fail(4)
            peers.get("never")
        except PeerError as error:
            return error.code, peers.fail(error.code)
        finally:
            peers._ended.set()
            watcher.join()

    assert in_threads(3, work) == [(4, False), True, (4, False)]


def test_one_that_gives_no_sign_of_life_is_gone(monkeypatch):
    monkeypatch.setattr(peers_module, "_BEAT", 0.05)
    monkeypatch.setattr(peers_module, "_SILENCE", 0.5)

    def work(peers):
        watcher = threading.Thread(target=peers.watch)
        if peers.rank == 0:
            watcher.start()
            try:
                peers.get("never")
            finally:
                peers._ended.set()
                watcher.join()

    first, _ = in_threads(2, work)
    assert isinstance(first, ResourceError)
    assert str(first).startswith("process 1: is gone")
