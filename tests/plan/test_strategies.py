"""`rescale` and `reinit` against real equalizer modules; `migrate` against the network it must not change."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from equalize.errors import SiteError
from equalize.moments.measure import measure
from equalize.moments.moments import Moments
from equalize.plan.apply import apply
from equalize.plan.calibrate import calibrate
from equalize.plan.choose import choose
from equalize.plan.strategies import make_plan
from equalize.sites.scan import scan
from tests.support.networks import BRANCHES, Fusion, batch_norm, explicit, oracle_moments


class Case:
    def __init__(self, fuse, after=None, *, shift="bias", border=0, dims=2, size=9):
        self.fuse, self.after, self.shift, self.border, self.dims, self.size = fuse, after, shift, border, dims, size


CASES = {
    "pointwise with bias": Case(lambda: nn.Conv2d(6, 5, 1)),
    "pointwise before BatchNorm": Case(lambda: nn.Conv2d(6, 5, 1), lambda: batch_norm(5), shift=None),
    "pointwise, neither": Case(lambda: nn.Conv2d(6, 5, 1, bias=False), shift=None),
    "before GroupNorm": Case(lambda: nn.Conv2d(6, 4, 3), lambda: nn.GroupNorm(2, 4)),
    "before GroupNorm, no bias": Case(lambda: nn.Conv2d(6, 4, 1, bias=False), lambda: nn.GroupNorm(2, 4), shift=None),
    "before GroupNorm of single channels": Case(lambda: nn.Conv2d(6, 4, 1), lambda: nn.GroupNorm(4, 4), shift=None),
    "before LayerNorm": Case(lambda: nn.Conv2d(6, 5, 1), lambda: nn.LayerNorm([5, 9, 9])),
    "before InstanceNorm": Case(
        lambda: nn.Conv2d(6, 5, 3, padding=1), lambda: nn.InstanceNorm2d(5, affine=True), shift=None
    ),
    "before InstanceNorm that tracks": Case(
        lambda: nn.Conv2d(6, 5, 1), lambda: nn.InstanceNorm2d(5, track_running_stats=True), shift=None
    ),
    "padded with bias": Case(lambda: nn.Conv2d(6, 5, 3, padding=1), border=1),
    "padded with bias before BatchNorm": Case(lambda: nn.Conv2d(6, 5, 3, padding=1), lambda: batch_norm(5), shift=None),
    "padded before BatchNorm": Case(
        lambda: nn.Conv2d(6, 5, 3, padding=1, bias=False), lambda: batch_norm(5), shift=None
    ),
    "padded, neither": Case(lambda: nn.Conv2d(6, 5, 3, padding="same", bias=False), nn.ReLU, shift=None),
    "dilated": Case(lambda: nn.Conv2d(6, 5, 3, padding=2, dilation=2), border=2),
    "unpadded": Case(lambda: nn.Conv2d(6, 5, 3)),
    "reflected": Case(lambda: nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect")),
    "strided": Case(lambda: nn.Conv2d(6, 5, 2, stride=2)),
    "grouped": Case(lambda: nn.Conv2d(6, 4, 1, groups=2)),
    "grouped and padded before BatchNorm": Case(
        lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2, bias=False),
        lambda: batch_norm(4),
        shift=None,
    ),
    "depthwise": Case(lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), border=1),
    "depthwise, neither": Case(lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), shift=None),
    "depthwise with multiplier": Case(lambda: nn.Conv2d(6, 18, 3, groups=6)),
    "transposed": Case(lambda: nn.ConvTranspose2d(6, 5, 1)),
    "transposed 3 x 3": Case(lambda: nn.ConvTranspose2d(6, 5, 3, padding=1), border=1),
    "transposed and grouped": Case(lambda: nn.ConvTranspose2d(6, 4, 1, groups=2)),
    "transposed by two": Case(lambda: nn.ConvTranspose2d(6, 5, 2, stride=2), shift=None),
    "transposed by two, overlapping": Case(lambda: nn.ConvTranspose2d(6, 5, 4, stride=2, padding=1), shift=None),
    "linear": Case(lambda: nn.Linear(6, 5)),
    "linear, no bias": Case(lambda: nn.Linear(6, 5, bias=False), shift=None),
    "1-d": Case(lambda: nn.Conv1d(6, 5, 3, padding=1), border=1, dims=1),
    "1-d before BatchNorm": Case(lambda: nn.Conv1d(6, 5, 1), lambda: batch_norm(5, 1), shift=None, dims=1),
    "linear before BatchNorm": Case(lambda: nn.Linear(6, 5), lambda: batch_norm(5), shift=None),
    "3-d": Case(lambda: nn.Conv3d(6, 5, 3, padding=1), border=1, dims=3, size=5),
    "3-d before InstanceNorm": Case(
        lambda: nn.Conv3d(6, 5, 3, padding=1), lambda: nn.InstanceNorm3d(5), shift=None, dims=3, size=5
    ),
    "3-d depthwise": Case(lambda: nn.Conv3d(6, 6, 1, groups=6), dims=3, size=5),
}


def build(case: Case) -> tuple[Fusion, torch.Tensor]:
    torch.manual_seed(0)
    model = Fusion(case.fuse(), case.after and case.after(), case.dims).eval()
    return model, torch.randn(4, 3, *[case.size] * case.dims)


def planned(model, x, strategy, **options):
    sites = scan(model, x[:1], kinds=("resampled", "plain")).sites
    return make_plan(model, sites, measure(model, sites, x.split(3)), strategy, **options)


def interior(y: torch.Tensor, border: int) -> torch.Tensor:
    return y[(..., *[slice(border, -border or None)] * (y.ndim - 2))]


def rms(stds):
    """Of all channels that enter the fusion layer."""
    powers = [(stop - start) * std**2 for (start, stop), std in zip(BRANCHES, stds, strict=True)]
    return math.sqrt(sum(powers) / BRANCHES[-1][1])


@pytest.mark.parametrize("scale", ["step", "paper"])
@pytest.mark.parametrize("strategy", ["rescale", "reinit"])
@pytest.mark.parametrize("name", CASES)
def test_folded_weights_equal_explicit_equalizers(name, strategy, scale):
    case = CASES[name]
    model, x = build(case)
    means, stds = oracle_moments(model, x)
    start = copy.deepcopy(model)
    if strategy == "reinit":
        with torch.random.fork_rng():
            torch.manual_seed(7)
            start.fuse.reset_parameters()
    tau = rms(stds) if scale == "step" else 1.0
    twin = explicit(start, means if case.shift else [0.0, 0.0], [std / tau for std in stds])
    plan = planned(model, x, strategy, seed=7, scale=scale)
    (site,) = plan.sites
    assert plan.scale == scale
    assert site.tau == pytest.approx(tau, rel=1e-6)
    assert [(branch.start, branch.stop) for branch in site.branches] == list(BRANCHES)
    assert site.shift == case.shift
    apply(plan, model)
    with torch.no_grad():
        ours, expected = model(x), twin(x)
    size = expected.abs().max()
    assert (interior(ours, case.border) - interior(expected, case.border)).abs().max() < 5e-6 * size
    assert site.exact_border == (not case.border)
    if site.exact_border:
        assert (ours - expected).abs().max() < 5e-6 * size
    else:
        assert (ours - expected).abs().max() > 1e-3 * size  # padded with zeros, not with the means
    changed = {"fuse.weight"} | ({"fuse.bias"} if getattr(model.fuse, "bias", None) is not None else set())
    if case.shift is None and strategy == "rescale":
        changed -= {"fuse.bias"}
    assert set(plan.changed) == changed
    for key, value in start.state_dict().items():
        if key not in changed:
            assert torch.equal(model.state_dict()[key], value), key


def test_a_strided_transposed_layers_bias_is_drawn_but_not_shifted():
    model, x = build(CASES["transposed by two"])
    plan = planned(model, x, "reinit", seed=3)
    apply(plan, model)
    torch.manual_seed(3)
    fresh = nn.ConvTranspose2d(6, 5, 2, stride=2)
    assert torch.equal(model.fuse.bias, fresh.bias)  # one generator, one shape


def test_half_precision_weights_are_rounded_once():
    model, x = build(CASES["padded with bias"])
    plan = planned(model, x, "rescale")
    half = copy.deepcopy(model).half()
    weight = half.fuse.weight.detach().double()
    apply(plan, half)
    for branch, (start, stop) in zip(plan.sites[0].branches, BRANCHES, strict=True):
        expected = (weight[:, start:stop] * (plan.sites[0].tau / branch.std)).half()
        assert torch.equal(half.fuse.weight[:, start:stop], expected)  # float64 element by element, rounded once


def test_planning_changes_nothing():
    model, x = build(CASES["padded before BatchNorm"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    for strategy in ("auto", "migrate", "preserve", "reinit", "rescale"):
        planned(model, x, strategy)
    assert torch.equal(torch.get_rng_state(), random)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


# --- migrate ---------------------------------------------------------------------------------------------------


def up(x, factor=2):
    return F.interpolate(x, scale_factor=factor, mode="bilinear")


def conv(inputs, outputs, size=3, **options):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


class Net(nn.Module):
    """`build` makes the layers, `run` uses them; `moving` and `fixed` are the branches expected."""

    moving: tuple[int, ...] = ()
    fixed: tuple[int, ...] = ()
    untouched: tuple[str, ...] = ()

    def __init__(self):
        super().__init__()
        self.low = conv(3, 4)
        self.high = conv(3, 2)
        self.fuse = conv(6, 5)
        with torch.no_grad():
            self.low.weight *= 0.05
            self.high.bias += 2


class Plain(Net):
    moving = (0, 1)

    def forward(self, x):
        return self.fuse(torch.cat([up(self.low(F.avg_pool2d(x, 2))), self.high(x)], 1))


class Relu(Net):
    moving = (0, 1)

    def forward(self, x):
        low = F.leaky_relu(F.max_pool2d(self.low(x), 2), 0.1)
        return self.fuse(torch.cat([up(low), F.relu_(self.high(x))], 1))


class Gelu(Net):
    """The walk back from the second branch ends at GELU."""

    moving, fixed, untouched = (0,), (1,), ("high",)

    def forward(self, x):
        return self.fuse(torch.cat([up(self.low(F.avg_pool2d(x, 2))), F.gelu(self.high(x))], 1))


class Skip(Net):
    """The second branch also feeds a layer of the encoder, which follows."""

    moving = (0, 1)

    def __init__(self):
        super().__init__()
        self.deeper = conv(2, 3)

    def forward(self, x):
        skip = self.high(x)
        low = self.low(self.deeper(F.max_pool2d(skip, 2)))
        return self.fuse(torch.cat([up(low), skip], 1))


class Residual(Skip):
    """The second branch is also added to something that does not move."""

    moving, fixed, untouched = (0,), (1,), ("high", "deeper")

    def forward(self, x):
        skip = self.high(x)
        low = self.low(self.deeper(F.max_pool2d(skip + x[:, :2], 2)))
        return self.fuse(torch.cat([up(low), skip], 1))


class Norms(Net):
    """BatchNorm, LayerNorm over channels-last, GroupNorm: their affine parameters move, the layers before stay."""

    moving, untouched = (0, 1, 2), ("low", "high", "third")

    def __init__(self):
        super().__init__()
        self.batch_norm = batch_norm(4)
        self.layer_norm = nn.LayerNorm(2)
        self.third = conv(3, 4)
        self.group_norm = nn.GroupNorm(2, 4)
        self.fuse = conv(10, 5)
        with torch.no_grad():
            self.layer_norm.weight *= 7
            self.group_norm.bias += 1

    def forward(self, x):
        a = F.relu(self.batch_norm(self.low(F.avg_pool2d(x, 2))))
        b = self.layer_norm(self.high(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        c = F.relu(self.group_norm(self.third(F.avg_pool2d(x, 4))))
        return self.fuse(torch.cat([up(a), b, up(c, 4)], 1))


class Linears(Net):
    """SegFormer's projections: linear layers over tokens."""

    moving = (0, 1)

    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Linear(3, 4), nn.Linear(3, 2, bias=False)
        self.high.weight.data *= 9

    def tokens(self, x, linear):
        n, _, h, w = x.shape
        return linear(x.flatten(2).transpose(1, 2)).permute(0, 2, 1).reshape(n, -1, h, w)

    def forward(self, x):
        low = up(self.tokens(F.avg_pool2d(x, 2), self.low))
        return self.fuse(torch.cat([low, self.tokens(x, self.high)], 1))


class Frozen(Net):
    """No affine parameters: a norm without them, and the image itself."""

    moving, fixed = (0,), (1, 2)

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(2, affine=False)
        self.norm.running_var *= 9
        self.fuse = conv(9, 5)

    def forward(self, x):
        return self.fuse(torch.cat([up(self.low(F.avg_pool2d(x, 2))), self.norm(self.high(x)), x], 1))


class Nested(Net):
    """The inner concat is read again, by a layer that follows."""

    moving = (0, 1, 2)

    def __init__(self):
        super().__init__()
        self.third = conv(3, 3)
        self.third.weight.data *= 20
        self.fuse, self.other = conv(9, 5), conv(6, 5)

    def forward(self, x):
        inner = torch.cat([up(self.low(F.avg_pool2d(x, 2))), self.high(x)], 1)
        return self.fuse(torch.cat([inner, up(self.third(F.avg_pool2d(x, 2)))], 1)) + self.other(inner)


class NestedOnce(Nested):
    """The same, read once."""

    untouched = ("other",)

    def forward(self, x):
        inner = torch.cat([up(self.low(F.avg_pool2d(x, 2))), self.high(x)], 1)
        return self.fuse(torch.cat([inner, up(self.third(F.avg_pool2d(x, 2)))], 1))


class Resized(Nested):
    """A concat that is resampled as a whole is one branch, made by two layers."""

    moving, fixed, untouched = (0, 1), (), ("other",)

    def forward(self, x):
        small = F.avg_pool2d(x, 2)
        inner = torch.cat([self.low(small), self.high(small)], 1)
        return self.fuse(torch.cat([up(inner), self.third(x)], 1))


class Tied(Net):
    """One module makes both branches."""

    moving, fixed, untouched = (), (0, 1), ("high",)

    def __init__(self):
        super().__init__()
        self.fuse = conv(4, 5)

    def forward(self, x):
        return self.fuse(torch.cat([up(self.high(F.avg_pool2d(x, 2))), self.high(x)], 1))


class Penalized(Net):
    """The weight of a producer is also read as data."""

    moving, fixed, untouched = (0,), (1,), ("high",)

    def forward(self, x):
        y = self.fuse(torch.cat([up(self.low(F.avg_pool2d(x, 2))), self.high(x)], 1))
        return y * self.high.weight.norm()


class Transposed(Net):
    """Transposed and grouped layers, cropped and padded; the fusion layer is grouped as well."""

    moving = (0, 1)

    def __init__(self):
        super().__init__()
        self.low = nn.ConvTranspose2d(3, 4, 2, stride=2)
        self.high = nn.Conv2d(3, 2, 3)
        self.high.weight.data *= 30
        self.fuse = nn.Conv2d(6, 4, 3, groups=2)

    def forward(self, x):
        low = self.low(F.avg_pool2d(x, 2))[:, :, 1:-1, 1:-1]
        return self.fuse(F.pad(torch.cat([low, self.high(x)], dim=-3), (1, 1, 1, 1)))


class Depthwise(Net):
    moving = (0, 1)

    def __init__(self):
        super().__init__()
        self.low = conv(3, 16)
        self.fuse = nn.Conv2d(6, 12, 3, padding=1, groups=6, bias=False)

    def forward(self, x):
        return self.fuse(torch.cat([F.pixel_shuffle(self.low(F.avg_pool2d(x, 2)), 2), self.high(x)], 1))


NETS = [
    Plain, Relu, Gelu, Skip, Residual, Norms, Linears, Frozen, Nested, NestedOnce, Resized, Tied, Penalized, Transposed,
    Depthwise
]  # fmt: skip


@pytest.mark.parametrize("net", NETS)
def test_migrate_keeps_the_function_and_evens_the_scales(net):
    torch.manual_seed(1)
    model, x = net().eval(), torch.randn(5, 3, 16, 16)
    start = copy.deepcopy(model)
    site = next(site for site in scan(model, x[:1], kinds=("resampled", "plain")).sites if site.layer == "fuse")
    moving = tuple(place for place, branch in enumerate(site.branches) if branch.fixed is None)
    assert moving == net.moving
    assert tuple(place for place in range(len(site.branches)) if place not in moving) == net.fixed
    before = [moments.std for moments in measure(model, [site], [x])["fuse"]]
    plan = make_plan(model, [site], measure(model, [site], [x]), "migrate")
    apply(plan, model)
    with torch.no_grad():
        expected = start(x)
        assert (model(x) - expected).abs().max() < 1e-5 * expected.abs().max()
    after = [moments.std for moments in measure(model, [site], [x])["fuse"]]
    widths = [branch.stop - branch.start for branch in site.branches]
    tau = math.sqrt(sum(width * std**2 for width, std in zip(widths, before, strict=True)) / sum(widths))
    if net.fixed:  # which cannot be moved to it: their own geometric mean
        tau = math.prod(before[place] for place in net.fixed) ** (1 / len(net.fixed))
    assert not plan.sites or plan.sites[0].tau == pytest.approx(tau, rel=1e-6)
    for place in net.moving:
        assert after[place] == pytest.approx(tau, rel=1e-5)
        assert abs(after[place] / before[place] - 1) > 0.01  # or this network would show nothing
    for place in net.fixed:
        assert after[place] == before[place]  # the same weights on the same batch
    state = model.state_dict()
    for key, value in start.state_dict().items():
        if key.startswith(tuple(f"{name}." for name in net.untouched)) or key not in plan.changed:
            assert torch.equal(state[key], value), key
    if not net.moving:
        assert [refusal.at for refusal in plan.refusals] == ["fuse"]
        assert plan.edits == ()


def test_migrating_several_sites_at_once():
    class Two(Net):
        def __init__(self):
            super().__init__()
            self.last = conv(8, 3)
            self.side = conv(3, 3)

        def forward(self, x):
            first = F.relu(self.fuse(torch.cat([up(self.low(F.avg_pool2d(x, 2))), self.high(x)], 1)))
            return self.last(torch.cat([first, up(self.side(F.avg_pool2d(x, 2)))], 1))

    torch.manual_seed(2)
    model, x = Two().eval(), torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
    sites = scan(model, x[:1]).sites
    assert [site.layer for site in sites] == ["fuse", "last"]
    assert "fuse.weight" in sites[1].branches[0].producers
    apply(make_plan(model, sites, measure(model, sites, [x]), "migrate"), model)
    with torch.no_grad():
        assert (model(x) - expected).abs().max() < 1e-5 * expected.abs().max()
    for branches in measure(model, sites, [x]).values():
        assert branches[0].std == pytest.approx(branches[1].std, rel=1e-5)


# --- choosing and refusing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "drawn", "expected"),
    [
        (Plain, (), "migrate"),
        (Gelu, (), "migrate"),  # one fixed branch: the other comes to its scale
        (Frozen, (), "preserve"),  # two fixed branches of two scales
        (Nested, (), "migrate"),
        (Tied, (), "preserve"),
        (Plain, ("fuse.weight",), "rescale"),
        (Tied, ("fuse.weight",), "rescale"),
        (Plain, ("low.weight", "fuse.bias"), "migrate"),
    ],
)
def test_auto_takes_each_site_by_itself(net, drawn, expected):
    (site, *_) = [site for site in scan(net(), torch.zeros(1, 3, 16, 16)).sites if site.layer == "fuse"]
    (choice,) = choose([site], "auto", newly_initialized=drawn)
    assert choice.strategy == expected
    for strategy in ("migrate", "preserve", "reinit", "rescale"):
        choices = choose([site, site], strategy, 5, drawn)
        assert [(each.site, each.strategy, each.seed) for each in choices] == [(site, strategy, 5), (site, strategy, 6)]


def test_auto_says_what_each_site_got():
    torch.manual_seed(4)
    model, x = Nested(), torch.randn(2, 3, 16, 16)
    plan = planned(model, x, "auto", newly_initialized={"other.weight"})
    assert plan.strategy == "auto"
    assert {site.layer: site.strategy for site in plan.sites} == {"fuse": "preserve", "other": "rescale"}
    assert set(plan.changed) == {"other.weight", "other.bias"}


def test_sites_without_moments_are_named():
    model = Fusion(nn.Conv2d(6, 5, 1))
    found = scan(model, torch.zeros(2, 3, 8, 8))
    few = {"fuse": measure(model, found, [torch.randn(2, 3, 8, 8)])["fuse"][:1]}
    for moments in ({}, few):
        with pytest.raises(SiteError, match=r"^fuse: was not measured, got moments of . branches, expected 2"):
            make_plan(model, found, moments)


def test_sites_of_another_network_are_named():
    model, x = Fusion(nn.Conv2d(6, 5, 1)), torch.randn(2, 3, 8, 8)
    sites = scan(model, x).sites
    for call in (measure, lambda net, sites, batches: make_plan(net, sites, measure(model, sites, batches))):
        with pytest.raises(SiteError, match=r"^fuse\.weight: is not in this model; give the sites of a scan of this"):
            call(nn.Conv2d(3, 5, 1), sites, [x])


def test_unknown_kinds_of_sites():
    model, x = Fusion(nn.Conv2d(6, 5, 1)), torch.zeros(2, 3, 8, 8)
    with pytest.raises(SiteError, match=r"^kinds: has unknown names, got resample, expected resampled or plain"):
        scan(model, x, kinds=("resample",))
    assert scan(model, x, kinds="resampled").sites


def test_unknown_strategy():
    model, x = build(CASES["pointwise with bias"])
    with pytest.raises(SiteError, match="strategy: is unknown, got equalise, expected auto or migrate"):
        planned(model, x, "equalise")
    with pytest.raises(SiteError, match="scale: is unknown, got rms, expected step or paper"):
        planned(model, x, "rescale", scale="rms")


@pytest.mark.parametrize("strategy", ["preserve", "rescale", "reinit", "migrate"])
@pytest.mark.parametrize(("mean", "m2"), [(0.0, 0.0), (1.0, 1e-14), (0.0, 1e-14)])
def test_a_branch_without_spread_is_refused(strategy, mean, m2):
    model, x = build(CASES["padded with bias"])
    sites = scan(model, x[:1]).sites
    moments = {"fuse": [Moments(count=100, mean=mean, m2=m2), Moments(count=100, mean=0.0, m2=100.0)]}
    plan = make_plan(model, sites, moments, strategy)
    assert (plan.sites, plan.edits) == ((), ())
    (refusal,) = plan.refusals
    assert refusal.at == "fuse"
    assert "sigma of channels 0..4 (low) is near zero" in refusal.reason


def test_small_branches_are_served():
    """A hundred thousandth of the other branch is small, but not nothing."""
    model, x = build(CASES["padded with bias"])
    moments = {"fuse": [Moments(count=100, mean=0.0, m2=1e-8), Moments(count=100, mean=0.0, m2=100.0)]}
    assert make_plan(model, scan(model, x[:1]).sites, moments, "rescale").sites


def test_a_kernel_that_cannot_be_drawn_anew_is_refused():
    class Bare(Fusion):
        def __init__(self):
            super().__init__(nn.Identity())
            self.kernel = nn.Parameter(torch.randn(5, 6, 1, 1))

        def forward(self, x):
            return F.conv2d(self.features(x), self.kernel)

    torch.manual_seed(5)
    model, x = Bare(), torch.randn(2, 3, 8, 8)
    plan = planned(model, x, "reinit")
    assert plan.edits == ()
    assert "cannot be drawn anew" in plan.refusals[0].reason
    assert planned(model, x, "rescale").changed == ("kernel",)


def test_each_site_draws_under_its_own_seed():
    torch.manual_seed(6)
    model, x = Nested().eval(), torch.randn(2, 3, 16, 16)
    plan = planned(model, x, "reinit", seed=10)
    seeds = {edit.tensor: edit.seed for edit in plan.edits if edit.action == "draw"}
    layers = [site.layer for site in plan.sites]
    assert seeds == {f"{layer}.{name}": 10 + place for place, layer in enumerate(layers) for name in ("weight", "bias")}


def test_a_migrated_plan_knows_its_scales_for_every_geometry():
    """A depthwise layer with a channel multiplier reads each channel with several rows."""
    torch.manual_seed(0)
    for fuse in (nn.Conv2d(6, 12, 3, groups=6), nn.Conv2d(6, 4, 1, groups=2), nn.ConvTranspose2d(6, 4, 1, groups=2)):

        class Pair(nn.Module):
            def __init__(self, fuse):
                super().__init__()
                self.a, self.b, self.fuse = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 4, 1), fuse

            def forward(self, x):
                return self.fuse(torch.cat([self.a(x), F.interpolate(self.b(x), scale_factor=1.0)], 1))

        model, x = Pair(fuse), torch.randn(2, 3, 8, 8)
        plan = calibrate(model, [x], "migrate")
        (site,) = plan.sites
        after = measure(model, plan.sites, [x])["fuse"]
        for scale, branch, found in zip(plan.input_scale(site), site.branches, after, strict=True):
            assert scale != 1
            assert branch.std / scale == pytest.approx(found.std, rel=1e-5)
