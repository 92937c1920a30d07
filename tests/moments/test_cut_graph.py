"""The cut graph gives the moments that the whole network's tensors have."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import equalize
from equalize.moments import measure as measurement
from equalize.moments.cut_graph import CutGraph
from equalize.moments.interpolated import Interpolation, interpolated_moments
from tests.support.tolerance import assert_same_moments

ONE_AXIS = {
    "bilinear": "upsample_linear1d",
    "nearest": "upsample_nearest1d",
    "nearest-exact": "_upsample_nearest_exact1d",
}


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        ((7, 5), {"size": (20, 31), "mode": "bilinear", "align_corners": False}),
        ((7, 5), {"size": (20, 31), "mode": "bilinear", "align_corners": True}),
        ((1, 1), {"size": (20, 31), "mode": "bilinear", "align_corners": False}),
        ((16, 12), {"size": (5, 7), "mode": "bilinear", "align_corners": False}),
        ((16, 12), {"size": (1, 1), "mode": "bilinear", "align_corners": True}),
        ((16, 12), {"size": (5, 7), "mode": "bilinear", "align_corners": True}),
        ((16, 12), {"size": (16, 12), "mode": "bilinear", "align_corners": False}),
        ((16, 12), {"size": (32, 36), "mode": "nearest"}),
        ((1, 1), {"size": (20, 31), "mode": "nearest"}),
        ((9, 9), {"scale_factor": 2.5, "mode": "bilinear", "align_corners": False}),
        ((9, 11), {"scale_factor": (1.7, 2.3), "mode": "nearest"}),
        ((9, 11), {"size": (4, 25), "mode": "nearest"}),
        ((9, 11), {"size": (13, 40), "mode": "nearest-exact"}),
    ],
)
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_moments_from_the_source_are_those_of_the_interpolated_tensor(source, arguments, mean):
    torch.manual_seed(0)
    x = torch.randn(3, 8, *source) + mean
    whole = F.interpolate(x.double(), **arguments)
    factor = arguments.get("scale_factor")
    scales = (factor, factor) if isinstance(factor, float) else factor
    found = interpolated_moments(
        x,
        Interpolation(
            operator=ONE_AXIS[arguments["mode"]],
            size=tuple(whole.shape[2:]),
            align_corners=arguments.get("align_corners"),
            scales=scales,
        ),
    )
    rows = whole.flatten(1)
    std = rows.std(1, correction=0)
    assert found.count == rows.shape[1]
    assert ((found.mean_N - rows.mean(1)).abs() / std).max() < 1e-6
    assert ((found.m2_N / found.count).sqrt() / std - 1).abs().max() < 1e-6


class Pyramid(nn.Module):
    """Branches that are interpolated, left alone, written into in place; a head that would be a waste to run."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.fuse = nn.Conv2d(24, 8, 1)
        self.again = nn.Conv2d(16, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 2, 1)
        self.head_ran = 0
        self.head.register_forward_hook(self._count)

    def _count(self, *_):
        self.head_ran += 1

    def forward(self, x):
        a = F.relu(self.stem(x), inplace=True)
        b = self.down(a)
        up = F.interpolate(b, size=a.shape[2:], mode="bilinear", align_corners=False)
        twice = F.interpolate(b, scale_factor=2.0, mode="nearest")
        y = self.fuse(torch.cat([a, torch.cat([up, twice], 1)], 1)).relu_()
        y = y.add_(a)
        z = torch.cat([y, F.interpolate(y.mean((2, 3), keepdim=True), size=y.shape[2:])], 1)
        return self.head(self.again(F.dropout(z, training=self.training)).relu_())


def by_both_ways(model, batches, monkeypatch):
    sites = equalize.scan(model, batches[0], kinds=("resampled", "plain")).sites
    monkeypatch.setattr(measurement, "_PAYS", 1 << 62)
    whole = equalize.measure(model, sites, batches)
    monkeypatch.setattr(measurement, "_PAYS", 0)
    return sites, whole, equalize.measure(model, sites, batches)


def test_both_ways_agree_on_batches_of_any_size(monkeypatch):
    torch.manual_seed(0)
    model = Pyramid()
    sizes = [(2, 32, 24), (1, 32, 24), (3, 32, 24), (2, 16, 20)]
    batches = [torch.randn(n, 3, h, w) for n, h, w in sizes]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sites, whole, cut = by_both_ways(model, batches, monkeypatch)
    assert [site.layer for site in sites] == ["fuse", "again"]
    # Of 8 batches by hooks or the graph: the first of one image and of several by hooks, each way, and export's.
    assert model.head_ran <= 5
    assert model.training
    for layer, branches in whole.items():
        assert_same_moments(cut[layer], branches)
        assert {each.images for each in branches} == {8}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Variants(nn.Module):
    """Every way of interpolating to the same size, of which some can be measured from their source and some not."""

    WAYS = (
        {"scale_factor": 1.7, "mode": "bilinear"},
        {"scale_factor": 1.7, "mode": "bilinear", "recompute_scale_factor": True},
        {"scale_factor": 1.7, "mode": "bilinear", "align_corners": True},
        {"scale_factor": (1.7, 1.65), "mode": "nearest"},
        {"scale_factor": 1.7, "mode": "nearest", "recompute_scale_factor": True},
        {"scale_factor": 1.7, "mode": "nearest-exact"},
        {"scale_factor": 1.7, "mode": "bicubic"},
        {"size": (15, 18), "mode": "bilinear", "antialias": True},
        {"size": (15, 18), "mode": "bicubic", "align_corners": True, "antialias": True},
        {"size": (15, 18), "mode": "area"},
    )

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2), nn.ReLU())
        self.fuse = nn.Conv2d(2 * len(self.WAYS), 4, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.fuse(torch.cat([F.interpolate(x, **way) for way in self.WAYS], 1))


@pytest.mark.parametrize("last", [1, 2])
def test_both_ways_agree_on_every_way_of_interpolating(last, monkeypatch):
    torch.manual_seed(0)
    model = Variants()
    model.stem[1].running_mean.normal_()
    batches = [3 + torch.randn(number, 3, 9, 11) for number in (3, 3, last)]
    _, whole, cut = by_both_ways(model, batches, monkeypatch)
    assert_same_moments(cut["fuse"], whole["fuse"])
    assert {each.images for each in whole["fuse"]} == {6 + last}


def test_the_cut_graph_sees_weights_as_they_are_now():
    torch.manual_seed(0)
    model = Pyramid().eval()
    x = torch.randn(2, 3, 32, 24)
    sites = equalize.scan(model, x).sites
    cut = CutGraph(model, sites, (x,))
    with torch.no_grad():
        first = cut([x])["fuse"].moments[0]
        model.stem.weight.mul_(2)
        model.stem.bias.mul_(2)
        second = cut([x])["fuse"].moments[0]
    assert torch.allclose(second.m2_N, 4 * first.m2_N, rtol=1e-5)


def test_images_of_bytes_that_the_network_itself_converts(monkeypatch):
    class Converts(Pyramid):
        def forward(self, x):
            return super().forward(x / 255 if x.dtype == torch.uint8 else x)

    torch.manual_seed(0)
    model = Converts().eval()
    batches = [torch.randint(0, 256, (number, 3, 32, 24), dtype=torch.uint8) for number in (3, 2, 1)]
    sites, whole, cut = by_both_ways(model, [*batches, batches[0] / 255], monkeypatch)
    for layer, branches in whole.items():
        assert_same_moments(cut[layer], branches)
    assert measurement.measure_branches(model, sites, batches).method == "cut graph"


def test_a_network_for_one_batch_size_falls_back_to_hooks(monkeypatch):
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fuse = nn.Conv2d(6, 4, 1)

        def forward(self, x):
            assert x.shape[0] in (2, 3)
            x = x * 2 if x.shape[0] == 2 else x * 3
            low = F.interpolate(F.avg_pool2d(x, 2), size=x.shape[2:])
            return self.fuse(torch.cat([x, low], 1))

    batches = [torch.randn(2, 3, 8, 8), torch.randn(3, 3, 8, 8)]
    _, whole, cut = by_both_ways(Fixed(), batches, monkeypatch)
    assert cut == whole  # to the last bit: hooks on the same batches both times


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low, self.high, self.fuse = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 2, 1), nn.Conv2d(6, 5, 1)

    def forward(self, x):
        low, high = self.low(F.avg_pool2d(x, 2)), self.high(x)
        return self.fuse(torch.cat([F.interpolate(low, size=x.shape[2:]), high], 1))


class ViewWritten(Small):
    """A branch changes through a view that was taken before it was last written."""

    def forward(self, x):
        low, high = self.low(F.avg_pool2d(x, 2)), self.high(x)
        view = high[:, 0]
        high.add_(1)
        view.mul_(3)
        return self.fuse(torch.cat([F.interpolate(low, size=x.shape[2:]), high], 1))


class ConcatWritten(Small):
    def forward(self, x):
        low, high = self.low(F.avg_pool2d(x, 2)), self.high(x)
        u = torch.cat([F.interpolate(low, size=x.shape[2:]), high], 1)
        u[:, :1].mul_(3)
        return self.fuse(u)


class Aliased(Small):
    """Writes reach tensors through other names of their memory, by operators that are no views by name."""

    def forward(self, x):
        low, high = self.low(F.avg_pool2d(x, 2)), self.high(x)
        flat = low.flatten(2)
        low.relu_().add_(1)
        flat.mul_(3)
        high.contiguous().mul_(2)
        high.chunk(2, 1)[0].add_(1)
        low, high = F.interpolate(low, size=x.shape[2:], mode="bicubic"), high + 0
        return self.fuse(torch.cat([low, high], 1))


def test_writes_under_other_names_are_kept(monkeypatch):
    torch.manual_seed(0)
    model = Aliased().eval()
    batches = [torch.randn(2, 3, 8, 8)]
    sites = equalize.scan(model, batches[0]).sites
    expected = equalize.measure(model, sites, batches)["fuse"]
    monkeypatch.setattr(measurement, "_PAYS", 0)
    measured = measurement.measure_branches(model, sites, batches)
    assert measured.method == "cut graph"
    for found, by_hooks in zip(measured.moments["fuse"], expected, strict=True):
        assert found.mean == pytest.approx(by_hooks.mean, rel=1e-5)
        assert found.std == pytest.approx(by_hooks.std, rel=1e-5)


class SizedByValues(Small):
    def forward(self, x):
        size = torch.full((), x.shape[-1]).item()
        low = F.interpolate(self.low(F.avg_pool2d(x, 2)), size=(size, size), mode="bilinear")
        return self.fuse(torch.cat([low, self.high(x)], 1))


@pytest.mark.parametrize("net", [ViewWritten, ConcatWritten, SizedByValues])
def test_what_the_cut_graph_cannot_follow_is_left_to_hooks(net, monkeypatch):
    torch.manual_seed(0)
    model = net().eval()
    batches = [torch.randn(2, 3, 8, 8)]
    sites = equalize.scan(model, batches[0]).sites
    expected = equalize.measure(model, sites, batches)
    monkeypatch.setattr(measurement, "_PAYS", 0)
    measured = measurement.measure_branches(model, sites, batches)
    assert measured.moments == expected  # hooks both times: the same kernels on the same images
    assert measured.method.startswith("hooks (")


def test_a_non_finite_value_names_the_image(monkeypatch):
    model = Pyramid()
    images = torch.randn(4, 3, 32, 24)
    sites = equalize.scan(model, images).sites
    images[2, 0, 0, 0] = float("nan")
    monkeypatch.setattr(measurement, "_PAYS", 0)
    with pytest.raises(equalize.EqualizeError, match=r"fuse.*image c\.png"):
        equalize.measure(model, sites, [images[:2], images[2:]], names=["a.png", "b.png", "c.png", "d.png"])
