"""Processes that share the passes over the images, as a launcher's environment describes them (RANK, WORLD_SIZE, ...).

They exchange small results, block by block, and need nothing else of each other: so they meet in a key-value store and
form no process group, which works alike on the CPU and on accelerators, and where nothing runs into the timeout of a
collective. Each says every second that it lives and looks whether the others do; a process that fails says so, and the
others then end with its exit code, in silence.
"""

import contextlib
import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from equalize.errors import EqualizeError, InputError, PeerError, ResourceError

__all__ = ["ALONE", "Peers", "joined"]

_VARIABLES = ("RANK", "MASTER_ADDR", "MASTER_PORT")
_JOINING = timedelta(minutes=5)  # nodes of a cluster do not start in the same second
_BEAT = 1.0  # seconds
_SILENCE = 15.0  # after as many without a sign of life a process counts as gone
_PARTING = 5.0  # seconds that a failing process, and the one that may hold the store, wait for the others to leave
_FAILURE = "failure"


class Peers:
    """This process among those that share the work; alone, if `store` is None.

    Attributes:
        rank: from 0; the main one writes and prints.
        number: of processes.
    """

    def __init__(self, rank: int = 0, number: int = 1, store: Store | None = None) -> None:
        self.rank = rank
        self.number = number
        self._store = store
        self._trouble: EqualizeError | None = None
        self._ended = threading.Event()
        self._passes = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """The accelerator of this process, where each has one of its own and none was asked for by its index."""
        if self.number == 1 or device.type != "cuda" or device.index is not None:
            return device
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.rank)) % torch.cuda.device_count())
        torch.cuda.set_device(own)
        return own

    def put(self, key: str, content: Any) -> None:
        """Shows the others something: plain Python values and tensors on the CPU."""
        if self._store is not None:
            file = io.BytesIO()
            torch.save(content, file)
            with _store_may_be_gone():
                self._store.set(key, file.getvalue())  # type: ignore[arg-type]  # bytes are taken as they are

    def get(self, key: str) -> Any:
        """What a process put, as soon as it did.

        Raises:
            PeerError: a process failed meanwhile. ResourceError: one is gone.
        """
        assert self._store is not None
        pause = 0.001
        while True:
            self.demand_health()
            with _store_may_be_gone():
                if self._store.check([key]):
                    return torch.load(io.BytesIO(self._store.get(key)), weights_only=True)
            time.sleep(pause)
            pause = min(2 * pause, 0.05)

    def forget(self, key: str) -> None:
        """Removes what was put, which every process must have got."""
        if self._store is not None:
            with _store_may_be_gone():
                self._store.delete_key(key)

    def name_of_pass(self) -> str:
        """A name for what is put during a pass, the same in all processes."""
        if self._store is None:
            return ""
        self._passes += 1
        return f"pass{self._passes}"

    def all_passed(self, key: str) -> bool:
        """Whether the others are here as well; asked by each, answered to the main one, which waits for them."""
        if self._store is None:
            return False
        self._count(key, 1)
        while self.is_main and self._count(key) < self.number:
            self.demand_health()
            time.sleep(0.001)
        return self.is_main

    def _count(self, key: str, more: int = 0) -> int:
        """A number that all processes add to."""
        assert self._store is not None
        with _store_may_be_gone():
            return int(self._store.add(key, more))

    def demand_health(self) -> None:
        """Raises what `get` raises, at once."""
        if self._trouble is not None:
            raise self._trouble

    def watch(self) -> None:
        """Gives signs of life and looks for those of the others, until the end; for a thread of its own."""
        heard = {rank: (0, time.monotonic()) for rank in range(self.number) if rank != self.rank}
        try:
            while not self._ended.wait(_BEAT):
                self._count(f"alive/{self.rank}", 1)
                assert self._store is not None
                if self._store.check([_FAILURE]):
                    self._trouble = PeerError(int(self._store.get(_FAILURE).split()[1]))
                now = time.monotonic()
                for rank, (beats, since) in heard.items():
                    current = self._count(f"alive/{rank}")
                    heard[rank] = (beats, since) if current == beats else (current, now)
                    if now - heard[rank][1] > _SILENCE and not self._store.check([f"left/{rank}"]):
                        self._trouble = self._trouble or _gone(rank)
        except (EqualizeError, RuntimeError) as error:
            self._trouble = error if isinstance(error, EqualizeError) else _gone(0)

    def fail(self, exit_code: int) -> bool:
        """Says that this process failed, and waits for the others to leave; False if another was first."""
        assert self._store is not None
        mine = f"{self.rank} {exit_code}"
        try:
            first = bool(self._store.compare_set(_FAILURE, "", mine).decode() == mine)
        except RuntimeError:
            return True
        self.leave(last=first)
        return first

    def finish(self) -> None:
        """Waits until all have done their work."""
        self.put(f"done/{self.rank}", True)
        for rank in range(self.number):
            self.get(f"done/{rank}")
        self.leave(last=self.is_main)

    def leave(self, *, last: bool) -> None:
        """Says that nothing more is needed of the store; waits a while for the others before, if `last`.

        The main process, in which the store may lie, always leaves last of all.
        """
        assert self._store is not None
        others = [f"left/{rank}" for rank in range(self.number) if rank != self.rank]
        with contextlib.suppress(RuntimeError):
            if self.is_main or not last:
                self._store.set(f"left/{self.rank}", "")
            until = time.monotonic() + (_PARTING if last or self.is_main else 0)
            while time.monotonic() < until and not self._store.check(others):
                time.sleep(0.02)
            self._store.set(f"left/{self.rank}", "")
        self._ended.set()


ALONE = Peers()


@contextlib.contextmanager
def joined(exit_code_of: Callable[[BaseException], int], peers: Peers | None = None) -> Iterator[Peers]:
    """The processes that a launcher started, else this one alone; all leave together.

    Args:
        exit_code_of: the exit code that an exception means, which the others shall have too.
        peers: the processes, where they have met already.

    Raises:
        PeerError: another process failed. ResourceError: another is gone, or they did not meet.
    """
    peers = peers or _join()
    if peers.number == 1:
        yield peers
        return
    watcher = threading.Thread(target=peers.watch, name="peers", daemon=True)
    watcher.start()
    try:
        yield peers
        peers.finish()
    except BaseException as error:
        code = error.code if isinstance(error, PeerError) else exit_code_of(error)
        if not peers.fail(code):
            raise PeerError(code) from error
        raise
    finally:
        watcher.join()


def _join() -> Peers:
    number = os.environ.get("WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in os.environ and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # as torchrun has it for two and more: how many threads there are changes last bits
    if number in ("", "0", "1"):
        return ALONE
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if missing:
        raise InputError(
            ", ".join(missing), f"not set, where WORLD_SIZE={number}", remedy="start the processes with torchrun"
        )
    try:
        store, rank, processes = next(rendezvous("env://", timeout=_JOINING))
    except (RuntimeError, ValueError) as error:
        raise ResourceError(
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            f"the {number} processes do not meet ({str(error).splitlines()[0]})",
            remedy="check MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE",
        ) from error
    return Peers(rank, processes, PrefixStore("equalize", store))


@contextlib.contextmanager
def _store_may_be_gone() -> Iterator[None]:
    try:
        yield
    except EqualizeError:
        raise
    except RuntimeError as error:  # DistError and its kind
        raise _gone(0) from error


def _gone(rank: int) -> ResourceError:
    return ResourceError(
        f"process {rank}", "is gone, most often killed for want of memory", remedy="use fewer processes, or see its log"
    )
