"""Small networks with one fusion layer, and explicit equalizers to hold them against. No tests."""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equalize.checkpoint.loading import ModelName
from equalize.checkpoint.user_code import load_factory

BRANCHES = ((0, 4), (4, 6))
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Fusion(nn.Module):
    """Four upsampled channels of small scale and two of large scale and mean, fused by `fuse`, then `after`."""

    def __init__(self, fuse: nn.Module, after: nn.Module | None = None, dims: int = 2) -> None:
        super().__init__()
        self.low = CONVS[dims](3, 4, 3, stride=2, padding=1)
        self.high = CONVS[dims](3, 2, 1)
        self.fuse = fuse
        self.after = nn.Identity() if after is None else after
        with torch.no_grad():
            self.low.weight *= 0.1
            self.high.weight *= 4
            self.high.bias += 3

    def features(self, x: Tensor) -> Tensor:
        return torch.cat([F.interpolate(self.low(x), size=x.shape[2:]), self.high(x)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        u = self.features(x)
        if isinstance(self.fuse, nn.Linear):
            return self.after(self.fuse(u.movedim(1, -1)).movedim(-1, 1))
        return self.after(self.fuse(u))


class Equalizer(nn.Module):
    """(u_b - mu_b) / sigma_b by branch, over the channels on `axis`."""

    def __init__(self, means: list[float], stds: list[float], axis: int = 1, branches=BRANCHES) -> None:
        super().__init__()
        widths = [stop - start for start, stop in branches]
        self.axis = axis
        self.register_buffer(
            "mean", torch.repeat_interleave(torch.tensor(means, dtype=torch.float64), torch.tensor(widths))
        )
        self.register_buffer(
            "std", torch.repeat_interleave(torch.tensor(stds, dtype=torch.float64), torch.tensor(widths))
        )

    def forward(self, u: Tensor) -> Tensor:
        shape = [1] * u.ndim
        shape[self.axis] = -1
        return ((u - self.mean.view(shape)) / self.std.view(shape)).to(u.dtype)


def explicit(model: Fusion, means: list[float], stds: list[float]) -> Fusion:
    """A copy with real equalizers in front of the same fusion layer."""
    twin = copy.deepcopy(model)
    axis = -1 if isinstance(model.fuse, nn.Linear) else 1
    equalizer = Equalizer(means, stds, axis)
    if isinstance(model.fuse, nn.Linear):
        fuse = twin.fuse
        twin.forward = lambda x: twin.after(fuse(equalizer(twin.features(x).movedim(1, -1))).movedim(-1, 1))  # type: ignore[method-assign]
    else:
        twin.fuse = nn.Sequential(equalizer, twin.fuse)
    return twin


def oracle_moments(model: Fusion, x: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each branch, in float64, of the features as the network computes them."""
    with torch.no_grad():
        u = model.features(x).double()
    parts = [u[:, start:stop] for start, stop in BRANCHES]
    return [float(part.mean()) for part in parts], [float(part.std(correction=0)) for part in parts]


def batch_norm(channels: int, dims: int = 2) -> nn.Module:
    """With statistics and affine parameters that are not the defaults."""
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims](channels)
    with torch.no_grad():
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
        norm.num_batches_tracked += 3
    return norm


def save_code(code: str, folder: Path, **arguments: int) -> ModelName:
    """A file of code with a `Net` in it, and weights of that, drawn under a seed."""
    place, weights = folder / "net.py", folder / "net.pth"
    place.write_text(code)
    arch = f"{place}:Net"
    torch.manual_seed(0)
    torch.save(load_factory(arch)(**arguments).state_dict(), weights)
    return ModelName(source=str(weights), arch=arch, arch_args=arguments)
