"""Reading images ahead: a thread or worker processes fill the next batches while one is computed with."""

import collections
import contextlib
import math
import signal
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from equalize.errors import ResourceError

T_co = TypeVar("T_co", covariant=True)


def read_ahead(
    dataset: Dataset[T_co], indices: Sequence[int], *, workers: int, ahead: int
) -> contextlib.closing[Generator[T_co, None, None]]:
    """The items of these indices, in order, for a `with` block, at whose end nothing is read any more.

    Args:
        dataset: with `__getitem__`; must not raise, and pickle where processes are not forked.
        indices: which items.
        workers: processes; with 0 a thread reads, which is enough where decoding is faster than computing: neither
            holds Python's lock for long.
        ahead: items that may be read before they are asked for.

    Raises:
        ResourceError: a process died.
    """
    items = _by_workers(dataset, indices, workers, ahead) if workers else _by_thread(dataset, indices, ahead)
    return contextlib.closing(items)


def _by_thread(dataset: Dataset[T_co], indices: Sequence[int], ahead: int) -> Generator[T_co, None, None]:
    waiting: collections.deque[Future[T_co]] = collections.deque()
    pool = ThreadPoolExecutor(1, thread_name_prefix="images")
    try:
        for index in indices:
            waiting.append(pool.submit(dataset.__getitem__, index))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _by_workers(
    dataset: Dataset[T_co], indices: Sequence[int], workers: int, ahead: int
) -> Generator[T_co, None, None]:
    """One item a step; the start method of processes is the platform's, as everywhere in PyTorch."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=indices,
        collate_fn=_as_is,
        num_workers=workers,
        prefetch_factor=max(2, math.ceil(ahead / workers)),
        worker_init_fn=_leave_interrupts_to_parent,
        generator=torch.Generator(),  # else each pass would draw from the global random numbers
    )
    try:
        yield from loader
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise ResourceError(
            "workers",
            "a process that reads images was killed, most often for want of memory or shared memory",
            remedy="use fewer --workers, or none, or smaller batches",
        ) from error


def _as_is(item: Any) -> Any:
    return item


def _leave_interrupts_to_parent(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the parent alone answers it and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
