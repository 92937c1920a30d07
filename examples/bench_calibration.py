"""What measuring a network costs, side by side with a plain forward pass and with what else one could do.

    python examples/bench_calibration.py [--networks segformer-b0 ...] [--rounds 3] [--batch 2] [--size 512]
        [--device cpu] [--precision fp32] [--data FOLDER] [--markdown]

Six full-size networks with weights just drawn. In every round each way runs once over one batch to warm up and over
another that is timed, so that what disturbs the machine disturbs all; medians over rounds, as ratios to the plain
forward. Exporting and cutting the graph, once a calibration, is given apart in seconds. Peak memory is measured in
other processes. With --data also whole commands: calibrating on the training images of a folder against a bare loop.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from bench_commands import command_times, end_to_end
from bench_networks import NETWORKS, build
from bench_ways import ALTERNATIVES, WAYS, Cost, peaks

import equalize

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def timed(name: str, arguments: argparse.Namespace) -> dict[str, Cost]:
    """The median cost of each way on one network."""
    model = build(name).to(arguments.device)
    x = torch.randn(arguments.batch, 3, arguments.size, arguments.size, device=arguments.device)
    sites = equalize.scan(model, x).sites
    costs: dict[str, list[Cost]] = {way: [] for way in WAYS}
    with precision(arguments):
        for _ in range(arguments.rounds):
            for way, run in WAYS.items():
                costs[way].append(run(model, sites, [x] * (1 + arguments.timed_batches)))
    return {
        way: Cost(
            batch=statistics.median(cost.batch for cost in each), once=statistics.median(cost.once for cost in each)
        )
        for way, each in costs.items()
    }


def precision(arguments: argparse.Namespace) -> torch.autocast:
    """Everything runs in this precision."""
    dtype = PRECISIONS[arguments.precision]
    enabled = dtype != torch.float32
    return torch.autocast(arguments.device, dtype=dtype if enabled else torch.bfloat16, enabled=enabled)


def print_peaks(name: str, arguments: argparse.Namespace) -> None:
    """Prints, as JSON, the peak memory of each way; run in a process that has not computed anything yet."""
    torch.set_num_threads(1)  # threads of a parallel region would not survive the fork
    model = build(name).to(arguments.device)
    x = torch.randn(arguments.batch, 3, arguments.size, arguments.size, device=arguments.device)
    sites = equalize.scan(model, x).sites
    with precision(arguments):
        print(json.dumps(peaks(model, sites, x, arguments.threads)))


def read_peaks(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """The same, from such a process."""
    options = {"--batch": arguments.batch, "--size": arguments.size, "--device": arguments.device}
    options |= {"--precision": arguments.precision, "--threads": arguments.threads, "--peaks-of": name}
    words = [str(word) for pair in options.items() for word in pair]
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(rows: Sequence[Sequence[str]], *, markdown: bool) -> str:
    """Rows under a header, in columns."""
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    )


def time_rows(costs: dict[str, dict[str, Cost]], batch: int) -> list[list[str]]:
    """A row a network: images a second, ratios to the plain forward, gain over the best alternative, seconds once."""
    rows = [["network", "plain, images/s", *list(WAYS)[1:], "gain", "cutting, s"]]
    ratios: dict[str, list[float]] = {way: [] for way in WAYS}
    for name, cost in costs.items():
        plain = cost["plain"].batch
        for way in WAYS:
            ratios[way].append(cost[way].batch / plain)
        gain = min(cost[way].batch for way in ALTERNATIVES) / cost["cut graph"].batch
        rows.append([name, f"{batch / plain:.2f}", *(f"{ratios[way][-1]:.2f}" for way in list(WAYS)[1:])])
        rows[-1] += [f"{gain:.2f}", f"{cost['cut graph'].once:.1f}"]
    means = (math.exp(statistics.fmean(map(math.log, ratios[way]))) for way in list(WAYS)[1:])
    return [*rows, ["geometric mean", "", *(f"{mean:.2f}" for mean in means), "", ""]]


def machine(arguments: argparse.Namespace) -> str:
    """Where, with what and how."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), cpu)
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{cpu}, {arguments.threads} threads"
    names = ("torch", "torchvision", "transformers", "segmentation-models-pytorch")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return (
        f"{device}; Python {platform.python_version()}, equalize {equalize.__version__}, {versions}\n"
        f"batches of {arguments.batch} images of {arguments.size} x {arguments.size}, {arguments.precision}, "
        f"median of {arguments.rounds} interleaved rounds; times and gains are of wall-clock seconds"
    )


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2, help="images; update_bn needs two")
    parser.add_argument("--timed-batches", type=int, default=1, help="in each round, after one that warms up")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--data", help="a folder of images, for whole commands on a CPU")
    parser.add_argument("--samples", type=int, default=64, help="images of --data")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--peaks-of", choices=NETWORKS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Runs everything and prints tables."""
    warnings.simplefilter("ignore")
    arguments = read_arguments()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if arguments.peaks_of:
        return print_peaks(arguments.peaks_of, arguments)
    torch.set_num_threads(arguments.threads)
    print(machine(arguments), end="\n\n", flush=True)
    costs = {}
    for name in arguments.networks:
        print(f"timing {name}", file=sys.stderr)
        costs[name] = timed(name, arguments)
    print("Seconds a batch, as ratios to a plain forward pass")
    print(table(time_rows(costs, arguments.batch), markdown=arguments.markdown), end="\n\n", flush=True)
    if not arguments.no_memory:
        rows = [["network", *WAYS]]
        for name in arguments.networks:
            rows.append([name, *(f"{peak:.0f}" for peak in read_peaks(name, arguments).values())])
        print("Peak memory beyond the network's own, MiB")
        print(table(rows, markdown=arguments.markdown), end="\n\n", flush=True)
    rows = [["command", "seconds"], *([name, f"{each:.2f}"] for name, each in command_times(3).items())]
    print(table(rows, markdown=arguments.markdown), end="\n\n", flush=True)
    if arguments.data:
        ends = end_to_end(arguments.data, size=arguments.size, samples=arguments.samples, batch=8, rounds=1)
        rows = [["SegFormer-B0", "whole process, s", "in it, s"]]
        rows += [[name, f"{wall:.1f}", f"{inner:.1f}"] for name, (wall, inner) in ends.items()]
        print(table(rows, markdown=arguments.markdown))
    return None


if __name__ == "__main__":
    main()
