"""Odd networks, traced: what the graph says of them, and that they are left as they were."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from equalize.errors import SiteError
from equalize.graph.export import trace
from equalize.moments import measure as measurement
from equalize.moments.measure import measure
from equalize.plan.apply import apply
from equalize.plan.strategies import make_plan
from equalize.sites.scan import Scan, scan
from equalize.sites.sites import find_sites
from tests.support.networks import batch_norm
from tests.support.tracers import exported_ops, graph_by, record


def up(x, factor=2.0):
    return F.interpolate(x, scale_factor=factor, mode="bilinear")


def half(x):
    return F.avg_pool2d(x, 2)


def conv(inputs, outputs, size=3, **options):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


class Net(nn.Module):
    """`low` at half size and `high`, fused; subclasses change the way."""

    def __init__(self):
        super().__init__()
        self.low, self.high, self.fuse = conv(3, 4), conv(3, 2), conv(6, 5)
        with torch.no_grad():
            self.high.weight *= 8

    def cat(self, x):
        return torch.cat([up(self.low(half(x))), self.high(x)], 1)

    def forward(self, x):
        return self.fuse(self.cat(x))


X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def scanned(model: nn.Module, x: torch.Tensor = X) -> Scan:
    """Scans, demands that export and a recorded run say the same, and that `migrate` keeps the function."""
    found = scan(model, x, kinds=("resampled", "plain"))
    assert (found.tracer, found.ran) == ("recorder", False)
    model.eval()
    for tracer in (exported_ops, record):
        assert find_sites(graph_by(tracer, model, (x,))) == (found.sites, found.refusals)
    with torch.no_grad():
        expected = model(x)
        if found.sites:
            apply(make_plan(model, found.sites, measure(model, found.sites, [x]), "migrate"), model)
        assert (model(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    return found


def summary(found: Scan):
    return [
        (site.layer, [(branch.stop - branch.start, branch.resampling) for branch in site.branches])
        for site in found.sites
    ]


BOTH = [("fuse", [(4, "bilinear"), (2, None)])]


def movable(found: Scan) -> list[bool]:
    return [branch.fixed is None for branch in found.sites[0].branches]


class NegativeAxis(Net):
    def cat(self, x):
        return torch.concat([up(self.low(half(x))), self.high(x)], dim=-3)


class Hstack(Net):
    def cat(self, x):
        return torch.hstack([up(self.low(half(x))), self.high(x)])


class SavesItsHead(Net):
    def state_dict(self, *args, **kwargs):
        return {key: value for key, value in super().state_dict(*args, **kwargs).items() if key.startswith("fuse.")}


class Stacked(Net):
    """Branches of one width, stacked and flattened."""

    def __init__(self):
        super().__init__()
        self.high, self.fuse = conv(3, 4), conv(8, 5)

    def cat(self, x):
        return torch.stack([up(self.low(half(x))), self.high(x)], dim=-4).flatten(1, 2)


class InPlace(Net):
    def cat(self, x):
        return torch.cat([up(F.relu_(self.low(half(x)))), F.leaky_relu_(self.high(x), 0.2)], 1)


class InPlaceUnused(Net):
    """The concat reads the tensor that was written to, not the result of the call."""

    def cat(self, x):
        high = self.high(x)
        F.relu_(high)
        return torch.cat([up(self.low(half(x))), high], 1)


class NoGrad(Net):
    def forward(self, x):
        with torch.no_grad():
            return self.fuse(self.cat(x))


class NoGradBranch(Net):
    def cat(self, x):
        with torch.no_grad():
            high = F.relu_(self.high(x))
        return torch.cat([up(self.low(half(x))), high], 1)


class Autocast(Net):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return F.relu(self.fuse(self.cat(x)))


class Dropped(Net):
    def forward(self, x):
        u = F.dropout2d(F.dropout(self.cat(x), 0.5, self.training), 0.5, self.training)
        return self.fuse(u.contiguous())


class Padded(Net):
    def __init__(self):
        super().__init__()
        self.fuse = nn.Conv2d(6, 5, 3)

    def forward(self, x):
        return self.fuse(F.pad(self.cat(x), (1, 1, 1, 1)))


class Out(Net):
    def cat(self, x):
        u = x.new_empty(len(x), 6, *x.shape[2:])
        torch.cat([up(self.low(half(x))), self.high(x)], 1, out=u)
        return u


class Cast(Net):
    """Export asserts the type before a cast."""

    def cat(self, x):
        return super().cat(x).double().float()


class Grown(Net):
    """A concat that begins with nothing, of either form."""

    def cat(self, x):
        u = torch.cat([x.new_empty(0), x[:, :0]], 1)
        for branch in (up(self.low(half(x))), self.high(x)):
            u = torch.cat([u, branch], 1)
        return u


def test_a_concat_with_an_empty_tensor_fuses_nothing():
    class Lone(Net):
        def cat(self, x):  # as smp's decoders do where an encoder lacks a level
            return torch.cat([up(self.low(half(x))).repeat(1, 2, 1, 1)[:, :6], x[:, :0]], 1)

    found = scanned(Lone())
    assert found.sites == ()
    assert refusal(found) == "has no concat of features"


@pytest.mark.parametrize("net", [Net, NegativeAxis, Hstack, InPlace, InPlaceUnused, NoGrad, NoGradBranch, Autocast,
                                 Dropped, Padded, Out, Cast, Grown, SavesItsHead])  # fmt: skip
def test_ways_to_write_the_same_network(net):
    torch.manual_seed(1)
    found = scanned(net())
    assert summary(found) == BOTH
    assert movable(found) == [True, True]
    assert found.refusals == ()
    assert found.sites[0].branches[0].producers == ("low.weight", "low.bias")
    assert found.sites[0].exact_border is False


class Twice(Net):
    def __init__(self):
        super().__init__()
        self.fuse = conv(8, 5)

    def cat(self, x):
        u = up(self.low(half(x)))
        return torch.cat([u, u], 1)


class SliceWritten(Net):
    """Some channels of the concat are overwritten through a view."""

    def forward(self, x):
        u = self.cat(x)
        u[:, :2].mul_(3)
        u[:, 3:4] = 0.5
        return self.fuse(u)


class BranchWritten(Net):
    """A branch is changed through a view of it before it is concatenated."""

    def cat(self, x):
        high = self.high(x)
        high.view(len(x), 2, -1).add_(1)
        return torch.cat([up(self.low(half(x))), high], 1)


class Residual(Net):
    def cat(self, x):
        low = up(self.low(half(x)))
        return torch.cat([low + F.gelu(low), self.high(x)], 1)


class WeightNormBehind(Net):
    def __init__(self):
        super().__init__()
        self.low = parametrizations.weight_norm(self.low)


class Rounded(Net):
    def cat(self, x):
        return torch.cat([up(self.low(half(x))), self.high(x).int().float()], 1)


class AsWeight(Net):
    """A branch is the kernel of a convolution too, as in cross-correlation."""

    def forward(self, x):
        high = self.high(x)
        kernel = high.mean((0, 2, 3)).view(1, 2, 1, 1)
        return self.fuse(torch.cat([up(self.low(half(x))), high], 1)) + F.conv2d(x[:, :2], kernel)


class AsShape(Net):
    """A branch lends its shape to what another layer reads."""

    def __init__(self):
        super().__init__()
        self.other, self.last = conv(3, 2), conv(2, 5)

    def forward(self, x):
        high = self.high(x)
        y = self.fuse(torch.cat([up(self.low(half(x))), high], 1))
        return y + self.last(self.other(x).flatten(2).view_as(high))


HELD = {AsWeight: [True, False], AsShape: [True, True], Rounded: [True, False],
        Twice: [False, False], SliceWritten: [False, False], BranchWritten: [True, False], Residual: [False, True],
        WeightNormBehind: [False, True]}  # fmt: skip


@pytest.mark.parametrize("net", HELD)
def test_branches_that_cannot_move(net):
    torch.manual_seed(1)
    found = scanned(net())
    assert movable(found) == HELD[net]
    assert found.sites[0].branches[0].resampling == "bilinear"


class Dense(nn.Module):
    """Every layer reads all that came before, as in DenseNet, but for the normalizations that would refuse them."""

    def __init__(self):
        super().__init__()
        self.low, self.high = conv(3, 4), conv(3, 2)
        self.first, self.second, self.fuse = conv(6, 3), conv(9, 3), conv(12, 5)

    def forward(self, x):
        u = torch.cat([up(self.low(half(x))), self.high(x)], 1)
        u = torch.cat([u, F.relu(self.first(u))], 1)
        u = torch.cat([u, F.relu(self.second(u))], 1)
        return self.fuse(u)


def test_nested_concats_are_one_list_of_branches():
    found = scanned(Dense())
    low, high, grown = (4, "bilinear"), (2, None), (3, None)
    assert summary(found) == [
        ("first", [low, high]),
        ("second", [low, high, grown]),
        ("fuse", [low, high, grown, grown]),
    ]
    assert [site.upstream for site in found.sites] == [(), ("first",), ("first", "second")]
    for site in found.sites:  # u is read by all; what a layer makes, by those behind it
        for branch, first in zip(site.branches, (0, 0, 1, 2), strict=False):
            behind = {each.weight for each in found.sites[first:]}
            assert {reader.weight for reader in branch.readers} == behind - {site.weight}


def refusal(found: Scan) -> str:
    assert found.sites == ()
    assert len(found.refusals) == 1
    return found.refusals[0].reason


class Recurrent(Net):
    def __init__(self):
        super().__init__()
        self.fuse = conv(6, 3)

    def forward(self, x):
        return self.fuse(self.cat(self.fuse(self.cat(x))))


class Tied(Net):
    def __init__(self):
        super().__init__()
        self.other = conv(6, 5)
        self.other.weight = self.fuse.weight

    def forward(self, x):
        return self.fuse(self.cat(x)) + self.other(up(self.cat(half(x))))


def test_weights_that_are_used_twice_are_refused():
    found = scanned(Recurrent())
    assert {each.reason for each in found.refusals} == {"fuse.weight is used 2 times"}
    found = scanned(Tied())
    assert found.sites == ()
    assert all("weight is used 2 times" in each.reason for each in found.refusals)
    assert len(found.refusals) == 2


class Standardized(Net):
    def forward(self, x):
        return F.conv2d(self.cat(x), self.fuse.weight - self.fuse.weight.mean())


class StillDropping(Net):
    def forward(self, x):
        return self.fuse(F.dropout(self.cat(x), 0.0, training=True))


class Product(Net):
    def forward(self, x):
        u = self.cat(x)
        return self.fuse(u * torch.sigmoid(u))


class PadByOnes(Net):
    def forward(self, x):
        return self.fuse(F.pad(self.cat(x), (1, 1, 1, 1), value=1.0))


class Flattened(nn.Module):
    """Channels and places mixed before a linear layer."""

    def __init__(self):
        super().__init__()
        self.fuse = nn.Linear(6 * 16, 3)

    def forward(self, x):
        small = F.adaptive_avg_pool2d(x, 4)
        return self.fuse(torch.cat([small, small * 2], 1).flatten(1))


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Standardized, "weight of"),
        (StillDropping, "its consumer dropout"),
        (Product, "is not linear"),
        (PadByOnes, "its consumer pad"),
        (Flattened, "its channels do not stay whole in flatten"),
    ],
)
def test_refusals(net, reason):
    assert reason in refusal(scanned(net()))


class Attention(Net):
    """Gates for channels and for places between the concat and the layer, as smp's scSE has them."""

    def gated(self, x):
        u = self.cat(x)
        return u * torch.sigmoid(u.mean((2, 3), keepdim=True)) + u * torch.sigmoid(u.mean(1, keepdim=True))

    def forward(self, x):
        return self.fuse(self.gated(x))


def test_a_layer_behind_an_attention_is_equalized_to_what_it_reads():
    net = Attention().eval()
    found = scan(net, X)
    (site,) = found.sites
    assert {branch.fixed for branch in site.branches} == {
        "it goes through mul in mul, which does not pass a change of scale on"
    }
    u = net.gated(X).detach()
    low, high = u[:, :4].std(correction=0), u[:, 4:].std(correction=0)
    expected = net.fuse(torch.cat([u[:, :4] / low, u[:, 4:] / high], 1))
    apply(make_plan(net, found, measure(net, found, [X]), "rescale", scale="paper"), net)
    torch.testing.assert_close(net(X), expected, rtol=1e-4, atol=1e-5)  # sums run in another order


def test_weights_that_are_concatenated_themselves_are_no_branches():
    class Weighed(Net):
        def forward(self, x):
            high, low = self.high(x), up(self.low(half(x)))
            weights = torch.cat([low.mean((2, 3), keepdim=True), high.mean((2, 3), keepdim=True)], 1)
            return self.fuse(torch.cat([low, high], 1) * weights)

    (site,) = scanned(Weighed()).sites
    assert [branch.resampling for branch in site.branches] == ["bilinear", None]


@pytest.mark.parametrize(
    "spread",
    [lambda g, a: g.expand(-1, -1, *a.shape[2:]), lambda g, a: g.expand_as(a), lambda g, a: g.repeat(1, 1, 16, 16)],
)
def test_what_is_copied_to_all_places_is_resampled_as_by_nearest_interpolation(spread):
    class Pooled(Net):
        def cat(self, x):
            high = self.high(x)
            whole = self.low(x).mean((2, 3), keepdim=True)
            return torch.cat([spread(whole, high.repeat(1, 2, 1, 1)), high], 1)

    (site,) = scanned(Pooled()).sites
    assert [(branch.resampling, branch.factor) for branch in site.branches] == [("nearest", (16, 16)), (None, (1, 1))]
    assert site.branches[0].producers == ("low.weight", "low.bias")


class Filled(Net):
    """Branches are written into their places instead of being concatenated."""

    def cat(self, x):
        u = x.new_zeros(len(x), 6, *x.shape[2:])
        u[:, :4] = up(self.low(half(x)))
        u[:, 4:] = self.high(x)
        return u


def test_what_is_filled_instead_of_concatenated_is_refused():
    assert refusal(scanned(Filled())) == "filled slice by slice, which cannot be followed as a concat can"


def test_what_is_written_into_a_part_of_a_tensor_leads_on():
    class Padded(Net):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(5)

        def forward(self, x):
            y = self.fuse(self.cat(x))
            wide = torch.zeros(len(x), 5, y.shape[2] + 2, y.shape[3] + 2)
            wide[:, :, 1:-1, 1:-1] = y
            return self.norm(wide)

    (site,) = scanned(Padded()).sites
    assert site.norms == ("norm.running_mean",)


class AttentionOfTorch(Net):
    """Its projections are no calls that can be watched."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        u = self.cat(x).flatten(2).transpose(1, 2)
        return self.attention(u, u, u)[0]


def test_projections_within_attention_are_refused():
    found = scan(AttentionOfTorch(), X)
    assert refusal(found) == "its consumer multi_head_attention in attention is not linear"


class Pooled(Net):
    def __init__(self, pool):
        super().__init__()
        self.pool, self.fuse = pool, nn.Linear(6, 5)

    def forward(self, x):
        return self.fuse(self.pool(self.cat(x)).flatten(1))


@pytest.mark.parametrize("pool", [nn.AdaptiveMaxPool2d(1), lambda u: u.mean((2, 3)), lambda u: u.mean(-1).mean(2)])
def test_what_is_pooled_before_the_layer_takes_the_scale_only(pool):
    found = scanned(Pooled(pool))
    assert summary(found) == BOTH
    assert movable(found) == [True, True]
    assert found.sites[0].shift is None
    assert found.refusals == ()


def test_means_over_channels_are_refused():
    class Mixed(Pooled):
        def cat(self, x):
            return super().cat(x).movedim(1, 3)

    found = scan(Mixed(lambda u: u.mean((1, 3)).repeat(1, 6)[:, :6]), X)
    assert refusal(found).startswith("its channels do not stay whole in mean")


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize(
    "normalize", [parametrizations.weight_norm, parametrizations.spectral_norm, torch.nn.utils.weight_norm]
)
def test_parametrized_weights_are_refused(normalize):
    model = Net()
    normalize(model.fuse)
    assert refusal(scanned(model)) == "the weight of fuse is not a plain parameter"


def test_attached_networks_are_refused_rather_than_equalized_twice():
    from equalize.plan.attach import attach

    model = Net()
    found = scan(model, X)
    attach(make_plan(model, found.sites, measure(model, found.sites, [X])), model)
    assert scan(model, X).sites == ()


class UNet(nn.Module):
    """Valid convolutions, transposed convolutions, skips cropped to the middle: the original."""

    def __init__(self, dims=2):
        super().__init__()
        layer, transposed = [(nn.Conv2d, nn.ConvTranspose2d), (nn.Conv3d, nn.ConvTranspose3d)][dims - 2]
        self.down1, self.down2 = layer(3, 4, 3), layer(4, 6, 3)
        self.up = transposed(6, 4, 2, stride=2)
        self.fuse = layer(8, 5, 3)
        self.pool = [F.max_pool2d, F.max_pool3d][dims - 2]

    def forward(self, x):
        skip = F.relu(self.down1(x))
        deep = self.up(F.relu(self.down2(self.pool(skip, 2))))
        margins = [(a - b) // 2 for a, b in zip(skip.shape[2:], deep.shape[2:], strict=True)]
        for axis, (margin, size) in enumerate(zip(margins, deep.shape[2:], strict=True), start=2):
            skip = skip.narrow(axis, margin, size)
        return self.fuse(torch.cat([skip, deep], 1))


@pytest.mark.parametrize(("dims", "size"), [(2, 18), (3, 14)])
def test_unets_with_transposed_convolutions_and_crops(dims, size):
    torch.manual_seed(2)
    found = scanned(UNet(dims), torch.randn(2, 3, *[size] * dims))
    assert summary(found) == [("fuse", [(4, None), (4, "transposed_conv")])]
    site = found.sites[0]
    assert site.branches[1].factor == (2.0,) * dims
    assert site.exact_border is True
    assert movable(found) == [True, True]
    assert [[reader.weight for reader in branch.readers] for branch in site.branches] == [["down2.weight"], []]
    assert site.kernel == (3,) * dims


@pytest.mark.parametrize(("dims", "mode"), [(1, "linear"), (3, "trilinear"), (3, "nearest"), (1, "nearest-exact")])
def test_one_and_three_dimensions(dims, mode):
    layer = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1]

    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.low, self.fuse = layer(3, 4, 2, stride=2), layer(7, 5, 1)

        def forward(self, x):
            return self.fuse(torch.cat([F.interpolate(self.low(x), scale_factor=2.0, mode=mode), x], 1))

    (site,) = scanned(Line(), torch.randn(2, 3, *[8] * dims)).sites
    assert site.branches[0].resampling == mode.removesuffix("-exact")
    assert site.branches[0].factor == (2.0,) * dims
    assert site.op == f"conv{dims}d"


def test_unbatched_inputs():
    class Shuffled(Net):
        def __init__(self):
            super().__init__()
            self.low, self.fuse = conv(3, 16), conv(6, 5)

        def cat(self, x):
            return torch.cat([F.pixel_shuffle(self.low(half(x)), 2), self.high(x)], -3)

    found = scanned(Shuffled(), X[0])
    assert summary(found) == [("fuse", [(4, "pixel_shuffle"), (2, None)])]
    assert [branch.factor for branch in found.sites[0].branches] == [(2.0, 2.0), (1.0, 1.0)]


def test_chunks_put_together_again_are_a_site_that_stays_put():
    class Shuffle(Net):
        def cat(self, x):
            first, second = super().cat(x).chunk(2, 1)
            return torch.cat([second, first], 1)

    found = scanned(Shuffle())
    assert [site.layer for site in found.sites] == ["fuse"]
    assert movable(found) == [False, False]
    assert "chunk" in found.refusals[0].reason


def test_stacks_are_concats_where_branches_stay_whole(monkeypatch):
    torch.manual_seed(1)
    monkeypatch.setattr(measurement, "_PAYS", 0)
    found = scanned(Stacked())
    assert summary(found) == [("fuse", [(4, "bilinear"), (4, None)])]
    assert movable(found) == [True, True]
    assert found.refusals == ()

    class Interleaved(Stacked):
        """Channels of both branches in turn."""

        def cat(self, x):
            return torch.stack([up(self.low(half(x))), self.high(x)], 2).flatten(1, 2)

    class ReadTwice(Stacked):
        def forward(self, x):
            u = torch.stack([up(self.low(half(x))), self.high(x)], 1)
            return self.fuse(u.flatten(1, 2)) + u.sum()

    class Tall(Stacked):
        """The channels of each branch under one another."""

        def __init__(self):
            super().__init__()
            self.fuse = conv(2, 5)

        def cat(self, x):
            return torch.stack([up(self.low(half(x))), self.high(x)], 1).flatten(2, 3)

    for net in (Interleaved, ReadTwice, Tall):
        assert scanned(net()).sites == ()


def test_a_chunk_of_a_resampled_tensor_is_a_resampled_branch():
    class Half(Net):
        def __init__(self):
            super().__init__()
            self.fuse = conv(4, 5)

        def cat(self, x):
            first, second = up(self.low(half(x))).chunk(2, 1)
            return torch.cat([first * torch.sigmoid(second), self.high(x)], 1)

    found = scanned(Half())
    assert summary(found) == [("fuse", [(2, "bilinear"), (2, None)])]
    assert found.sites[0].branches[0].source == "low"


def test_area_interpolation_is_resampling_and_pooling_is_not():
    class Area(Net):
        def cat(self, x):
            return torch.cat([F.interpolate(self.low(up(x)), size=(16, 16), mode="area"), self.high(x)], 1)

    class Pooled(Net):
        def __init__(self):
            super().__init__()
            self.pool = nn.AdaptiveAvgPool2d(16)

        def cat(self, x):
            return torch.cat([self.pool(self.low(up(x))), self.high(x)], 1)

    (site,) = scanned(Area()).sites
    assert (site.branches[0].resampling, site.branches[0].factor) == ("area", (0.5, 0.5))
    (site,) = scanned(Pooled()).sites
    assert site.kind == "plain"


NORMS = {  # behind the layer: the module, and where the means of the branches then go
    "BatchNorm": (lambda: nn.BatchNorm2d(5), None),
    "BatchNorm of the batch": (lambda: nn.BatchNorm2d(5, track_running_stats=False), None),
    "InstanceNorm": (lambda: nn.InstanceNorm2d(5), None),
    "InstanceNorm that tracks": (lambda: nn.InstanceNorm2d(5, affine=True, track_running_stats=True), None),
    "GroupNorm": (lambda: nn.GroupNorm(1, 5), "bias"),
    "GroupNorm of single channels": (lambda: nn.GroupNorm(5, 5), None),
    "LayerNorm": (lambda: nn.LayerNorm([5, 16, 16]), "bias"),
    "dropout, then BatchNorm": (lambda: nn.Sequential(nn.Dropout(), nn.BatchNorm2d(5)), None),
    "ReLU, then BatchNorm": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(5)), "bias"),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_per_channel_leave_nothing_to_shift(name):
    make, shift = NORMS[name]

    class Normed(Net):
        def __init__(self):
            super().__init__()
            self.after = make()

        def forward(self, x):
            return self.after(super().forward(x))

    (site,) = scanned(Normed()).sites
    assert site.shift == shift
    assert site.exact_border == (shift is None)


def test_functional_and_shared_norms_per_channel_leave_nothing_to_shift():
    class Functional(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(5))
            self.register_buffer("variance", torch.ones(5))

        def forward(self, x):
            return F.batch_norm(super().forward(x), self.mean, self.variance)

    (site,) = scanned(Functional()).sites
    assert site.shift is None

    class Shared(Net):
        """One BatchNorm for two layers: each call takes out the mean of what it is given."""

        def __init__(self):
            super().__init__()
            self.fuse, self.other, self.norm = conv(6, 5, bias=False), conv(3, 5), batch_norm(5)

        def forward(self, x):
            return self.norm(super().forward(x)) + self.norm(self.other(x))

    (site,) = scanned(Shared()).sites
    assert (site.norm, site.shift) == ("norm", None)


def test_tuples_of_inputs():
    class Pair(Net):
        def forward(self, x, y):
            return self.fuse(torch.cat([up(self.low(y)), self.high(x)], 1))

    (site,) = scan(Pair(), (X, half(X))).sites
    assert site.layer == "fuse"


def test_on_the_meta_device_from_an_example_elsewhere():
    with torch.device("meta"):
        model = Net()
    assert summary(scan(model, X)) == BOTH


class Keeping(Net):
    """Draws under a seed of its own; a hook and the forward pass share a list; a grid is kept for the next run."""

    def __init__(self):
        super().__init__()
        seen = self.seen = []
        self.low.register_forward_hook(lambda module, args, output: seen.append(output))
        self.kept = {"grids": {}}
        self.fuse = conv(7, 5)

    def cat(self, x):
        self.seen.clear()
        torch.manual_seed(0)
        grid = self.kept["grids"].setdefault("grid", torch.rand(1, 1, 16, 16))
        self.low(half(x))
        return torch.cat([up(self.seen[0]), self.high(x), grid.expand(len(x), -1, -1, -1)], 1)


def test_what_a_network_keeps_of_a_run_goes_with_it():
    torch.manual_seed(5)
    model = Keeping().eval()
    seen, random = model.seen, torch.get_rng_state()
    assert summary(scan(model, X)) == [("fuse", [(4, "bilinear"), (2, None), (1, None)])]
    assert model.seen is seen
    assert model.kept == {"grids": {}}
    assert torch.equal(torch.get_rng_state(), random)
    assert type(model(X)) is torch.Tensor


def test_inputs_that_are_no_tensors_are_refused():
    assert summary(scan(Net(), [X])) == BOTH
    for example in (X.numpy(), {"x": X}, [[X]]):
        with pytest.raises(SiteError, match=r"^example: must be a tensor or a tuple of tensors, got"):
            scan(Net(), example)


def test_torch_script_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.trace(Net(), X)
    with pytest.raises(SiteError, match="is TorchScript, which cannot be traced"):
        scan(model, X)


def test_what_can_neither_be_exported_nor_run_gives_both_reasons_and_is_left_as_it_was():
    class Dynamic(Net):
        def forward(self, x):
            if x.sum() > 0:  # depends on values
                return super().forward(x)
            raise LookupError("nothing to see")

    model = Dynamic().train()
    reasons = r"\(.+data.+\), and a run failed \(LookupError: nothing to see\)"
    with pytest.raises(SiteError, match=rf"^Dynamic: cannot be traced {reasons}, got input \[2, 3, 16, 16\]; give"):
        scan(model, torch.zeros(2, 3, 16, 16))
    with pytest.raises(SiteError, match=r"^Net: cannot be traced \([^()]+\), got input \[2, 4, 16, 16\]; give"):
        scan(Net(), torch.zeros(2, 4, 16, 16))  # one reason, once
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("given", [(), (torch.zeros(2, 3, 16, 16), torch.zeros(2, 16, 16))])
def test_other_inputs_than_the_forward_takes_are_said_to_be(given):
    with pytest.raises(SiteError, match="give the inputs that its forward takes, without labels"):
        scan(Net(), given)


def test_parameters_that_are_read_as_data_are_counted():
    class Penalty(Net):
        def forward(self, x):
            return super().forward(x) + self.high.weight.square().sum()

    graph = trace(Penalty(), X)
    assert graph.uses["high.weight"] == 2
    assert graph.uses["low.weight"] == 1
    found = scanned(Penalty())
    assert movable(found) == [True, False]


def test_a_scan_exports_nothing(monkeypatch):
    monkeypatch.setattr(torch.export, "export", None)
    assert summary(scan(Net(), X)) == BOTH


def test_shapes_and_modules_of_ops():
    graph = trace(Net(), X)
    assert graph.shapes["fuse.weight"] == (5, 6, 3, 3)
    convolutions = {op.module: op for op in graph.ops if op.kind == "convolution"}
    assert set(convolutions) == {"low", "high", "fuse"}
    assert convolutions["low"].shape == (2, 4, 8, 8)
    assert convolutions["low"].parameters == {"weight": "low.weight", "bias": "low.bias"}
    assert [op.kind for op in graph.ops if op.kind in {"input", "output"}] == ["input", "output"]
    assert len({op.name for op in graph.ops}) == len(graph.ops)
