"""Processes that start in no time: forks of a server that has imported torch, once for all tests of a session."""

import multiprocessing
import os
import socket
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from typing import Any

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.preloaded"])


def start(
    target: Callable[..., None], *args: Any, env: Mapping[str, str] | None = None, daemon: bool = True
) -> BaseProcess:
    """Starts a process that calls a module's function; only where it is no daemon may it start others."""
    method = multiprocessing.get_start_method()
    process = _CONTEXT.Process(target=_call, args=(dict(env or {}), method, target, args), daemon=daemon)
    process.start()
    return process


def in_two_processes(target: Callable[..., None], *args: Any, env: Mapping[str, str] | None = None) -> None:
    """Calls a module's function in two processes that find each other as those of `torchrun` do."""
    assert in_processes(2, target, *args, env=env) == [0, 0]


def in_processes(
    number: int, target: Callable[..., None], *args: Any, env: Mapping[str, str] | None = None
) -> list[int | None]:
    """Calls a module's function in so many processes that find each other as those of `torchrun` do: exit codes."""
    processes = [start(target, *args, env={**each, **(env or {})}) for each in ranks(number)]
    for process in processes:
        process.join(timeout=200)
    return [process.exitcode for process in processes]


def ranks(number: int) -> list[dict[str, str]]:
    """The variables by which processes find each other, in the order of their ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for rank in range(number)
    ]


def _call(env: Mapping[str, str], method: str, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(env)
    multiprocessing.set_start_method(method, force=True)  # for its own processes; it would take over this server's
    torch.set_num_threads(1)
    target(*args)
