"""Networks that only a run can read: what is recorded of it, and everything that follows."""

import copy
import functools
import json
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import equalize
from equalize.errors import ResourceError, SiteError
from equalize.graph.export import trace
from equalize.moments import measure as measurement
from equalize.moments.measure import measure
from equalize.plan.apply import apply
from equalize.plan.strategies import make_plan
from equalize.sites.scan import Scan, scan
from tests.support.networks import BRANCHES, Fusion, explicit, oracle_moments
from tests.support.tracers import exported_ops, record, record_fake, said_by

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Looped(Fusion):
    """As many refinements as a value says."""

    def features(self, x):
        low = self.low(x)
        for _ in range(int(x.abs().amax().clamp(1, 3).item())):
            low = F.relu(low) + 0.1
        return torch.cat([F.interpolate(low, size=x.shape[2:]), self.high(x)], 1)


class Listed(Fusion):
    """A size computed from values."""

    def features(self, x):
        fine = torch.isfinite(x)
        height, width = torch.stack([fine.any(3).sum(2).amax(), fine.any(2).sum(2).amax()]).tolist()
        return torch.cat([F.interpolate(self.low(x), size=(height, width)), self.high(x)], 1)


class Branching(Fusion):
    """Control flow on values, in Python."""

    def features(self, x):
        low = self.low(x) if x.std() > 0 else self.high(x)
        return torch.cat([F.interpolate(low, size=x.shape[2:]), self.high(x)], 1)


class Numpy(Fusion):
    """One branch leaves torch and comes back."""

    def features(self, x):
        high = torch.from_numpy(np.ascontiguousarray(self.high(x).numpy()[:, :, ::-1]))
        return torch.cat([F.interpolate(self.low(x), size=x.shape[2:]), high], 1)


class NumpyBefore(Fusion):
    """What is resampled came from numpy."""

    def features(self, x):
        low = torch.as_tensor(np.tanh(self.low(x).detach().numpy()))
        return torch.cat([F.interpolate(low, size=x.shape[2:], mode="nearest"), self.high(x)], 1)


class Masked(Fusion):
    """As many rows as there are large values."""

    def features(self, x):
        low = self.low(x)
        rows = low[:, :, low.mean((0, 1, 3)) > -1e9]
        return torch.cat([F.interpolate(rows, size=x.shape[2:]), self.high(x)], 1)


NETS = [Looped, Listed, Branching, Numpy, NumpyBefore, Masked]


def made(net, fuse=None):
    torch.manual_seed(0)
    return net(nn.Conv2d(6, 5, 1) if fuse is None else fuse).eval()


def recorded(model, x=X) -> Scan:
    found = scan(model, x)
    assert (found.tracer, found.ran) == ("recorder", True)
    return found


@pytest.mark.parametrize("net", NETS)
def test_what_only_a_run_can_read_goes_all_the_way(net, monkeypatch, capfd):
    """Scanned, measured (also where cutting the graph would pay), planned, applied, attached: against an oracle."""
    model = made(net)
    found = recorded(model)
    assert capfd.readouterr() == ("", "")  # export would print what it had come to
    (site,) = found.sites
    assert (site.layer, site.shift, site.exact_border) == ("fuse", "bias", True)
    assert [(each.start, each.stop, each.resampling) for each in site.branches] == [(0, 4, "nearest"), (4, 6, None)]
    assert site.branches[0].factor == (2.0, 2.0)

    for pays in (2**24, 0):
        monkeypatch.setattr(measurement, "_PAYS", pays)
        moments = measure(model, found.sites, [X, X[:1]])["fuse"]
    means, stds = oracle_moments(model, torch.cat([X, X[:1]]))
    torch.testing.assert_close([each.mean for each in moments], means, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close([each.std for each in moments], stds, rtol=1e-5, atol=1e-6)

    with torch.no_grad():
        expected = model(X)
        rescaled = copy.deepcopy(model)
        apply(make_plan(model, found.sites, {"fuse": moments}, "rescale", scale="paper"), rescaled)
        torch.testing.assert_close(rescaled(X), explicit(model, means, stds)(X), rtol=1e-4, atol=1e-4)
        for strategy in ("preserve", "auto", "migrate"):
            same = copy.deepcopy(model)
            apply(make_plan(model, found.sites, {"fuse": moments}, strategy), same)
            torch.testing.assert_close(same(X), expected, rtol=1e-4, atol=1e-4)

    attached = copy.deepcopy(model)
    equalize.attach(make_plan(model, found.sites, {"fuse": moments}), attached)
    with torch.no_grad():
        sigma = torch.cat([torch.full((stop - start,), std) for (start, stop), std in zip(BRANCHES, stds, strict=True)])
        seen = dict(attached.fuse.named_parameters())["parametrizations.weight.original"]
        torch.testing.assert_close(
            seen[:, :, 0, 0], model.fuse.weight[:, :, 0, 0] * sigma / sigma.square().mean().sqrt(), rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(attached(X), expected, rtol=1e-5, atol=1e-5)
    equalize.fold(attached)
    assert attached.state_dict().keys() == model.state_dict().keys()


def test_a_branch_whose_values_python_reads_stays_put():
    (site,) = recorded(made(Numpy)).sites
    assert site.branches[1].fixed is not None
    assert site.branches[0].producers == ("low.weight", "low.bias")


def test_what_comes_back_from_numpy_still_depends_on_the_layers_before():
    class Two(Fusion):
        def __init__(self):
            super().__init__(nn.Conv2d(6, 3, 1))
            self.last = nn.Conv2d(6, 2, 1)

        def forward(self, x):
            y = torch.from_numpy(super().forward(x).numpy() + 1)
            return self.last(torch.cat([F.interpolate(F.avg_pool2d(y, 2), scale_factor=2), x], 1))

    first, last = recorded(made(lambda fuse: Two())).sites
    assert (first.layer, last.layer) == ("fuse", "last")
    assert last.upstream == ("fuse",)


class Repeated(Looped):
    def forward(self, x):
        for _ in range(int(x.abs().amax().clamp(1, 1).item()) + 1):
            y = super().forward(x)
        return y


def test_a_layer_that_a_loop_calls_again_is_refused():
    found = recorded(made(Repeated))
    assert found.sites == ()
    assert {refusal.reason for refusal in found.refusals} == {"fuse.weight is used 2 times"}


def test_weights_read_past_their_parameter_are_refused():
    class Data(Branching):
        def forward(self, x):
            return F.conv2d(self.features(x), self.fuse.weight.data)

    (refusal,) = recorded(made(Data)).refusals
    assert refusal.reason.startswith("the weight of ")
    assert refusal.reason.endswith(" is not a plain parameter")


class Touchy(Branching):
    """Counts, draws, writes into its input, and replaces a buffer whenever it runs."""

    def __init__(self, fuse):
        super().__init__(fuse, nn.BatchNorm2d(5))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(2))

    def forward(self, x):
        self.calls += 1
        self.replaced = self.replaced + torch.rand(2)
        return super().forward(x.mul_(2))


def test_layers_in_torch_script_are_refused():
    model = made(Fusion)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fuse = torch.jit.script(model.fuse)
    found = scan(model, X)
    assert [each.reason for each in found.refusals] == ["the weight of fuse is not a plain parameter"]


class Mapped(Fusion):
    """Under `vmap` torch hands the modes other tensors than the network has."""

    def features(self, x):
        low = torch.vmap(lambda each: F.relu(each) * 2)(self.low(x))
        return torch.cat([F.interpolate(low, size=x.shape[2:]), self.high(x)], 1)


class Caught(Fusion):
    """Goes another way where values cannot be read."""

    def features(self, x):
        try:
            first = F.interpolate(self.low(x), scale_factor=int(x.isfinite().all()) + 1)
        except RuntimeError:
            first = self.high(x).repeat(1, 2, 1, 1)
        return torch.cat([first, self.high(x)], 1)


class WrittenPast(Fusion):
    """Written to by a name that torch does not pass on."""

    def features(self, x):
        high = self.high(x)
        high.data.tanh_()
        return torch.cat([F.interpolate(self.low(x), size=x.shape[2:]), high], 1)


@pytest.mark.parametrize(("net", "how"), [(Mapped, ("export", False)), (Caught, ("recorder", True)),
                                          (WrittenPast, ("recorder", True))])  # fmt: skip
def test_a_recording_on_fake_tensors_that_would_miss_something_is_not_used(net, how):
    found = scan(made(net), X)
    assert (found.tracer, found.ran) == how
    (site,) = found.sites
    assert [branch.resampling for branch in site.branches] == ["nearest", None]


class Constants(Fusion):
    """Python makes tensors and reads them, keeps some outside of buffers, and shares autograd functions of its own."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x

    def __init__(self, fuse):
        super().__init__(fuse)
        self.kept = torch.ones(2, 1, 1)

    def features(self, x):
        low = F.interpolate(self.low(x), scale_factor=torch.tensor(2.0).item())
        low = torch.utils.checkpoint.checkpoint(F.relu, low, use_reentrant=False)
        return torch.cat([low, self.Scaled.apply(self.high(x)) * self.kept + torch.arange(2.0).view(2, 1, 1)], 1)


def test_constants_of_python_and_functions_of_autograd_are_recorded_on_fake_tensors():
    model = made(Constants)
    found = scan(model, X)
    assert (found.tracer, found.ran) == ("recorder", False)
    (site,) = found.sites
    assert [(branch.resampling, branch.fixed is None) for branch in site.branches] == [("nearest", True), (None, False)]
    assert said_by(record_fake, model, (X,)) == said_by(exported_ops, model, (X,)) == said_by(record, model, (X,))
    assert type(model(X)) is torch.Tensor


@functools.lru_cache
def ramp(size):
    return torch.linspace(1, 2, size), size


class Caching(Fusion):
    """Keeps tensors in caches of functions and of a method, one of them behind the convention of compilers."""

    @functools.cache  # noqa: B019
    def offset(self):
        return torch.tensor(0.5)

    def features(self, x):
        low = F.interpolate(self.low(x), size=x.shape[2:]) * ramp(x.shape[3])[0] + self.offset()
        return torch.cat([low, self.high(x)], 1)


def test_caches_keep_no_fake_tensors_for_the_next_run():
    ramp.cache_clear()
    kept, model = ramp(3), made(Caching)
    expected = copy.deepcopy(model)(X)
    for _ in range(2):
        ramp.cache_clear()
        found = scan(model, X)
        assert (found.tracer, found.ran) == ("recorder", False)
    torch.testing.assert_close(model(X), expected)
    assert ramp(3) is not kept
    kept = ramp(3)
    scan(made(Branching), X)
    assert ramp(3) is kept  # only what holds fake tensors is emptied
    assert not torch.compiler.is_compiling()


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_is_left_as_it_was(fails):
    class Failing(Touchy):
        def features(self, x):
            u = super().features(x)
            if fails:
                raise KeyError("on purpose")
            return u

    model = made(Failing).train()
    model.fuse.eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random, x = torch.get_rng_state(), X.clone()
    if fails:
        with pytest.raises(SiteError, match="on purpose"):
            scan(model, x)
    else:
        assert recorded(model, x).sites[0].norm == "after"
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, X)
    assert not torch.nn.modules.module._global_forward_hooks
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    torch.zeros(2).add_(1)  # no mode is left behind


def test_on_the_meta_device_weights_are_drawn_for_the_run_and_dropped():
    with torch.device("meta"):
        model = Touchy(nn.Conv2d(6, 5, 1))
    (site,) = recorded(model.eval(), torch.empty(2, 3, 16, 16, device="meta")).sites
    assert [branch.resampling for branch in site.branches] == ["nearest", None]
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_tied_weights_are_one_on_the_meta_device_too():
    class Tied(Branching):
        def __init__(self, fuse):
            super().__init__(fuse)
            self.other = nn.Conv2d(6, 5, 1)
            self.other.weight = fuse.weight

        def forward(self, x):
            return super().forward(x) + self.other(self.features(x))

    for device in ("cpu", "meta"):
        with torch.device(device):
            model = Tied(nn.Conv2d(6, 5, 1))
        found = recorded(model.eval())
        assert {refusal.reason for refusal in found.refusals} == {"other.weight is used 2 times"}


def test_compiled_networks_are_run_as_they_were_written():
    (site,) = recorded(torch.compile(nn.Sequential(torch.compile(made(Looped))))).sites
    assert site.layer == "0._orig_mod.fuse"
    assert [branch.resampling for branch in site.branches] == ["nearest", None]


def test_networks_that_have_no_shapes_yet_are_refused():
    with pytest.raises(SiteError, match="uninitialized"):
        scan(Branching(nn.LazyConv2d(5, 1)), X)


def test_values_that_a_run_needs_may_be_given():
    """An example of zeros takes the other way than one drawn at random."""
    model = made(Branching)
    with pytest.raises(SiteError, match="a run failed"):
        scan(model, torch.zeros(2, 3, 16, 16))  # this way two channels too few come out
    assert trace(model, torch.empty(2, 3, 16, 16, device="meta")).ran


def test_too_little_memory_is_no_fault_of_the_network():
    class Greedy(Branching):
        def features(self, x):
            return super().features(x) + torch.empty(2**60)

    with pytest.raises(ResourceError, match="too little memory"):
        scan(made(Greedy), X)


NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.low, self.fuse = nn.Conv2d(3, 4, 2, stride=2), nn.Conv2d(7, 2, 1)
        self.register_buffer("factor", torch.tensor(1.0))

    def forward(self, x):
        low = nn.functional.interpolate(self.low(x), scale_factor=self.factor.item())
        return self.fuse(torch.cat([low, x], 1))
"""


@pytest.fixture
def network(tmp_path):
    """A state dict with a factor that is not the one drawn, and the code of its network."""
    (tmp_path / "nets.py").write_text(NETWORK)
    weights, bias = torch.randn(4, 3, 2, 2), torch.zeros(4)
    state = {"low.weight": weights, "low.bias": bias, "fuse.weight": torch.randn(2, 7, 1, 1)}
    torch.save({**state, "fuse.bias": torch.zeros(2), "factor": torch.tensor(2.0)}, tmp_path / "net.pth")
    return tmp_path / "net.pth", "--arch", f"{tmp_path}/nets.py:Net", "--size", "16"


def test_scan_says_how_the_network_was_read_and_runs_it_with_its_own_weights(network, run_cli):
    ran = run_cli("scan", *network, "--json")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert (found["tracer"], found["input_shape"]) == ("recorder", [2, 3, 16, 16])
    assert [site["layer"] for site in found["sites"]] == ["fuse"]
    assert [branch["factor"] for branch in found["sites"][0]["branches"]] == [[2.0, 2.0], [1.0, 1.0]]
    assert "read by a recorded run at 2x3x16x16" in run_cli("scan", *network).text


def test_calibrate_on_the_command_line(network, photos, tmp_path, run_cli):
    ran = run_cli("calibrate", *network, "--data", photos, "-o", tmp_path / "out", "--strategy", "migrate", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["changed"] == ["fuse.weight", "low.weight", "low.bias"]
    assert found["check"]["max_abs_change"] < 1e-4
    assert json.loads((tmp_path / "out" / "equalize.json").read_text())["tracer"] == "recorder"
