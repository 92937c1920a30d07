"""Other domains: a U-Net over a speech-like signal and one over volumes, through the same functions."""

import copy
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from common import add_equalizers, print_key, print_table
from torch import Tensor, nn

import equalize

CONVS = {1: nn.Conv1d, 3: nn.Conv3d}
MODES = {1: "linear", 3: "trilinear"}
STEPS = 60


class UNet(nn.Module):
    """Two levels down, two up; each fusion layer mixes what was upsampled with the raw skip."""

    def __init__(self, dims: int, classes: int, width: int = 8) -> None:
        super().__init__()
        conv, w = CONVS[dims], width
        self.mode = MODES[dims]
        self.stem = conv(1, w, 5, padding=2)
        self.down1 = conv(w, 2 * w, 3, stride=2, padding=1)
        self.down2 = conv(2 * w, 4 * w, 3, stride=2, padding=1)
        self.fuse1 = conv(6 * w, 2 * w, 1)
        self.fuse2 = conv(3 * w, w, 1)
        self.out = conv(w, classes, 3, padding=1)

    def join(self, fuse: nn.Module, deep: Tensor, skip: Tensor) -> Tensor:
        up = F.interpolate(deep, size=skip.shape[2:], mode=self.mode)
        return F.relu(fuse(torch.cat([up, skip], 1)))

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.stem(x))
        b = F.relu(self.down1(a))
        c = F.relu(self.down2(b))
        return self.out(self.join(self.fuse2, self.join(self.fuse1, c, b), a))


def speech(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Signals (N, 1, 512) of silence, voiced and unvoiced segments, and the class of each sample (N, 512)."""
    labels = torch.randint(3, (number, 8), generator=generator).repeat_interleave(64, 1)
    time = torch.arange(512) / 512
    pitch = 20 + 20 * torch.rand(number, 1, generator=generator)
    voiced = sum(torch.sin(2 * math.pi * k * pitch * time) / k for k in (1, 2, 3))
    noise = torch.randn(number, 512, generator=generator)
    signal = 0.05 * noise + torch.where(labels == 1, voiced, torch.where(labels == 2, 0.7 * noise, 0.0))
    return signal.unsqueeze(1), labels


def volumes(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy volumes (N, 1, 12, 12, 12) with a ball each, and whether a voxel is in it."""
    axis = torch.arange(12.0)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    center = 3 + 6 * torch.rand(number, 3, 1, 1, 1, generator=generator)
    labels = ((grid - center).square().sum(1) < 9).long()
    noise = 0.7 * torch.randn(number, 12, 12, 12, generator=generator)
    return (100 * (labels + noise)).unsqueeze(1), labels  # in units like those of a scanner


def trained(model: nn.Module, x: Tensor, y: Tensor) -> Iterator[float]:
    """The loss of each step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        index = torch.arange(8 * step, 8 * step + 8) % len(x)
        optimizer.zero_grad()
        value = F.cross_entropy(model(x[index]), y[index])
        value.backward()
        optimizer.step()
        yield value.item()


rows, worst = [], 0.0
for name, dims, data in (("speech, 1-d", 1, speech), ("volumes, 3-d", 3, volumes)):
    x, y = data(32, torch.Generator().manual_seed(0))
    losses: dict[str, list[float]] = {"none": [], "explicit": []}
    for seed in range(2):
        torch.manual_seed(seed)
        model = UNet(dims, classes=int(y.max()) + 1)
        equalized, explicit = copy.deepcopy(model), copy.deepcopy(model)
        plan = equalize.calibrate(equalized, [x], "rescale", found=equalize.scan(model, x[:2]))
        add_equalizers(plan, explicit)
        with torch.no_grad():
            expected = explicit(x)
            worst = max(worst, float((equalized(x) - expected).abs().max() / expected.abs().max()))
        equalize.attach(plan, equalized)
        for arm, each in (("none", model), ("explicit", equalized)):
            losses[arm].append(sum(list(trained(each, x, y))[-8:]) / 8)
    for site in plan.sites:
        sigmas = " / ".join(f"{branch.std:.3g}" for branch in site.branches)
        means = [f"{sum(values) / len(values):.3f}" for values in losses.values()]
        rows.append([name, site.layer, sigmas, site.tau, *means])
print_table(["network", "fusion layer", "sigma, up / skip", "tau", f"loss after {STEPS} steps, none", "explicit"], rows)
print(f"\nfolded against equalizer modules at the start: equal to 1e-5: {'yes' if worst < 1e-5 else worst}")
assert worst < 1e-5, worst
print_key(float(rows[0][4]) - float(rows[0][5]))
