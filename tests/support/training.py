"""Tiny trainings, and what they leave."""

import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch

from equalize.checkpoint.loading import ModelName
from equalize.commands.finetune.config import TrainConfig
from equalize.messages import TrainingMonitor

QUICK = TrainConfig(
    max_steps=8,
    batch_size=4,
    lr=3e-3,
    warmup=0.0,
    random_resize=(1.0, 1.0),
    flip=0.0,
    photometric=False,
    cat_max_ratio=1.0,
    size=(48, 64),
    device="cpu",
    samples=4,
)
"""No augmentation, so that a few steps suffice."""

FACTORY = textwrap.dedent("""
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, num_classes=5):
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
            self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
            self.fuse = nn.Conv2d(16, 8, 1)
            self.classify = nn.Conv2d(8, num_classes, 1)
            self.auxiliary = nn.Conv2d(8, num_classes, 1)

        def forward(self, x):
            low = self.backbone(x)
            high = nn.functional.interpolate(self.deep(low), scale_factor=2, mode="bilinear")
            out = self.classify(self.fuse(torch.cat([low, high], 1)))
            return {"out": out, "aux": self.auxiliary(low)}
""")
"""With dropout, BatchNorm, an auxiliary head and one resampled fusion layer."""


class Killed(BaseException):
    """Ends what is running, where a test wants it."""


class OnStep(TrainingMonitor):
    """Calls a function with the steps done and all of them, over every run if there are several."""

    def __init__(self, call: Callable[[int, int], None]) -> None:
        self._call = call
        self._number, self._runs = 0, 1

    def for_run(self, name: str, number: int, of: int) -> TrainingMonitor:
        self._number, self._runs = number, of
        return self

    def stepped(self, step: int, of: int) -> None:
        self._call(self._number * of + step, self._runs * of)


def named(path, **flags) -> ModelName:
    return ModelName(source=str(path), **flags)


def metrics(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def trained_weights(out: Path) -> dict[str, torch.Tensor]:
    """Of a model that came as `.pth`."""
    return torch.load(out / "model.pth", weights_only=True)


def falls(done) -> bool:
    losses = [loss for _, loss in done.losses]
    return sum(losses[-2:]) < 0.9 * sum(losses[:2])


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
