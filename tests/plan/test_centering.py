"""Claim C1 of docs/results.md: behind a normalization per channel, taking out means changes nothing in training.

Real modules on both sides: one step with equalizers that subtract the mean, one with equalizers that do not.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.networks import Equalizer

MEANS, STDS = [0.5, -7.0], [0.25, 3.0]
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, weight_decay=0.01),
    # eps: where a gradient is zero but for rounding, Adam must not make a step of it
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, eps=1e-6),
}
PER_CHANNEL = {
    "BatchNorm": lambda: nn.BatchNorm2d(6),
    "BatchNorm without affine": lambda: nn.BatchNorm2d(6, affine=False),
    "InstanceNorm": lambda: nn.InstanceNorm2d(6, affine=True),
    "GroupNorm of one channel": lambda: nn.GroupNorm(6, 6),
}


def step(norm: nn.Module, optimizer: str, *, centered: bool, padding: int = 0) -> tuple[torch.Tensor, nn.Module]:
    """Outputs after one step of training, (N, 3, H, W), and the network; all in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(
        Equalizer(MEANS if centered else [0.0, 0.0], STDS),
        nn.Conv2d(6, 6, 3, padding=padding, bias=False),
        norm,
        nn.ReLU(),
        nn.Conv2d(6, 3, 1),
    ).double()
    parts = (mean + std * torch.randn(4, width, 9, 9) for mean, std, width in zip(MEANS, STDS, (4, 2), strict=True))
    u = torch.cat(list(parts), 1).double()
    model.train()
    y = torch.randint(0, 3, model(u).select(1, 0).shape)
    updates = OPTIMIZERS[optimizer](model.parameters())
    F.cross_entropy(model(u), y).backward()
    updates.step()
    return model(u).detach(), model


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("norm", PER_CHANNEL)
def test_centering_is_no_op_behind_a_normalization_per_channel(norm, optimizer):
    out, model = step(PER_CHANNEL[norm](), optimizer, centered=True)
    other, twin = step(PER_CHANNEL[norm](), optimizer, centered=False)
    # rounding of float64 (1e-16), times the mean over the sigma (2) and the depth of the network
    torch.testing.assert_close(out, other, rtol=0, atol=1e-11)
    for (name, one), two in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-11, msg=name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("norm", "padding"),
    [(nn.Identity(), 0), (nn.GroupNorm(2, 6), 0), (nn.BatchNorm2d(6), 1)],
    ids=["no normalization", "GroupNorm", "BatchNorm, zero padding"],
)
def test_centering_counts_elsewhere(norm, padding, optimizer):
    """So that the test above can fail: without such a norm, and where zeros are padded beside means that are not."""
    out, _ = step(copy.deepcopy(norm), optimizer, centered=True, padding=padding)
    other, _ = step(copy.deepcopy(norm), optimizer, centered=False, padding=padding)
    assert (out - other).abs().max() > 1e-3 * out.std()
