"""The whole job against the same done by hand: hooks, plain arithmetic, one level after the other."""

import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from equalize.errors import NumericsError, SiteError
from equalize.plan import indicator
from equalize.plan.apply import apply
from equalize.plan.attach import attach, fold
from equalize.plan.calibrate import calibrate
from equalize.sites.scan import scan
from tests.support.metal import MetalTensor, on_metal
from tests.support.networks import batch_norm


def block(inputs, outputs, size=3):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False), batch_norm(outputs), nn.ReLU()
    )


class Pyramid(nn.Module):
    """Two fusion layers one behind the other, as in UPerNet, and one beside them."""

    def __init__(self):
        super().__init__()
        self.stem = block(3, 4)
        self.deep = block(4, 6)
        self.pool = block(6, 3, 1)
        self.first = block(9, 4)  # deep and its pyramid
        self.lateral = block(4, 4, 1)
        self.side = nn.Conv2d(10, 2, 1)  # deep and stem: beside the others
        self.last = block(8, 5)
        self.classifier = nn.Conv2d(5, 3, 1)

    def forward(self, x):
        stem = self.stem(x)
        deep = 3 * self.deep(F.max_pool2d(stem, 2)) + 1
        pooled = F.interpolate(self.pool(F.adaptive_avg_pool2d(deep, 2)), size=deep.shape[2:], mode="bilinear")
        first = self.first(torch.cat([deep, pooled], 1))
        side = self.side(torch.cat([F.interpolate(deep, scale_factor=2.0), stem], 1))
        last = self.last(torch.cat([self.lateral(stem), F.interpolate(first, scale_factor=2.0)], 1))
        return self.classifier(last), side


def network():
    torch.manual_seed(0)
    return Pyramid().eval()


def batches():
    return list(torch.randn(9, 3, 16, 16, generator=torch.Generator().manual_seed(1)).split([4, 2, 3]))


def run(model, data):
    model.eval()
    with torch.no_grad():
        return [model(x) for x in data]


def entering(model, layer, data):
    """All that enters `layer`, in float64."""
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    run(model, data)
    handle.remove()
    return torch.cat(seen)


def by_hand(model, layer, ranges, data):
    """W sigma_rms/sigma and the shift into the bias, from the definition; BatchNorms behind are re-estimated later."""
    u = entering(model, layer, data)
    weight = layer.weight.detach().double().clone()
    shift = torch.zeros(weight.shape[0], dtype=torch.float64)
    parts = [u[:, start:stop] for start, stop in ranges]
    rms = torch.cat([part.var(correction=0).expand(part.shape[1]) for part in parts]).mean().sqrt()
    for (start, stop), part in zip(ranges, parts, strict=True):
        mean, std = part.mean(), part.std(correction=0)
        weight[:, start:stop] *= rms / std
        shift += mean * weight[:, start:stop].sum((1, 2, 3))
    with torch.no_grad():
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias -= shift


def re_estimate(model, norm, data):
    """Population statistics of one BatchNorm's input, everything before it as it stands."""
    u = entering(model, norm, data)
    with torch.no_grad():
        norm.running_mean.copy_(u.mean((0, 2, 3)))
        norm.running_var.copy_(u.var((0, 2, 3), correction=0))
        norm.num_batches_tracked.fill_(len(data))


def naive(model, data):
    by_hand(model, model.first[0], [(0, 6), (6, 9)], data)
    re_estimate(model, model.first[1], data)  # the last fusion layer is measured behind this one
    by_hand(model, model.side, [(0, 6), (6, 10)], data)
    by_hand(model, model.last[0], [(0, 4), (4, 8)], data)
    re_estimate(model, model.last[1], data)


def assert_close(model, expected, rtol):
    state = model.state_dict()
    for key, value in expected.state_dict().items():
        difference = (state[key].double() - value.double()).abs().max()
        assert difference <= rtol * value.double().abs().max(), (key, float(difference))


@pytest.mark.parametrize("strategy", ["rescale", "reinit"])
def test_levels_are_measured_one_after_the_other(strategy):
    model, expected, data = network(), network(), batches()
    if strategy == "reinit":
        for seed, layer in enumerate([expected.first[0], expected.side, expected.last[0]], start=20):
            torch.manual_seed(seed)
            layer.reset_parameters()
    naive(expected, data)
    plan = calibrate(model, data, strategy, seed=20)
    assert [site.layer for site in plan.sites] == ["first.0", "side", "last.0"]
    assert_close(model, expected, 1e-5)
    assert plan.facts["images"] == 9
    untouched = {key for key in model.state_dict() if key not in plan.changed}
    start = network().state_dict()
    assert all(torch.equal(model.state_dict()[key], start[key]) for key in untouched)
    assert {key.split(".")[0] for key in plan.changed} == {"first", "side", "last"}


def test_measuring_all_at_once_would_be_another_result():
    """What the level-by-level order is for; if this fails, the network above shows nothing."""
    model, data = network(), batches()
    before = entering(model, model.last[0], data)[:, 4:].std()
    by_hand(model, model.first[0], [(0, 6), (6, 9)], data)
    re_estimate(model, model.first[1], data)
    assert abs(entering(model, model.last[0], data)[:, 4:].std() / before - 1) > 0.02


@pytest.mark.parametrize("strategy", ["preserve", "migrate"])
def test_strategies_that_keep_the_function_take_one_pass(strategy):
    model, data = network(), batches()
    expected = run(model, data)
    passes = []

    class Stream:
        def __iter__(self):
            passes.append(1)
            return iter(data)

    plan = calibrate(model, Stream(), strategy, found=scan(model, data[0]))
    assert len(passes) == 1
    assert not any(key.endswith(("running_mean", "running_var")) for key in plan.changed)
    for ours, theirs in zip(run(model, data), expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            if strategy == "preserve":
                assert torch.equal(a, b)  # the same weights on the same batches
            assert (a - b).abs().max() < 1e-5 * b.abs().max()


@pytest.mark.parametrize("strategy", ["auto", "reinit"])  # of one pass and of several
def test_one_shot_iterators(strategy):
    model, twin = network(), network()
    calibrate(twin, batches(), strategy)
    plan = calibrate(model, iter(batches()), strategy)
    assert plan.facts["images"] == 9
    assert_close(model, twin, 1e-6)


@pytest.mark.parametrize("strategy", ["rescale", "migrate", "auto"])
def test_what_is_kept_for_a_report_leaves_the_plan_as_it_is(strategy):
    kept = []
    plan, watched = (calibrate(network(), batches(), strategy, keep=each) for each in (None, kept.append))
    assert watched.edits == plan.edits  # the same kernels on the same shapes
    assert watched.sites == plan.sites
    assert [list(each.histograms) for each in kept] == [list(each.moments) for each in kept]
    assert all(each.statistics for each in kept)


def test_norms_that_never_saw_data_are_estimated_once_before_they_are_needed():
    model, expected, data, passes = network(), network(), batches(), []

    class Stream:
        def __iter__(self):
            passes.append(1)
            return iter(data)

    for net in (model, expected):
        for norm in (net.lateral[1], net.first[1], net.last[1]):
            norm.reset_running_stats()
    re_estimate(expected, expected.lateral[1], data)
    re_estimate(expected, expected.first[1], data)
    naive(expected, data)
    plan = calibrate(model, Stream(), "rescale", found=scan(model, data[0]))
    assert len(passes) == 5  # the lateral norm, two levels of sites and the norms behind each
    assert_close(model, expected, 1e-5)
    assert "lateral.1.running_var" in plan.changed
    fresh = network()
    for norm in (fresh.lateral[1], fresh.first[1], fresh.last[1]):
        norm.reset_running_stats()
    apply(plan, fresh)
    assert_close(fresh, model, 0)  # a plan replayed: float64 element by element, no sums


def test_norms_that_were_converted_without_their_counter_keep_their_statistics():
    model, data = network(), batches()
    for norm in (model.lateral[1], model.deep[1]):
        norm.num_batches_tracked.zero_()
    model.lateral[1].running_mean.zero_()
    model.deep[1].running_var.fill_(1)
    changed = calibrate(model, data, "rescale").changed
    assert "deep.1.running_mean" not in changed
    assert "lateral.1.running_mean" not in changed


def test_an_instance_norm_that_tracks_is_estimated_behind_rewritten_weights():
    model, data = network(), batches()
    model.last[1] = nn.InstanceNorm2d(5, track_running_stats=True)
    plan = calibrate(model, data, "rescale")
    assert {"last.1.running_mean", "last.1.running_var"} <= set(plan.changed)
    u = entering(model, model.last[1], data)
    torch.testing.assert_close(model.last[1].running_mean.double(), u.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.last[1].running_var.double(), u.var((0, 2, 3), correction=0), rtol=1e-5, atol=0)


class Functional(nn.Module):
    """A BatchNorm whose parameters are handed to torch's own function."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(5)

    def forward(self, x):
        norm = self.norm
        return torch.batch_norm(
            x, norm.weight, norm.bias, norm.running_mean, norm.running_var, False, 0.1, norm.eps, False
        )


def test_a_norm_that_is_called_as_a_function_is_estimated_and_a_hidden_one_is_refused():
    model, data = network(), batches()
    model.last[1] = Functional()
    assert "last.1.norm.running_var" in calibrate(model, data, "rescale").changed
    model = network()
    with warnings.catch_warnings(action="ignore"):  # torch.jit is deprecated
        model.last[1] = torch.jit.script(nn.Sequential(nn.BatchNorm2d(5)))
    with pytest.raises(SiteError, match=r"^last\.1\.0\.running_mean: .* was not seen when the network ran"):
        calibrate(model, data, "rescale")


class Refined(Pyramid):
    """A second BatchNorm between the first fusion layer and the last."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(*block(9, 4), *block(4, 4))


def test_every_norm_between_two_levels_is_estimated():
    torch.manual_seed(3)
    model = Refined().eval()
    expected, data = copy.deepcopy(model), [torch.cat(batches())]
    by_hand(expected, expected.first[0], [(0, 6), (6, 9)], data)
    re_estimate(expected, expected.first[1], data)
    re_estimate(expected, expected.first[4], data)
    by_hand(expected, expected.side, [(0, 6), (6, 10)], data)
    by_hand(expected, expected.last[0], [(0, 4), (4, 8)], data)
    re_estimate(expected, expected.last[1], data)
    calibrate(model, data, "rescale")
    assert_close(model, expected, 1e-5)


def test_preserve_leaves_norms_without_data_alone():
    model, data = network(), batches()
    model.lateral[1].reset_running_stats()
    assert calibrate(model, data, "preserve").changed == ()


def test_auto_with_drawn_layers_mixes_strategies(monkeypatch):
    """`last` was drawn: rescaled. `first` and `side` were trained: what can move comes to the scale of `deep`."""
    monkeypatch.setattr(indicator, "NOTHING", -math.inf)  # noise has nothing to be told
    model, expected, data = network(), network(), batches()
    plan = calibrate(model, data, "auto", newly_initialized={"last.0.weight", "classifier.weight"})
    by_hand(expected, expected.last[0], [(0, 4), (4, 8)], data)
    re_estimate(expected, expected.last[1], data)
    assert {site.layer: site.strategy for site in plan.sites} == {
        "first.0": "migrate",
        "side": "migrate",
        "last.0": "rescale",
    }
    pooled, stem = (entering(expected, layer, data) for layer in (expected.first[0], expected.side))
    with torch.no_grad():
        ratio = float(pooled[:, :6].std(correction=0) / pooled[:, 6:].std(correction=0))
        expected.first[0].weight[:, 6:] /= ratio
        expected.pool[1].weight *= ratio
        expected.pool[1].bias *= ratio
        ratio = float(stem[:, :6].std(correction=0) / stem[:, 6:].std(correction=0))
        for reader in (expected.side.weight[:, 6:], expected.deep[0].weight, expected.lateral[0].weight):
            reader /= ratio  # all that read the stem
        expected.stem[1].weight *= ratio
        expected.stem[1].bias *= ratio
    assert_close(model, expected, 1e-5)


def test_only_the_sites_that_were_found_are_touched():
    model, data = network(), batches()
    found = scan(model, data[0])
    only = type(found)(sites=found.sites[1:2], refusals=found.refusals, tracer=found.tracer)
    plan = calibrate(model, data, "rescale", found=only)
    assert plan.changed == ("side.weight", "side.bias")


def test_mode_and_random_state_stay():
    model, data = network(), batches()
    model.train()
    model.first.eval()
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    calibrate(model, data, "reinit")
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)


def test_convergence_is_reported_against_the_tolerance():
    data = batches()
    assert calibrate(network(), data, "preserve", tolerance=1e-9).facts["converged"] is False
    assert calibrate(network(), data, "preserve", tolerance=1.0).facts["converged"] is True
    assert calibrate(network(), data[0][:1].split(1), "preserve").facts["converged"] is False


def test_no_images():
    with pytest.raises(SiteError, match="hold no image"):
        calibrate(network(), [], "rescale")
    with pytest.raises(SiteError, match="hold no image"):
        calibrate(network(), iter(()), "preserve")


def test_bad_images_and_unknown_strategies_change_nothing():
    model, data = network(), batches()
    before = copy.deepcopy(model)
    data[1][0, 0, 0, 0] = math.inf
    with pytest.raises(NumericsError, match="image 4"):
        calibrate(model, data, "rescale")
    with pytest.raises(SiteError, match="is unknown"):
        calibrate(model, data, "equalise")
    assert_close(model, before, 0)


@pytest.mark.parametrize("fails_in", [0, 2, 4])
def test_a_later_pass_that_fails_leaves_the_network_as_it_was(fails_in):
    """In the pass for a BatchNorm without data, between two rewritten levels, and behind them."""
    model, data, passes = network(), batches(), []
    model.lateral[1].reset_running_stats()
    before = copy.deepcopy(model)

    class Stream:
        def __iter__(self):
            passes.append(1)
            bad = data[1].clone()
            bad[1, 0, 0, 0] = math.nan
            return iter([data[0], bad if len(passes) > fails_in else data[1]])

    where = {0: "lateral.1: gets non-finite values, got image 5"}.get(fails_in, "got image 5")
    with pytest.raises(NumericsError, match=where):
        calibrate(model, Stream(), "rescale", found=scan(model, data[0]))
    assert len(passes) == fails_in + 1
    assert_close(model, before, 0)


class Centered(Pyramid):
    """Has a buffer whose elements share memory."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(0.5).expand(1, 3, 1, 1))

    def forward(self, x):
        return super().forward(x - self.mean)


def test_a_buffer_that_cannot_be_written_to():
    assert calibrate(Centered().eval(), batches()[:1]).sites


def test_networks_without_sites_get_an_empty_plan():
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    plan = calibrate(model, [torch.randn(2, 3, 4, 4)], "rescale")
    assert (plan.sites, plan.edits) == ((), ())
    assert [refusal.reason for refusal in plan.refusals] == ["has no concat of features"]


def test_what_is_left_alone_does_not_hold_up_the_norms_behind(monkeypatch):
    """`first` is rewritten, `last` behind it is not: the BatchNorms of both are estimated all the same."""
    from equalize.plan import strategies

    def expectation(site, *_):
        return replace(site, expect="nothing" if site.layer == "last.0" else "gain", delta=0.0)

    monkeypatch.setattr(strategies, "with_expectation", expectation)
    model, expected, data = network(), network(), batches()
    drawn = {"first.0.weight", "side.weight", "last.0.weight"}
    plan = calibrate(model, data, "auto", newly_initialized=drawn)
    assert [site.strategy for site in plan.sites] == ["rescale", "rescale", "none"]
    assert plan.strategy == "auto"
    by_hand(expected, expected.first[0], [(0, 6), (6, 9)], data)
    by_hand(expected, expected.side, [(0, 6), (6, 10)], data)
    re_estimate(expected, expected.first[1], data)
    re_estimate(expected, expected.last[1], data)
    assert_close(model, expected, 1e-5)


@pytest.mark.parametrize("strategy", ["rescale", "migrate", "preserve"])
def test_a_device_without_float64(strategy):
    plain, metal = network(), on_metal(network())
    found = scan(plain, batches()[0])
    with pytest.raises(TypeError, match="float64"):
        metal.classifier.weight.double()
    expected = calibrate(plain, batches(), strategy, found=found)
    plan = calibrate(metal, [x.as_subclass(MetalTensor) for x in batches()], strategy, found=found)
    assert plan.edits == expected.edits  # the same kernels on the same shapes
    for key, tensor in plain.state_dict().items():
        assert torch.equal(metal.state_dict()[key].cpu(), tensor)
    attach(plan, metal)
    fold(metal)
    assert torch.equal(metal.last[0].weight.cpu(), plain.last[0].weight)
