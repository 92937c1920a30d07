"""Ways to get statistics of a network's branches, and what each costs: seconds a batch and peak memory.

Each way takes a network in eval mode, its fusion layers and batches, runs over the batches but for the first, which
warms up, and says how many seconds a batch took.
"""

import contextlib
import copy
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import equalize
from equalize.moments.measure import measure_branches

__all__ = ["ALTERNATIVES", "WAYS", "Cost", "peaks"]

CALIBRATION_IMAGES = 256  # what a calibration reads by default: `measure` cuts the graph only where that comes back


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Seconds a batch, and seconds that are spent once."""

    batch: float
    once: float = 0.0


class Clocked:
    """Batches that record when each was requested, after the device has finished."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self._batches = batches
        self._asked: list[float] = []

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._batches:
            self._ask(batch)
            yield batch
        self._ask(self._batches[-1])

    def _ask(self, batch: Tensor) -> None:
        if batch.is_cuda:
            torch.cuda.synchronize(batch.device)
        self._asked.append(time.perf_counter())

    def finish(self) -> None:
        """Counts what was done since the last batch was asked for as part of the last one."""
        self._asked.pop()
        self._ask(self._batches[-1])

    def cost(self) -> Cost:
        """Of what was done between the batches; the first one's excess over the others is what is spent once."""
        first, second, last = self._asked[0], self._asked[1], self._asked[-1]
        batch = (last - second) / (len(self._asked) - 2)
        return Cost(batch=batch, once=second - first - batch)


class Counted(Clocked):
    """With a length: that of a calibration of the usual number of images, the first of which are run."""

    def __len__(self) -> int:
        return CALIBRATION_IMAGES // len(self._batches[0])


def plain_forward(model: nn.Module, sites: Sequence[equalize.Site], batches: Sequence[Tensor]) -> Cost:
    """The network as it is, in eval mode without gradients: what the others are compared with."""
    clocked = Clocked(batches)
    with torch.no_grad():
        for batch in clocked:
            model(batch)
    return clocked.cost()


def cut_graph(model: nn.Module, sites: Sequence[equalize.Site], batches: Sequence[Tensor]) -> Cost:
    """`equalize.measure` on batches with a length."""
    clocked = Counted(batches)
    equalize.measure(model, sites, clocked)
    return clocked.cost()


def with_indicator(model: nn.Module, sites: Sequence[equalize.Site], batches: Sequence[Tensor]) -> Cost:
    """The same with the covariances that say whether equalizing will help, but for the decompositions of these."""
    clocked = Counted(batches)
    measure_branches(model, sites, clocked, statistics=True)
    clocked.finish()
    return clocked.cost()


def hooked(model: nn.Module, sites: Sequence[equalize.Site], batches: Sequence[Tensor]) -> Cost:
    """`equalize.measure` on batches without a length: it does not cut the graph for what may be a few."""
    clocked = Clocked(batches)
    equalize.measure(model, sites, clocked)
    return clocked.cost()


def var_mean(model: nn.Module, sites: Sequence[equalize.Site], batches: Sequence[Tensor]) -> Cost:
    """Forward hooks with `torch.var_mean` on each branch's slice of what enters the fusion layer."""
    found: list[tuple[Tensor, Tensor]] = []
    return _observed(model, sites, batches, lambda branch, u: found.append(torch.var_mean(u, correction=0)))


def observers(model: nn.Module, sites: Sequence[equalize.Site], batches: Sequence[Tensor]) -> Cost:
    """PyTorch's quantization observers on the same slices; MinMaxObserver is the cheapest of them."""
    from torch.ao.quantization import MinMaxObserver

    by_branch: dict[object, nn.Module] = {}

    def observe(branch: object, u: Tensor) -> None:
        by_branch.setdefault(branch, MinMaxObserver().to(u.device))(u)

    return _observed(model, sites, batches, observe)


def update_bn(model: nn.Module, sites: Sequence[equalize.Site], batches: Sequence[Tensor]) -> Cost:
    """`torch.optim.swa_utils.update_bn`: BatchNorm statistics, the network in training mode."""
    before = copy.deepcopy(model.state_dict())
    clocked = Clocked(batches)
    try:
        torch.optim.swa_utils.update_bn(clocked, model, device=batches[0].device)
    finally:
        model.load_state_dict(before)
        model.eval()
    return clocked.cost()


def _observed(
    model: nn.Module,
    sites: Sequence[equalize.Site],
    batches: Sequence[Tensor],
    observe: Callable[[tuple[str, int], Tensor], object],
) -> Cost:
    with contextlib.ExitStack() as stack:
        for site in sites:

            def hook(_: nn.Module, args: tuple[Tensor, ...], site: equalize.Site = site) -> None:
                for branch in site.branches:
                    observe((site.layer, branch.start), args[0][:, branch.start : branch.stop])

            stack.callback(model.get_submodule(site.layer).register_forward_pre_hook(hook).remove)
        return plain_forward(model, sites, batches)


WAYS = {
    "plain": plain_forward,
    "cut graph": cut_graph,
    "with indicator": with_indicator,
    "hooks": hooked,
    "var_mean": var_mean,
    "update_bn": update_bn,
    "observers": observers,
}
ALTERNATIVES = ("var_mean", "update_bn", "observers")


def peaks(model: nn.Module, sites: Sequence[equalize.Site], batch: Tensor, threads: int) -> dict[str, float]:
    """MiB that each way takes at most beyond what the process held before, the network and its sites being there.

    On a CPU every way runs in a process of its own, forked from this one, which must not have computed in parallel
    yet: the maximum resident set of its life (getrusage) less the resident set at its start. On CUDA what the
    allocator says.
    """
    return {name: _peak(way, model, sites, [batch] * 2, threads) for name, way in WAYS.items()}


def _peak(way: Callable[..., Cost], model: nn.Module, sites: object, batches: list[Tensor], threads: int) -> float:
    if batches[0].is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way(model, sites, batches)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def run() -> None:
        torch.set_num_threads(threads)
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        way(model, sites, batches)
        answers.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)

    process = context.Process(target=run)
    process.start()
    process.join()
    return float("nan") if answers.empty() else answers.get() / 2**20
