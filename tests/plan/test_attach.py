"""Training through `attach` against training a network with real equalizer modules."""

import copy
import math
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from equalize.errors import SiteError
from equalize.moments.measure import measure
from equalize.plan.apply import apply
from equalize.plan.attach import attach, fold
from equalize.plan.plan import Plan
from equalize.plan.strategies import make_plan
from equalize.sites.scan import scan
from tests.support.networks import BRANCHES, Equalizer, Fusion, batch_norm

OPTIMIZERS = {
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
}


class Head(nn.Module):
    """Frozen features, a fusion layer, a classifier: what is trained when a decoder is fine-tuned."""

    def __init__(self, fuse, after=None):
        super().__init__()
        self.body = Fusion(fuse, after)
        self.body.low.requires_grad_(False)
        self.body.high.requires_grad_(False)
        self.classifier = nn.Conv2d(5, 3, 1)

    def forward(self, x):
        return self.classifier(F.relu(self.body(x)))


LAYERS = {
    "bias": lambda: Head(nn.Conv2d(6, 5, 1)),
    "bias, unpadded": lambda: Head(nn.Conv2d(6, 5, 3)),
    "bias, grouped": lambda: Head(nn.Conv2d(6, 10, 1, groups=2), nn.Conv2d(10, 5, 1)),
    "bias, depthwise": lambda: Head(nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 5, 1)),
    "bias, transposed": lambda: Head(nn.ConvTranspose2d(6, 5, 1)),
    "bias, linear": lambda: Head(nn.Linear(6, 5)),
    "bias and GroupNorm": lambda: Head(nn.Conv2d(6, 4, 1), nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 5, 1))),
    "BatchNorm": lambda: Head(nn.Conv2d(6, 5, 1, bias=False), batch_norm(5)),
    "bias and BatchNorm": lambda: Head(nn.Conv2d(6, 5, 1), batch_norm(5)),
}


def drawn(name):
    torch.manual_seed(0)
    return LAYERS[name](), torch.randn(6, 3, 10, 10), torch.randint(0, 3, (6, 10, 10))


def planned(model, x, strategy="preserve", **options) -> Plan:
    sites = [site for site in scan(model, x[:1], kinds=("resampled", "plain")).sites if site.layer.endswith("fuse")]
    return make_plan(model, sites, measure(model, sites, [x]), strategy, **options)


def train(model, optimizer, x, y, steps=6):
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        logits = model(x.roll(step, 0)[:4])
        F.cross_entropy(logits, y.roll(step, 0)[:4, : logits.shape[2], : logits.shape[3]]).backward()
        optimizer.step()


def by_channel(values, weight, axis):
    """Per-branch values as a factor for a weight whose input channels are all on `axis`."""
    widths = torch.tensor([stop - start for start, stop in BRANCHES])
    shape = [1] * weight.ndim
    shape[axis] = -1
    return torch.repeat_interleave(torch.tensor(values, dtype=torch.float64), widths).view(shape)


def unfolded(name, model, means, stds, *, centered=True):
    """The explicit network that starts at the same function: equalizers, then V = sigma W and a' = a + mu W.

    Args:
        stds: what the equalizers divide by: sigma/tau.
    """
    twin = copy.deepcopy(model)
    fuse = twin.body.fuse
    geometry = {"bias, depthwise": 0, "bias, transposed": 0}
    w = fuse.weight.detach().double()
    if name == "bias, grouped":  # rows 0..4 read channels 0..2, rows 5..9 read channels 3..5
        std = torch.tensor([stds[0]] * 4 + [stds[1]] * 2, dtype=torch.float64).view(2, 3)
        mean = torch.tensor([means[0]] * 4 + [means[1]] * 2, dtype=torch.float64).view(2, 3)
        factor = std.repeat_interleave(5, 0).view(10, 3, 1, 1)
        response = w * mean.repeat_interleave(5, 0).view(10, 3, 1, 1)
    else:
        axis = geometry.get(name, 1)
        factor = by_channel(stds, w, axis)
        response = w * by_channel(means, w, axis)
    shift = response.sum((0, 2, 3)) if name == "bias, transposed" else response.flatten(1).sum(1)
    with torch.no_grad():
        fuse.weight.copy_(w * factor)
        if fuse.bias is not None and centered:
            fuse.bias += shift
    means = means if centered else [0.0, 0.0]
    if isinstance(fuse, nn.Linear):
        equalizer, body = Equalizer(means, stds, axis=-1), twin.body
        body.forward = lambda x: body.after(fuse(equalizer(body.features(x).movedim(1, -1))).movedim(-1, 1))
    else:
        twin.body.fuse = nn.Sequential(Equalizer(means, stds), fuse)
    return twin, fuse, factor, shift


def rms(stds):
    """Of the six channels of the two branches."""
    return math.sqrt(sum((stop - start) * std**2 for (start, stop), std in zip(BRANCHES, stds, strict=True)) / 6)


@pytest.mark.parametrize("scale", ["step", "paper"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", LAYERS)
def test_training_equals_training_explicit_equalizers(name, optimizer, scale):
    model, x, y = drawn(name)
    plan = planned(model, x, scale=scale)
    means, stds = ([getattr(branch, each) for branch in plan.sites[0].branches] for each in ("mean", "std"))
    tau = rms(stds) if scale == "step" else 1.0
    # the means are the BatchNorm's business: its gradients are those of the centered input
    twin, fuse, factor, shift = unfolded(name, model, means, [std / tau for std in stds])
    if "BatchNorm" in name:
        assert plan.sites[0].shift is None
        twin.body.after.running_mean -= 0 if name == "bias and BatchNorm" else shift
    model.eval(), twin.eval()
    torch.testing.assert_close(model(x), twin(x), rtol=1e-5, atol=1e-5)
    folded_only = copy.deepcopy(model)
    train(twin, OPTIMIZERS[optimizer]([each for each in twin.parameters() if each.requires_grad]), x, y)
    attach(plan, model)
    train(model, OPTIMIZERS[optimizer]([each for each in model.parameters() if each.requires_grad]), x, y)
    fold(model)
    expected = (fuse.weight.double() / factor).float()
    scale = expected.abs().max()
    assert (model.body.fuse.weight - expected).abs().max() < 1e-5 * scale
    assert (model.classifier.weight - twin.classifier.weight).abs().max() < 1e-5
    if "BatchNorm" not in name:  # there the bias has no gradient but rounding, which Adam makes as large as any
        model.eval(), twin.eval()
        torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=2e-5)
    # and none of this is what training the folded weights themselves would give
    train(folded_only, OPTIMIZERS[optimizer]([each for each in folded_only.parameters() if each.requires_grad]), x, y)
    assert (folded_only.body.fuse.weight - expected).abs().max() > 1e-2 * scale


@pytest.mark.parametrize("scale", ["step", "paper"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("strategy", ["migrate", "rescale", "migrate to a fixed branch"])
def test_training_after_the_weights_were_rewritten(strategy, optimizer, scale):
    """The equalizers in front divide by what the branches have then and multiply by what they had together before."""
    model, x, y = drawn("bias")
    sites = [site for site in scan(model, x[:1]).sites if site.layer.endswith("fuse")]
    if strategy == "migrate to a fixed branch":
        fixed = replace(sites[0].branches[0], producers=(), fixed="for the test")
        sites = [replace(sites[0], branches=(fixed, sites[0].branches[1]))]
    before = measure(model, sites, [x])
    tau = rms([each.std for each in before[sites[0].layer]]) if scale == "step" else 1.0
    plan = make_plan(model, sites, before, strategy.split()[0], scale=scale)
    apply(plan, model)
    (site,) = scan(model, x[:1]).sites
    after = measure(model, [site], [x])[site.layer]
    means, stds = [each.mean for each in after], [each.std / tau for each in after]
    if strategy == "migrate" and scale == "step":  # all branches are there already
        assert stds == pytest.approx([1.0, 1.0], rel=1e-5)
    twin, fuse, factor, _ = unfolded("bias", model, means, stds)
    train(twin, OPTIMIZERS[optimizer]([each for each in twin.parameters() if each.requires_grad]), x, y)
    attach(plan, model)
    train(model, OPTIMIZERS[optimizer]([each for each in model.parameters() if each.requires_grad]), x, y)
    fold(model)
    expected = (fuse.weight.double() / factor).float()
    assert (model.body.fuse.weight - expected).abs().max() < 1e-5 * expected.abs().max()


def test_rescaled_weights_are_seen_as_they_were_drawn():
    """The paper's case: W = V/sigma on disk, the optimizer sees V."""
    model, x, _ = drawn("BatchNorm")
    v = model.body.fuse.weight.detach().clone()
    plan = planned(model, x, "rescale")
    apply(plan, model)
    attach(plan, model)
    torch.testing.assert_close(model.body.fuse.parametrizations.weight.original.detach(), v)


def test_a_plan_that_kept_norms_is_refused():
    """Those of earlier versions; without, they train as they did: at a scale of 1."""
    model, x, _ = drawn("bias")
    content = planned(model, x).to_json()
    del content["scale"], content["sites"][0]["tau"]
    with pytest.raises(SiteError, match=r"^keep_norm: stands in the plan.*calibrate the original again, with --scale"):
        attach(Plan.from_json(content | {"keep_norm": True}), model)
    assert not parametrize.is_parametrized(model.body.fuse)
    old = Plan.from_json(content | {"keep_norm": False})
    w = model.body.fuse.weight.detach().clone()
    attach(old, model)
    expected = w * by_channel([branch.std for branch in old.sites[0].branches], w, 1).float()
    torch.testing.assert_close(model.body.fuse.parametrizations.weight.original.detach(), expected)


def assert_same_state(model, before):
    """To the last bit: what no training moved is put back, not computed again."""
    after = model.state_dict()
    assert list(after) == list(before)
    for key, value in before.items():
        assert torch.equal(after[key], value), key
        assert after[key].dtype == value.dtype


@pytest.mark.parametrize("strategy", ["preserve", "migrate", "rescale", "reinit"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in LAYERS), ("bias", torch.float64), ("bias", torch.bfloat16)],
)
def test_attach_and_fold_leave_every_key_and_bit(name, dtype, strategy):
    model, x, _ = drawn(name)
    plan = planned(model, x, strategy)
    apply(plan, model)
    model.to(dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = [key for key, _ in model.named_parameters()]
    kind = type(model.body.fuse)
    attach(plan, model)
    assert parametrize.is_parametrized(model.body.fuse, "weight")
    fold(model)
    assert_same_state(model, before)
    assert [key for key, _ in model.named_parameters()] == parameters
    assert type(model.body.fuse) is kind
    assert not parametrize.is_parametrized(model.body.fuse)
    assert all(value.requires_grad for key, value in model.named_parameters() if "fuse" in key)


def test_a_frozen_layer_stays_frozen():
    model, x, _ = drawn("bias")
    plan = planned(model, x)
    model.body.fuse.requires_grad_(False)
    attach(plan, model)
    assert not any(each.requires_grad for each in model.body.fuse.parameters())
    fold(model)
    assert not model.body.fuse.weight.requires_grad


class LowRank(nn.Module):
    """An adapter as peft's LoRA is one: it freezes the layer, and merges by writing to the weight that it reads."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.delta = nn.Parameter(torch.ones_like(base_layer.weight))

    def forward(self, x):
        return self.base_layer(x) + F.conv2d(x, self.delta)

    def merged(self):
        self.base_layer.weight.data += self.delta
        return self.base_layer


def test_an_adapter_on_an_attached_layer_is_warned_of_and_merges_once_folded(caplog):
    model, x, _ = drawn("bias")
    attach(planned(model, x), model)
    model(x)
    assert not caplog.text
    model.body.fuse = LowRank(model.body.fuse)
    expected = model(x)
    model(x)
    said = "body.fuse.weight was frozen after attach: it is not trained, and what is merged into it (LoRA) is lost"
    assert caplog.text.count(said) == 1
    fold(model)
    model.body.fuse = model.body.fuse.merged()
    torch.testing.assert_close(model(x), expected)


def test_attached_networks_compute_the_same():
    model, x, _ = drawn("bias")
    expected = model(x).detach()
    attach(planned(model, x), model)
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-5, atol=1e-5)


def test_only_what_moved_is_recomputed():
    """A frozen network's other weights come back to the last bit."""
    model, x, _ = drawn("bias")
    before = model.body.fuse.weight.detach().clone()
    attach(planned(model, x), model)
    with torch.no_grad():
        model.body.fuse.parametrizations.weight.original[0, 0] += 1
    fold(model)
    same = model.body.fuse.weight == before
    assert not same[0, 0]
    assert same.sum() == same.numel() - 1


def test_copies_of_attached_networks_are_independent():
    model, x, y = drawn("bias")
    plan = planned(model, x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attach(plan, model)
    average = copy.deepcopy(model)
    train(model, OPTIMIZERS["AdamW"](model.parameters()), x, y)
    trained = model.eval()(x).detach()
    fold(average)
    assert_same_state(average, before)
    torch.testing.assert_close(model(x).detach(), trained)  # the original is still attached and as trained
    fold(model)
    torch.testing.assert_close(model(x).detach(), trained, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == list(before)


def test_a_replica_on_another_device_computes_there(monkeypatch):
    """What `nn.DataParallel` makes for every other GPU, here for the meta device, where shapes alone are computed."""

    def on_meta(tensors, devices, detach=False):
        return [[tensor.to("meta") for tensor in tensors]]

    model, x, _ = drawn("bias")
    attach(planned(model, x), model)
    monkeypatch.setattr(sys.modules["torch.nn.parallel.replicate"], "_broadcast_coalesced_reshape", on_meta)
    (replica,) = torch.nn.parallel.replicate(model, [0])
    logits = replica(x.to("meta"))
    assert (logits.device.type, logits.shape) == ("meta", model(x).shape)


def test_a_state_dict_of_an_attached_network_goes_back_into_one():
    model, x, y = drawn("bias")
    plan = planned(model, x)
    other = copy.deepcopy(model)
    attach(plan, model)
    train(model, OPTIMIZERS["AdamW"](model.parameters()), x, y)
    attach(plan, other)
    other.load_state_dict(model.state_dict())
    fold(model)
    fold(other)
    assert_same_state(other, model.state_dict())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch.jit is deprecated
def test_a_network_with_a_part_in_torch_script_is_folded():
    model, x, y = drawn("bias")
    plan = planned(model, x)
    model.body.after = torch.jit.script(model.body.after)
    attach(plan, model)
    train(model, OPTIMIZERS["AdamW"](model.parameters()), x, y)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    fold(model)
    assert type(model.body.fuse) is nn.Conv2d
    torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)


def test_a_layer_that_is_compiled_is_folded_in_itself():
    model, x = Fusion(nn.Conv2d(6, 5, 1)), torch.randn(2, 3, 8, 8)
    model.fuse = torch.compile(model.fuse, backend="eager")
    before = copy.deepcopy(model.state_dict())
    sites = scan(model, x).sites
    assert [site.layer for site in sites] == ["fuse._orig_mod"]
    attach(make_plan(model, sites, measure(model, sites, [x])), model)
    fold(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_parameters_stay_what_optimizers_and_wrappers_hold():
    """DistributedDataParallel hooks onto the accumulators of gradients."""
    model, x, y = drawn("bias")
    plan = planned(model, x)
    held = [model.body.fuse.weight, model.body.fuse.bias]
    places = [each.data_ptr() for each in held]
    accumulators = [each.expand_as(each).grad_fn.next_functions[0][0] for each in held]
    reached = []
    for index, accumulator in enumerate(accumulators):
        accumulator.register_hook(lambda *_, index=index: reached.append(index))
    attach(plan, model)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y, steps=1)
    assert sorted(reached) == [0, 1]
    fold(model)
    assert model.body.fuse.weight is held[0]
    assert model.body.fuse.bias is held[1]
    assert [each.data_ptr() for each in held] == places


def test_attaching_twice_is_refused():
    model, x, _ = drawn("bias")
    plan = planned(model, x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attach(plan, model)
    with pytest.raises(SiteError, match=r"body\.fuse\.weight: is already parametrized; call fold first"):
        attach(plan, model)
    fold(model)
    assert_same_state(model, before)
    model.same_fuse = model.body.fuse
    plan = planned(model, x)
    attach(plan, model)
    with pytest.raises(SiteError, match=r"is already parametrized; call fold first"):
        attach(plan, model)


def test_tensors_that_are_not_the_layers_own_are_refused():
    model, x, _ = drawn("bias")
    plan = planned(model, x)
    without = Head(nn.Conv2d(6, 5, 1, bias=False))
    with pytest.raises(SiteError, match=r"^body\.fuse\.bias: is in the plan but not a parameter of the module of "):
        attach(plan, without)
    model.shared = nn.Conv2d(6, 5, 1)
    model.shared.weight = model.body.fuse.weight
    with pytest.raises(SiteError, match=r"^body\.fuse\.weight: is a parameter of several layers"):
        attach(plan, model)
    assert not any(parametrize.is_parametrized(each.body.fuse) for each in (model, without))


def test_a_plan_of_another_network_attaches_nothing():
    model, x, _ = drawn("bias")
    plan = planned(model, x)
    with pytest.raises(SiteError, match="is in the plan but not in this model"):
        attach(plan, nn.Conv2d(6, 5, 1))
    wider = Head(nn.Conv2d(6, 5, 1))
    wider.body.fuse = nn.Conv2d(8, 5, 1)
    with pytest.raises(SiteError, match="channels"):
        attach(plan, wider)
    assert not parametrize.is_parametrized(wider.body.fuse)


def test_a_network_without_values_is_refused():
    model, x, _ = drawn("bias")
    plan = planned(model, x)
    with pytest.raises(SiteError, match="is on the meta device, without values; load the weights first"):
        attach(plan, model.to("meta"))


def test_attach_is_all_or_nothing():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Head(nn.Conv2d(6, 5, 1)), Head(nn.Conv2d(6, 5, 1))

        def forward(self, x):
            return self.first(x) + self.second(x)

    torch.manual_seed(1)
    model, x = Two(), torch.randn(2, 3, 8, 8)
    plan = planned(model, x)
    assert len(plan.sites) == 2
    del model.second.body.fuse.weight
    with pytest.raises(SiteError):
        attach(plan, model)
    assert not parametrize.is_parametrized(model.first.body.fuse)


def test_attached_in_inference_mode_a_network_trains():
    model, x, _ = drawn("bias")
    plan = planned(model, x)
    with torch.inference_mode():
        attach(plan, model)
    model(x).sum().backward()
    assert model.body.fuse.parametrizations.weight.original.grad.any()


def test_other_parametrizations_are_left_alone():
    model, x, _ = drawn("bias")
    plan = planned(model, x)
    torch.nn.utils.parametrizations.weight_norm(model.classifier)
    attach(plan, model)
    fold(model)
    assert parametrize.is_parametrized(model.classifier, "weight")
