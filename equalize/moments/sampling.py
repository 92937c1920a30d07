"""A few hundred positions of each image, and the values of a fusion layer's input channels there.

Positions are stratified over the layer's grid and depend on the image's index in the pass alone, so that neither the
split into batches nor the number of processes has a say. A branch that was interpolated is read from its source.

Shapes: N images, P positions, C channels, * spatial axes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from equalize.moments.interpolated import Interpolation
from equalize.moments.moments import promote

POSITIONS = 256
"""An image; all positions of a layer's grid where it has no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Values (N, P, C), float32 or float64, on any device, at positions of a layer's `grid`."""

    values_NPC: Tensor
    grid: tuple[int, ...]


def draw_fractions(first: int, images: int) -> Tensor:
    """Where to look in the images `first`, `first + 1`, ...: (N, P) in [0, 1), one in each P-th of a flattened grid."""
    generator = torch.Generator()
    drawn = [torch.rand(POSITIONS, generator=generator.manual_seed(first + image)) for image in range(images)]
    return (torch.arange(POSITIONS) + torch.stack(drawn)) / POSITIONS


def places_on(grid: Sequence[int], fractions_NP: Tensor) -> tuple[Tensor, ...]:
    """The index along each axis of `grid` for every position, (N, P) each; P is the grid's size if that is smaller."""
    size = torch.Size(grid).numel()
    if size <= POSITIONS:
        flat_NP = torch.arange(size, device=fractions_NP.device).expand(len(fractions_NP), -1)
    else:
        flat_NP = (fractions_NP * size).long().clamp_(max=size - 1)
    return torch.unravel_index(flat_NP, tuple(grid))


def sample(u: Tensor, fractions_NP: Tensor) -> Samples:
    """The values of u (N, C, *) at the positions; none if it has not one row for each image."""
    grid = tuple(u.shape[2:])
    if len(u) != len(fractions_NP):
        u, fractions_NP = u[:0], fractions_NP[:0]
    return Samples(values_NPC=promote(_read(u, places_on(grid, fractions_NP))), grid=grid)


def sample_interpolated(x: Tensor, fractions_NP: Tensor, interpolation: Interpolation) -> Samples:
    """The values of x (N, C, h, w) after an interpolation, from x alone: at most two entries along each axis."""
    if len(x) != len(fractions_NP):
        x, fractions_NP = x[:0], fractions_NP[:0]
    at_y_NP, at_x_NP = places_on(interpolation.size, fractions_NP)
    (rows_2H, weights_2H) = _neighbors(interpolation, 0, x.shape[2], x.device)
    (columns_2W, weights_2W) = _neighbors(interpolation, 1, x.shape[3], x.device)
    values_NPC = torch.zeros((), device=x.device)
    for rows_H, by_row_H in zip(rows_2H, weights_2H, strict=True):
        for columns_W, by_column_W in zip(columns_2W, weights_2W, strict=True):
            weight_NP = by_row_H[at_y_NP] * by_column_W[at_x_NP]
            corner_NPC = promote(_read(x, (rows_H[at_y_NP], columns_W[at_x_NP])))
            values_NPC = values_NPC + weight_NP.unsqueeze(-1) * corner_NPC
    return Samples(values_NPC=values_NPC, grid=interpolation.size)


def _read(u: Tensor, places: Sequence[Tensor]) -> Tensor:
    """u (N, C, *) at places (N, P) along each spatial axis: (N, P, C) in memory of its own."""
    image_N1 = torch.arange(len(places[0]), device=u.device).unsqueeze(1)
    return u.movedim(1, -1)[(image_N1, *places)]


@cache
def _neighbors(interpolation: Interpolation, axis: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The entries of an axis that each entry of the result is made of, (2, size) or (1, size), and their weights."""
    u = interpolation.matrix(axis, length)
    weights, entries = u.topk(min(2, length), dim=1)
    if not weights[:, 1:].any():
        weights, entries = weights[:, :1], entries[:, :1]
    assert torch.allclose(weights.sum(1), u.sum(1)), interpolation
    return entries.T.to(device), weights.T.float().to(device)


def labels_at(labels_NHW: Tensor, grid: Sequence[int], fractions_NP: Tensor) -> Tensor:
    """The label of each position, (N, P): that of the pixel nearest to its center."""
    sides = labels_NHW.shape[1:]
    places = places_on(grid, fractions_NP)
    pixels = [
        ((2 * at + 1) * side).div(2 * on, rounding_mode="floor")
        for at, side, on in zip(places, sides, grid, strict=True)
    ]
    return labels_NHW[(torch.arange(len(labels_NHW)).unsqueeze(1), *pixels)]
