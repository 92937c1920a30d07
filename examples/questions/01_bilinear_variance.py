"""Why does bilinear upsampling shrink variance? Measured against theory, on features of known autocorrelation.

An upsampled value is (1 - t) x_i + t x_(i+1) along each axis, of variance 1 - 2 t (1 - t) (1 - rho) where neighbors
correlate by rho. Averaged over the positions t and squared for two axes (the autocorrelation here is separable):
factor = (1 - 2 (1 - rho) mean t (1 - t))^2. With align_corners=False and an even factor s, mean t (1 - t) is
1/6 + 1/(12 s^2) in the interior and 0 in the outermost s/2 values on each side, which repeat the border.
"""

import torch
import torch.nn.functional as F
from common import Fuse, print_key, print_table, random_field

import equalize

SIZE, CHANNELS, IMAGES = 32, 16, 16


class AlignedFuse(Fuse):
    """Upsamples with align_corners=True."""

    def forward(self, first, *deeper):
        up = [F.interpolate(x, size=first.shape[2:], mode="bilinear", align_corners=True) for x in deeper]
        return self.fuse(torch.cat([first, *up], 1))


def theory(mode: str, factor: int, rho: float) -> float:
    """By what bilinear upsampling of SIZE x SIZE values multiplies the variance."""
    if mode == "nearest":
        return 1.0
    place = torch.arange(SIZE * factor, dtype=torch.float64)
    if mode == "bilinear, align_corners":
        source = place * (SIZE - 1) / (SIZE * factor - 1)
    else:
        source = ((place + 0.5) / factor - 0.5).clamp(0, SIZE - 1)
    t = source - source.floor()
    return float(1 - 2 * (1 - rho) * (t * (1 - t)).mean()) ** 2


def measured(mode: str, factor: int, deep: torch.Tensor) -> float:
    """The same by a calibration pass: variance of the branch over the variance of what was upsampled."""
    kind = AlignedFuse if "align" in mode else Fuse
    model = kind([1, CHANNELS], mode=mode.partition(",")[0])
    skip = torch.zeros(IMAGES, 1, SIZE * factor, SIZE * factor)
    sites = equalize.scan(model, (skip[:2], deep[:2])).sites
    branch = equalize.measure(model, sites, [(skip, deep)])["fuse"][1]
    return branch.var / float(deep.double().var(correction=0))


generator = torch.Generator().manual_seed(0)
rows, worst = [], 0.0
for rho in (0.0, 0.5, 0.9):
    deep = random_field((IMAGES, CHANNELS, SIZE, SIZE), rho, generator)
    for mode in ("bilinear", "bilinear, align_corners", "nearest"):
        pairs = [(measured(mode, factor, deep), theory(mode, factor, rho)) for factor in (2, 4, 8)]
        rows.append([rho, mode, *(f"{got:.3f} ({expected:.3f})" for got, expected in pairs)])
        worst = max(worst, *(abs(got - expected) for got, expected in pairs))
print_table(["rho", "upsampling", "x2: measured (theory)", "x4", "x8"], rows)
assert worst < 0.02, worst
print_key(float(rows[0][2].split()[0]))
