"""The two lines of the equation against the layers themselves, fed with equalized inputs."""

import pytest
import torch
import torch.nn.functional as F

from equalize.plan.equation import DiagonalMap, Geometry, shift_of


def convolve(groups=1, **options):
    return lambda u, w: F.conv2d(u, w, groups=groups, **options)


def transpose(groups=1, **options):
    return lambda u, w: F.conv_transpose2d(u, w, groups=groups, **options)


# name: shape of the weight, number of input channels, geometry, the layer
CASES = {
    "pointwise": ((5, 6, 1, 1), 6, (1, 1, False), convolve()),
    "3 x 3": ((5, 6, 3, 3), 6, (1, 1, False), convolve()),
    "grouped": ((4, 3, 3, 3), 6, (1, 2, False), convolve(2)),
    "depthwise": ((6, 1, 3, 3), 6, (0, 6, False), convolve(6)),
    "depthwise with multiplier": ((18, 1, 3, 3), 6, (0, 6, False), convolve(6)),
    "transposed": ((6, 5, 3, 3), 6, (0, 1, True), transpose(padding=2)),
    "transposed, grouped": ((6, 4, 3, 3), 6, (0, 3, True), transpose(3, padding=2)),
    "linear": ((5, 6), 6, (1, 1, False), lambda u, w: F.linear(u.movedim(1, -1), w).movedim(-1, 1)),
    "1-d": ((5, 6, 3), 6, (1, 1, False), lambda u, w: F.conv1d(u.flatten(2), w)),
    "3-d": ((5, 6, 2, 2, 2), 6, (1, 1, False), lambda u, w: F.conv3d(u.unflatten(3, (3, 3)), w)),
}


@pytest.mark.parametrize("case", CASES)
def test_folding_equals_equalizing_the_input(case):
    shape, channels, (axis, groups, transposed), layer = CASES[case]
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(shape, generator=generator, dtype=torch.float64)
    mean = torch.randn(channels, generator=generator, dtype=torch.float64) * 5
    std = torch.rand(channels, generator=generator, dtype=torch.float64) + 0.1
    u = torch.randn(2, channels, 7, 9, generator=generator, dtype=torch.float64)
    equalized = (u - mean.view(1, -1, 1, 1)) * 0.7 / std.view(1, -1, 1, 1)
    geometry = Geometry(axis=axis, groups=groups, transposed=transposed)
    input_map = DiagonalMap(factor_I=0.7 / std, geometry=geometry)
    w = input_map.fold(v)
    shift = shift_of(w, mean, geometry)
    assert w.shape == v.shape
    expected = layer(equalized, v)
    folded = layer(u, w)
    torch.testing.assert_close(folded - shift.view(1, -1, *[1] * (folded.ndim - 2)), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(input_map.unfold(w), v)


def test_dtype_and_gradient_stay_with_the_weight():
    geometry = Geometry(axis=1, groups=1, transposed=False)
    v = torch.randn(3, 4, 1, 1, requires_grad=True)
    w = DiagonalMap(factor_I=torch.full((4,), 0.25, dtype=torch.float64), geometry=geometry).fold(v)
    assert w.dtype == torch.float32
    w.sum().backward()
    assert v.grad is not None
    assert torch.equal(v.grad, torch.full_like(v, 0.25))  # powers of two
