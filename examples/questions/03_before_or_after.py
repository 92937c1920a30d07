"""Measured before or after upsampling? Four branches of sigma 1 before it, smooth and rough, equalized both ways."""

import torch
import torch.nn.functional as F
from common import Fuse, print_key, print_table, random_field

import equalize

CHANNELS, IMAGES, SIZE = 8, 32, 32

generator = torch.Generator().manual_seed(0)
kinds = [(1, 0.0), (2, 0.0), (8, 0.0), (8, 0.9)]  # factor of the upsampling, correlation of neighbors
branches = [random_field((IMAGES, CHANNELS, SIZE // factor, SIZE // factor), rho, generator) for factor, rho in kinds]
model = Fuse([CHANNELS] * len(kinds))
sites = equalize.scan(model, tuple(x[:2] for x in branches)).sites


def sigmas(inputs: list[torch.Tensor]) -> list[float]:
    """As the branches enter the fusion layer."""
    return [each.std for each in equalize.measure(model, sites, [tuple(inputs)])["fuse"]]


before = [float(x.double().std(correction=0)) for x in branches]
after = sigmas(branches)
by_before = sigmas([x / sigma for x, sigma in zip(branches, before, strict=True)])
by_after = sigmas([x / sigma for x, sigma in zip(branches, after, strict=True)])
columns = zip(kinds, before, after, by_before, by_after, strict=True)
header = ["upsampled by", "rho", "sigma before", "sigma after", "left if divided by sigma before", "by sigma after"]
print_table(header, [[f"x{factor}", rho, *values] for (factor, rho), *values in columns])

deep = branches[2]
outside = F.interpolate(deep, size=(SIZE, SIZE), mode="bilinear") / after[2]
inside = F.interpolate(deep / after[2], size=(SIZE, SIZE), mode="bilinear")
difference = float((outside - inside).abs().max())
print(f"\ndividing by sigma after before the upsampling or behind it: largest difference {difference:.0e}")
assert difference < 1e-5
print_key(min(by_before) / max(by_before))
