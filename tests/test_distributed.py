"""Several processes that end together: one says why, all have its exit code."""

import os
import signal
import time

import pytest
import torch
from accelerate import PartialState

from equalize import distributed
from equalize.distributed import (
    broadcast_buffers,
    fail_together,
    from_main,
    gather,
    is_main,
    join,
    joined,
    leave,
    rank_and_number,
)
from equalize.errors import DataError, InputError, NumericsError, PeerError, ResourceError
from tests.support.side_by_side import in_processes


def exit_code_of(error):
    return getattr(error, "exit_code", 1)


def exchange():
    with joined(exit_code_of):
        rank, number = rank_and_number()
        assert gather({"rank": rank}) == [{"rank": each} for each in range(number)]
        assert from_main(f"from {rank}") == "from 0"
        assert is_main() == (rank == 0)
    assert rank_and_number() == (0, 1)


def exchange_or_fail(failing, error):
    with joined(exit_code_of):
        rank, number = rank_and_number()
        assert gather(rank) == list(range(number))
        if rank in failing:
            raise error
        gather(rank)


def fail(failing, error):
    """Each process that fails raises; those that do not learn it when they gather."""
    speaks = int(os.environ["RANK"]) == min(failing)
    with pytest.raises(type(error) if speaks else PeerError) as caught:
        exchange_or_fail(failing, error)
    assert speaks or caught.value.code == exit_code_of(error)


def exchange_or_be_killed():
    with joined(exit_code_of):
        if rank_and_number()[0] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        gather(None)


def is_killed():
    with pytest.raises(ResourceError, match="another process: is gone"):
        exchange_or_be_killed()


def exchange_and_prove():
    """The main process has more to do than the others."""
    with joined(exit_code_of):
        gather(None)
        if is_main():
            time.sleep(0.2)
            raise NumericsError("proof", "failed")


def fail_at_the_end():
    if os.environ["RANK"] != "0":
        exchange_and_prove()
        return
    with pytest.raises(NumericsError):
        exchange_and_prove()


def test_objects_are_exchanged():
    assert in_processes(3, exchange) == [0, 0, 0]


@pytest.mark.parametrize("failing", [(0,), (1,), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("error", [DataError("x.png", "cannot be read"), KeyError("a bug")])
def test_one_that_fails_ends_all_with_its_code(failing, error):
    assert in_processes(3, fail, failing, error) == [0, 0, 0]


def test_one_that_is_killed_ends_the_others():
    assert in_processes(3, is_killed) == [0, -signal.SIGKILL, 0]


def test_the_main_process_may_fail_when_the_others_are_done():
    assert in_processes(2, fail_at_the_end) == [0, 0]


def test_alone():
    assert gather(3) == [3]
    with pytest.raises(KeyError), fail_together(exit_code_of):
        raise KeyError
    leave()


def test_processes_that_do_not_meet(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match="not set, where WORLD_SIZE=2"), joined(exit_code_of):
        pass
    with pytest.raises(InputError, match="not set, where WORLD_SIZE=2"):
        join(torch.device("cpu"))


def test_buffers_are_broadcast_as_nccl_takes_them(monkeypatch):
    """It refuses tensors that are not contiguous; an expanded one holds a constant of the network."""

    def broadcast(tensor, src):
        assert tensor.is_contiguous()
        tensor.fill_(7)

    monkeypatch.setattr(distributed, "rank_and_number", lambda: (0, 2))
    monkeypatch.setattr(distributed.distributed, "broadcast", broadcast)
    module = torch.nn.BatchNorm2d(2)
    module.register_buffer("turned", torch.arange(6.0).view(2, 3).T)
    module.register_buffer("expanded", torch.zeros(1).expand(4))
    broadcast_buffers(module)
    assert [float(buffer.float().mean()) for buffer in module.buffers()] == [7, 7, 7, 7, 0]


def test_processes_that_accelerate_does_not_join(monkeypatch):
    """On an accelerator it goes by LOCAL_RANK, which mpirun does not set: each would train alone, into one OUT."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    try:
        with pytest.raises(InputError, match=r"LOCAL_RANK: not set, where WORLD_SIZE=2.*torchrun"):
            join(torch.device("cuda"))
    finally:
        PartialState._reset_state()
