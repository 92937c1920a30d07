"""Several processes that share work, as `torchrun` starts them, in torch's default process group.

If one fails, the others receive that in their next `gather`; it prints the error, and all end with its exit code.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.rendezvous import rendezvous

from equalize.errors import InputError, PeerError, ResourceError
from equalize.eval_mode import is_expanded

_Item = TypeVar("_Item")

_VARIABLES = ("RANK", "MASTER_ADDR", "MASTER_PORT")
_JOINING = timedelta(minutes=5)  # nodes of a cluster do not start in the same second
_WAITING = timedelta(days=1)  # one process may load, or read images, for long while the others wait for it


def _announced() -> int:
    """How many processes the environment speaks of; an InputError if it says only half of what they need."""
    number = int(os.environ.get("WORLD_SIZE") or "1")
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if number > 1 and missing:
        what = f"not set, where WORLD_SIZE={number}"
        raise InputError(", ".join(missing), what, remedy="start the processes with torchrun")
    return number


def join(device: torch.device) -> torch.device:
    """Joins the group that `torchrun` describes in the environment, if it does; returns this process's device.

    Raises:
        InputError: the environment says only half of what is needed.
    """
    number = _announced()
    if number < 2:
        return device
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu")
    if state.num_processes < 2:  # on an accelerator Accelerate goes by LOCAL_RANK alone
        what = f"not set, where WORLD_SIZE={number}, or there is no CUDA device"
        raise InputError("LOCAL_RANK", what, remedy="start the processes with torchrun, or use --device cpu")
    found: torch.device = state.device
    return found


@contextlib.contextmanager
def joined(exit_code_of: Callable[[BaseException], int]) -> Iterator[None]:
    """Joins the group as `join` does, to exchange Python objects: over gloo, whatever the processes compute on.

    Raises:
        InputError: the environment says only half of what is needed. ResourceError: the processes cannot connect.
        PeerError: another process failed, see `fail_together`.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # torchrun's default for two and more: the number of threads changes last bits
    number = _announced()
    if number < 2:
        yield
        return
    try:
        store, rank, processes = next(rendezvous("env://", timeout=_JOINING))
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=_WAITING)
    except (RuntimeError, ValueError) as error:
        raise ResourceError(
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            f"the {number} processes do not meet ({str(error).splitlines()[0]})",
            remedy="check MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE",
        ) from error
    try:
        with fail_together(exit_code_of):
            yield
    finally:
        leave()


def leave() -> None:
    """Leaves the group that was joined, if any."""
    if rank_and_number()[1] > 1:
        distributed.destroy_process_group()


@contextlib.contextmanager
def fail_together(exit_code_of: Callable[[BaseException], int]) -> Iterator[None]:
    """Sends a failure of this process to the others of the group, which receive it in their next `gather`.

    `exit_code_of` maps an exception to the exit code that all have then. If a process of a lower rank failed as well, a
    PeerError takes the place of this one's exception, so that one alone reports it. An interruption reaches all
    processes, and the main one reports it.
    """
    try:
        yield
    except PeerError:
        raise
    except Exception as error:
        rank, number = rank_and_number()
        codes = [code for code, _ in _exchanged((exit_code_of(error), None), number)] if number > 1 else []
        leave()
        if any(codes[:rank]):
            raise PeerError(next(filter(None, codes))) from error
        raise
    except BaseException as error:
        if not is_main():
            raise PeerError(exit_code_of(error)) from error
        raise


def gather(item: _Item) -> list[_Item]:
    """All-gathers a picklable object: the objects of all processes in rank order.

    A PeerError if another process failed, a ResourceError if one is gone; the group is then dissolved.
    """
    _, number = rank_and_number()
    if number == 1:
        return [item]
    answers = _exchanged((0, item), number)
    if not answers:
        leave()
        what = "is gone, most often killed for want of memory"
        raise ResourceError("another process", what, remedy="use fewer processes, or see its log")
    failed = next((code for code, _ in answers if code), 0)
    if failed:
        leave()
        raise PeerError(failed)
    return [given for _, given in answers]


def _exchanged(answer: tuple[int, Any], number: int) -> list[tuple[int, Any]]:
    """The exit code (0: all is well) and the object of each process; [] if one is gone."""
    answers: list[Any] = [None] * number
    try:
        distributed.all_gather_object(answers, answer)
    except RuntimeError:  # a connection broke
        return []
    return answers


def own_device(device: torch.device) -> torch.device:
    """The accelerator of this process, if each has its own and the device has no index."""
    rank, number = rank_and_number()
    if number == 1 or device.type != "cuda" or device.index is not None:
        return device
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
    torch.cuda.set_device(own)
    return own


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank_and_number()[0] == 0


def my_share(items: Sequence[_Item]) -> Sequence[_Item]:
    """Every n-th of the items, so that each belongs to exactly one of n processes."""
    rank, number = rank_and_number()
    return items[rank::number]


def in_step(items: Iterable[_Item], device: torch.device) -> Iterator[tuple[_Item, bool]]:
    """Items and True; then, as long as another process still has some, the last one again and False.

    For work that all processes must do equally often, each with at least one item of its own.
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
    """The sum of this tensor, of any shape, over all processes, on the CPU; exact for integers."""
    if rank_and_number()[1] == 1:
        return tensor
    total = tensor.to(device, copy=True)
    distributed.all_reduce(total)
    return total.cpu()


def broadcast_buffers(model: nn.Module) -> None:
    """Broadcasts the main process's buffers to all, such as the running statistics of BatchNorms."""
    if rank_and_number()[1] > 1:
        for buffer in nn.Module.buffers(model):
            dense = buffer.contiguous()  # NCCL takes no other
            distributed.broadcast(dense, src=0)
            if dense is not buffer and not is_expanded(buffer):
                buffer.copy_(dense)


def from_main(value: _Item) -> _Item:
    """The main process's value, in every process; plain Python values."""
    values = [value]
    if rank_and_number()[1] > 1:
        distributed.broadcast_object_list(values, src=0)
    return values[0]


def wait() -> None:
    """A barrier."""
    if rank_and_number()[1] > 1:
        distributed.barrier()


def rank_and_number() -> tuple[int, int]:
    """Rank of this process and number of processes; (0, 1) without a group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
