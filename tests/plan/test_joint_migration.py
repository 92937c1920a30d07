"""Branches that several layers read: all of them follow when one is migrated, and the function stays."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from equalize.moments.measure import measure
from equalize.moments.measured import sigma_rms
from equalize.plan import strategies
from equalize.plan.attach import attach, fold
from equalize.plan.calibrate import calibrate
from equalize.plan.choose import choose
from equalize.plan.edits import Scale, ScaleInputs
from equalize.sites.scan import scan
from equalize.verify.function import check_function
from equalize.verify.tensors import check_planned
from tests.support.networks import CONVS, batch_norm

MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


class Block(nn.Module):
    """Two convolutions and a 1x1 shortcut that reads the same input, summed."""

    def __init__(self, inputs, outputs, dims=2):
        super().__init__()
        conv = CONVS[dims]
        self.block = nn.Sequential(
            conv(inputs, outputs, 3, padding=1),
            nn.ReLU(),
            conv(outputs, outputs, 3, padding=1),
            batch_norm(outputs, dims),
        )
        self.shortcut = nn.Sequential(conv(inputs, outputs, 1), batch_norm(outputs, dims))

    def forward(self, x):
        return self.block(x) + self.shortcut(x)


class ResUNet(nn.Module):
    """Skips through a layer of their own, as in the W-Net of lwnet; the upsampled ones through a 1x1 convolution."""

    def __init__(self, inputs=3, outputs=2, dims=2):
        super().__init__()
        conv = CONVS[dims]
        self.down = nn.ModuleList([Block(inputs, 4, dims), Block(4, 8, dims), Block(8, 8, dims)])
        self.bridge = nn.ModuleList([nn.Sequential(conv(width, width, 3, padding=1), nn.ReLU()) for width in (4, 8)])
        self.narrow = nn.ModuleList([conv(8, 4, 1), conv(8, 8, 1)])
        self.up = nn.ModuleList([Block(8, 4, dims), Block(16, 8, dims)])
        self.head = conv(4, outputs, 1)
        self.pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[dims]
        self.mode = MODES[dims]
        with torch.no_grad():
            for layer in self.narrow:
                layer.weight *= 6

    def forward(self, x):
        levels = [self.down[0](x)]
        for block in self.down[1:]:
            levels.append(block(self.pool(levels[-1], 2)))
        y = levels[2]
        for level in (1, 0):
            y = self.up[level](torch.cat([self.narrowed(level, y), self.bridge[level](levels[level])], 1))
        return self.head(y)

    def narrowed(self, level, y):
        return self.narrow[level](F.interpolate(y, scale_factor=2.0, mode=self.mode))


class Upsampled(ResUNet):
    """The same, resampled after the 1x1 convolution: what the sites of resampled branches are."""

    def narrowed(self, level, y):
        return F.interpolate(self.narrow[level](y), scale_factor=2.0, mode=self.mode)


class WNet(nn.Module):
    """Two U-Nets in a row: the second reads the image and what the first makes of it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Upsampled(3, 2), Upsampled(5, 2)

    def forward(self, x):
        first = self.first(x)
        return self.second(torch.cat([x, first], 1))


def pictures(dims):
    return torch.randn(3, 3, *(16,) * dims, generator=torch.Generator().manual_seed(dims))


def network(make, *args):
    torch.manual_seed(0)
    model = make(*args).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.num_batches_tracked += 1
    return model


@pytest.fixture(autouse=True)
def equalized(monkeypatch):
    """Random weights have little to gain: `auto` shall not leave them alone for it."""
    monkeypatch.setattr(strategies, "with_expectation", lambda site, *_: site)


@pytest.mark.parametrize(
    ("make", "dims", "sites"),
    [
        (lambda: Upsampled(dims=1), 1, 4),
        (Upsampled, 2, 4),
        (lambda: Upsampled(dims=3), 3, 4),
        (WNet, 2, 8),
    ],
    ids=["1-d", "2-d", "3-d", "W-Net"],
)
def test_both_readers_of_a_concat_migrate_together(make, dims, sites):
    original, x = network(make), pictures(dims)
    written = copy.deepcopy(original)
    plan = calibrate(written, [x], "auto")
    assert [site.strategy for site in plan.sites] == ["migrate"] * sites
    for block, shortcut in zip(plan.sites[::2], plan.sites[1::2], strict=True):
        assert shortcut.layer == block.layer.replace("block", "shortcut")
        assert shortcut.tau == pytest.approx(block.tau)
        assert block.tau == pytest.approx(sigma_rms(block.branches))  # of either: they read the same numbers
    # once: a producer that two sites share is scaled by one factor
    scaled = [edit.tensor for edit in plan.edits if isinstance(edit, Scale)]
    assert len(scaled) == len(set(scaled))
    inputs = [(edit.tensor, edit.start) for edit in plan.edits if isinstance(edit, ScaleInputs)]
    assert len(inputs) == len(set(inputs)) == 2 * sites
    check = check_function(original, written, plan, [x], lambda output: output)
    check_planned(copy.deepcopy(original), written, plan)
    assert 0 < check.max_abs_change < 1e-5
    for layer, branches in measure(written, plan.sites, [x]).items():
        (site,) = [site for site in plan.sites if site.layer == layer]
        assert [branch.std for branch in branches] == pytest.approx([site.tau] * len(branches), rel=1e-4)
        assert max(branch.std for branch in site.branches) / min(branch.std for branch in site.branches) > 1.2


def test_what_is_read_before_it_is_resampled_is_no_site_of_resampled_branches():
    assert scan(network(ResUNet), pictures(2)).sites == ()


def test_both_readers_can_be_trained_through():
    model, x = network(Upsampled), pictures(2)
    plan = calibrate(model, [x], "migrate")
    before = model(x)
    attach(plan, model)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)  # V and back: two roundings
    fold(model)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)


def test_a_site_alone_takes_the_other_reader_along():
    """--sites names the blocks alone; the shortcuts' weights follow all the same."""
    original, x = network(Upsampled), pictures(2)
    found = scan(original, x)
    blocks = tuple(site for site in found.sites if ".block." in site.layer)
    written = copy.deepcopy(original)
    plan = calibrate(written, [x], "migrate", found=replace(found, sites=blocks))
    assert len(plan.sites) == 2
    assert "up.0.shortcut.0.weight" in plan.changed
    check_function(original, written, plan, [x], lambda output: output)


class Dense(nn.Module):
    """U-Net++: a node is read by several later concats, at its own size and upsampled."""

    def __init__(self):
        super().__init__()
        self.x00, self.x10, self.x20 = (nn.Conv2d(width, 4, 3, padding=1) for width in (3, 4, 4))
        self.x01, self.x11, self.x02 = (nn.Conv2d(width, 4, 3, padding=1) for width in (8, 8, 12))
        with torch.no_grad():
            self.x10.weight *= 5
            self.x01.weight *= 3

    def forward(self, x):
        x00 = self.x00(x).relu()
        x10 = self.x10(F.max_pool2d(x00, 2)).relu()
        x20 = self.x20(F.max_pool2d(x10, 2)).relu()
        x01 = self.x01(torch.cat([x00, up(x10)], 1)).relu()
        x11 = self.x11(torch.cat([x10, up(x20)], 1)).relu()
        return self.x02(torch.cat([x00, x01, up(x11)], 1))


def up(x):
    return F.interpolate(x, scale_factor=2.0, mode="bilinear")


@pytest.mark.parametrize("strategy", ["auto", "migrate", "preserve"])
def test_sites_that_share_some_branches_move_each_of_them_once(strategy):
    original, x = network(Dense), pictures(2)
    written = copy.deepcopy(original)
    plan = calibrate(written, [x], strategy)
    assert [site.layer for site in plan.sites] == ["x01", "x11", "x02"]
    scaled = [edit.tensor for edit in plan.edits if isinstance(edit, Scale)]
    assert len(scaled) == len(set(scaled)) == (0 if strategy == "preserve" else len(scaled))
    check_function(original, written, plan, [x], lambda output: output)
    after = measure(written, plan.sites, [x])
    for site in plan.sites:
        stds = [branch.std for branch in after[site.layer]]
        expected = [b.std / scale for b, scale in zip(site.branches, plan.input_scale(site), strict=True)]
        assert stds == pytest.approx(expected, rel=1e-5)
        if strategy != "preserve":  # x10 stays where x01 put it, and what x11 reads beside it comes there
            assert max(stds) / min(stds) == pytest.approx(1, rel=1e-4)


def test_auto_keeps_sites_apart_that_cannot_come_to_one_scale():
    """x10 upsampled and as it is have two scales, which one factor cannot bring to those of two other branches."""

    class Fixed(Dense):
        def forward(self, x):
            x00 = F.gelu(self.x00(x))
            x10 = self.x10(F.max_pool2d(x00, 2)).relu()
            x01 = self.x01(torch.cat([x00, up(x10)], 1)).relu()
            x11 = self.x11(torch.cat([x10, F.gelu(up(self.x20(F.max_pool2d(x10, 2))))], 1))
            return x01 + up(x11)

    original, x = network(Fixed), pictures(2)
    written = copy.deepcopy(original)
    plan = calibrate(written, [x], "auto")
    assert {site.layer: site.strategy for site in plan.sites} == {"x01": "migrate", "x11": "preserve"}
    assert plan.input_scale(plan.sites[1])[0] != 1  # its weights follow the branch that x01 moved
    assert math.isclose(plan.input_scale(plan.sites[1])[1], 1)
    check_function(original, written, plan, [x], lambda output: output)
    before = written(x)
    attach(plan, written)
    torch.testing.assert_close(written(x), before, rtol=1e-5, atol=1e-5)


def test_readers_whose_weights_were_drawn_hold_the_branch():
    model, x = network(Upsampled), pictures(2)
    drawn = {"up.0.shortcut.0.weight"}
    plan = calibrate(model, [x], "auto", newly_initialized=drawn)
    strategies = {site.layer: site.strategy for site in plan.sites}
    assert strategies["up.0.shortcut.0"] == "rescale"
    assert strategies["up.0.block.0"] == "preserve"
    assert strategies["up.1.block.0"] == strategies["up.1.shortcut.0"] == "migrate"
    found = scan(model, x)

    held = next(
        each for each in choose(found.sites, "auto", newly_initialized=drawn) if each.site.layer == "up.0.block.0"
    )
    for branch in held.site.branches:
        assert "feeds another layer too: up.0.shortcut.0, whose weights are drawn just now" in str(branch.fixed)


def test_sites_that_move_together_are_left_alone_together(monkeypatch):
    def expectation(site, *_):
        return replace(site, expect="gain" if site.layer == "up.1.block.0" else "nothing")

    monkeypatch.setattr(strategies, "with_expectation", expectation)
    plan = calibrate(network(Upsampled), [pictures(2)], "auto")
    assert {site.layer: site.strategy for site in plan.sites} == {
        "up.1.block.0": "migrate",
        "up.1.shortcut.0": "migrate",
        "up.0.block.0": "none",
        "up.0.shortcut.0": "none",
    }
