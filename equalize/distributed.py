"""Several processes that work on one thing, as `torchrun` starts them."""

import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from equalize.peers import ALONE, Peers

__all__ = [
    "broadcast_buffers",
    "from_main",
    "group",
    "in_step",
    "is_main",
    "join",
    "leave",
    "my_share",
    "summed",
    "wait",
]

_Item = TypeVar("_Item")


def join(device: torch.device) -> torch.device:
    """Joins the group that `torchrun` describes in the environment, if it does; gives this process's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return device
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu")
    found: torch.device = state.device
    return found


def leave() -> None:
    """Leaves the group that `join` joined, if any."""
    if _rank_and_number()[1] > 1:
        distributed.destroy_process_group()


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return _rank_and_number()[0] == 0


def my_share(items: Sequence[_Item]) -> Sequence[_Item]:
    """Every n-th of the items, so that each belongs to exactly one of n processes."""
    rank, number = _rank_and_number()
    return items[rank::number]


def in_step(items: Iterable[_Item], device: torch.device) -> Iterator[tuple[_Item, bool]]:
    """Items and True; then, as long as another process still has some, the last one again and False.

    For work that all processes must do equally often, each with items of its own, at least one.
    """
    mine = iter(items)
    item = next(mine)
    fresh = True
    while int(summed(torch.tensor(int(fresh)), device)):
        yield item, fresh
        following = next(mine, None) if fresh else None
        fresh = following is not None
        item = item if following is None else following


def summed(tensor: Tensor, device: torch.device) -> Tensor:
    """The sum of this tensor over all processes, on the CPU; exact for integers."""
    if _rank_and_number()[1] == 1:
        return tensor
    total = tensor.to(device, copy=True)
    distributed.all_reduce(total)
    return total.cpu()


def broadcast_buffers(model: nn.Module) -> None:
    """Gives every process the main one's buffers, such as the running statistics of BatchNorms."""
    if _rank_and_number()[1] > 1:
        for buffer in nn.Module.buffers(model):
            distributed.broadcast(buffer, src=0)


def from_main(value: _Item) -> _Item:
    """The main process's value, in every process; plain Python values."""
    values = [value]
    if _rank_and_number()[1] > 1:
        distributed.broadcast_object_list(values, src=0)
    return values[0]


def group() -> Peers:
    """The group that `join` joined, as processes that share a pass; without the time limit of its collectives."""
    rank, number = _rank_and_number()
    if number == 1:
        return ALONE
    name = from_main(secrets.token_hex(8))  # what an earlier pass left in the store must not be taken for this one's
    return Peers(rank, number, PrefixStore(name, _get_default_store()))


def wait() -> None:
    """Until all processes are here."""
    if _rank_and_number()[1] > 1:
        distributed.barrier()


def _rank_and_number() -> tuple[int, int]:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
