"""`whiten` against a network with a module that whitens the fusion layer's input."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from equalize.errors import NumericsError, SiteError
from equalize.plan.apply import apply
from equalize.plan.attach import attach, fold
from equalize.plan.calibrate import calibrate
from equalize.plan.edits import MapInputs, Set
from equalize.plan.plan import Plan
from equalize.sites.scan import scan
from equalize.verify.function import check_function
from equalize.verify.tensors import check_planned
from tests.plan.test_attach import OPTIMIZERS, assert_same_state, drawn, train

LAYERS = ("bias", "bias, unpadded", "bias, grouped", "bias, linear", "BatchNorm")


class Whitener(nn.Module):
    """A (u - mu), over the channels on `axis`; A is (C, C) with zeros between groups."""

    def __init__(self, a, mean, axis):
        super().__init__()
        self.a, self.mean, self.axis = a, mean, axis

    def forward(self, u):
        u = u.movedim(self.axis, -1)
        return ((u - self.mean.to(u)) @ self.a.to(u).T).movedim(-1, self.axis)


def planned(model, x, **options):
    found = scan(model, x[:1], kinds=("resampled", "plain"))
    return calibrate(model, [x], "whiten", found=found, **options)


def dense(map_CC):
    """(C, C/G) as (C, C)."""
    groups = map_CC.shape[0] // map_CC.shape[1]
    return torch.block_diag(*map_CC.chunk(groups))


def covariance_of(model, x):
    """Of the channels that enter the fusion layer, over all places; centered."""
    with torch.no_grad():
        return torch.cov(model.body.features(x).double().movedim(1, 0).flatten(1), correction=0)


def whitened(model, plan, v_of):
    """The explicit network; `v_of` gives its weights from those of the layer, as (O, C, K), and A."""
    twin = copy.deepcopy(model)
    (site,) = plan.sites
    fuse, a = twin.body.fuse, dense(plan.maps[site.layer])
    mean = torch.cat([torch.full((each.stop - each.start,), each.mean).double() for each in site.branches])
    mean = mean if site.shift else torch.zeros_like(mean)
    w = fuse.weight.detach().double()
    groups = getattr(fuse, "groups", 1)
    rows = w.reshape(groups, len(w) // groups, w.shape[1], -1)
    blocks = torch.stack([a[each][:, each] for each in torch.arange(len(a)).chunk(groups)])
    with torch.no_grad():
        fuse.weight.copy_(torch.einsum("gojk,gji->goik", rows, v_of(blocks)).reshape(w.shape))
        if fuse.bias is not None:
            fuse.bias += torch.einsum("gojk,gj->go", rows, mean.view(groups, -1)).flatten() if site.shift else 0
    if isinstance(fuse, nn.Linear):
        whitener, body = Whitener(a, mean, -1), twin.body
        body.forward = lambda x: body.after(fuse(whitener(body.features(x).movedim(1, -1))).movedim(-1, 1))
    else:
        twin.body.fuse = nn.Sequential(Whitener(a, mean, 1), fuse)
    return twin, fuse, blocks


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", LAYERS)
def test_training_equals_training_behind_a_whitening_module(name, optimizer):
    model, x, y = drawn(name)
    plan = planned(model, x)
    twin, fuse, blocks = whitened(model, plan, torch.linalg.inv)
    model.eval(), twin.eval()
    torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-5)
    plainly = copy.deepcopy(model)
    attach(plan, model)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-5)  # function kept at the start
    for each in (twin, model, plainly):
        train(each, OPTIMIZERS[optimizer]([each for each in each.parameters() if each.requires_grad]), x, y)
    fold(model)
    v = fuse.weight.detach().double()
    rows = v.reshape(len(blocks), len(v) // len(blocks), v.shape[1], -1)
    expected = torch.einsum("goik,gij->gojk", rows, blocks).reshape(v.shape).float()
    # float32 products with a matrix of condition about 20, over six steps
    assert (model.body.fuse.weight - expected).abs().max() < 5e-5 * expected.abs().max()
    assert (model.classifier.weight - twin.classifier.weight).abs().max() < 5e-5
    assert (plainly.body.fuse.weight - expected).abs().max() > 1e-2 * expected.abs().max()
    assert not parametrize.is_parametrized(model.body.fuse)


@pytest.mark.parametrize("name", LAYERS)
def test_drawn_weights_start_as_they_are_behind_the_whitening_module(name):
    model, x, _ = drawn(name)
    original, start = copy.deepcopy(model).eval(), model.body.fuse.weight.detach().clone()
    plan = planned(model, x, newly_initialized=["body.fuse.weight"])
    (site,) = plan.sites
    assert site.changes_function
    assert [type(each) for each in plan.edits if each.tensor == site.weight] == [MapInputs]
    a, sigma = dense(plan.maps[site.layer]), covariance_of(model, x)
    white = a @ sigma @ a.T
    assert float(white.trace()) == pytest.approx(float(sigma.trace()), rel=1e-5)  # all places of a small grid, float32
    twin, fuse, _ = whitened(original, plan, lambda blocks: torch.eye(blocks.shape[1]).double().expand_as(blocks))
    with torch.no_grad():
        fuse.weight.copy_(start)  # V = W0, and the bias as it was drawn
        if fuse.bias is not None:
            fuse.bias.copy_(original.body.fuse.bias)
    twin.body.after.eval(), model.eval()
    if name == "BatchNorm":
        assert {each.tensor for each in plan.edits if isinstance(each, Set)} >= {"body.after.running_var"}
        features = twin.body.fuse(twin.body.features(x))  # the statistics are those of the new function
        torch.testing.assert_close(model.body.after.running_mean, features.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-4)
        assert (model(x) - original(x)).abs().max() > 0.01
    again = copy.deepcopy(original)
    apply(plan, again)
    assert_same_state(again, model.state_dict())  # the same edits in the same order
    attach(plan, again)
    torch.testing.assert_close(again.body.fuse.parametrizations.weight.original.detach(), start, rtol=1e-4, atol=1e-5)


def test_trained_weights_stay_as_they_are():
    model, x, _ = drawn("bias and BatchNorm")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = planned(model, x)
    assert plan.changed == ()
    assert not plan.sites[0].changes_function
    apply(Plan.from_json(plan.to_json()), model)  # without matrices: there is nothing to be done
    assert_same_state(model, before)
    attach(plan, model)
    fold(model)
    assert_same_state(model, before)


def test_weights_of_half_precision():
    model, x, _ = drawn("bias")
    plan = planned(model, x)
    model.to(torch.bfloat16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attach(plan, model)
    w, start = model.body.fuse.weight.detach(), before["body.fuse.weight"]
    assert w.dtype == torch.bfloat16
    # V is rounded to 8 bits, and mapped by a matrix that is not
    a = plan.maps["body.fuse"].float()
    v = start.float().flatten(1) @ torch.linalg.inv(a)
    assert (((w - start).float().flatten(1) @ torch.linalg.inv(a)).abs() <= 0.02 * v.abs().max()).all()
    fold(model)
    assert_same_state(model, before)


def test_what_one_entry_of_v_changes():
    model, x, _ = drawn("bias, unpadded")
    plan = planned(model, x)
    before = model.body.fuse.weight.detach().clone()
    attach(plan, model)
    with torch.no_grad():
        model.body.fuse.parametrizations.weight.original[2, 0, 1, 1] += 1
    fold(model)
    moved = model.body.fuse.weight.detach() - before
    a = plan.maps["body.fuse"].float()
    torch.testing.assert_close(moved[2, :, 1, 1], a[0], rtol=1e-4, atol=1e-4)
    moved[2, :, 1, 1] = 0
    assert not moved.any()  # to the last bit: nothing there was computed again


@pytest.mark.parametrize("drawn_now", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_verification_holds_what_was_written_against_the_map(name, drawn_now):
    model, x, _ = drawn(name)
    original = copy.deepcopy(model).eval()
    plan = planned(model, x, newly_initialized=["body.fuse.weight"] if drawn_now else [])
    check = check_function(original, model.eval(), plan, [x], lambda output: output)
    assert check.interior < 1e-5
    assert (check.max_abs_change > 0.01) == drawn_now
    check_planned(original, model, plan)
    with torch.no_grad():
        model.body.fuse.weight[0] *= 1.001
    original, _, _ = drawn(name)
    with pytest.raises(NumericsError, match="does not do what the plan says"):
        check_function(original.eval(), model, plan, [x], lambda output: output)


@pytest.mark.parametrize(("name", "reason"), [("bias, depthwise", "depthwise"), ("bias, transposed", "transposed")])
def test_other_layers_are_refused(name, reason):
    model, x, _ = drawn(name)
    plan = planned(model, x)
    assert not plan.sites
    assert not plan.maps
    assert any(refusal.at == "body.fuse" and reason in refusal.reason for refusal in plan.refusals)


def test_matrices_that_are_missing_or_of_another_layer():
    model, x, _ = drawn("bias")
    plan = planned(model, x, newly_initialized=["body.fuse.weight"])
    content = plan.to_json()
    assert content["maps"] == "equalize.safetensors"
    read = Plan.from_json(content)
    assert read.to_json() == content
    for act in (apply, attach):
        with pytest.raises(SiteError, match=r"^body\.fuse: has no matrix; give equalize\.attach the directory"):
            act(read, model)
    for wrong in (torch.eye(5), torch.zeros(6), torch.eye(6) * math.nan, torch.eye(6)[:, :3]):
        with pytest.raises(SiteError, match=r"^body\.fuse: has a matrix in equalize\.safetensors that does not fit it"):
            attach(replace(plan, maps={"body.fuse": wrong}), model)
    assert not parametrize.is_parametrized(model.body.fuse)
    with pytest.raises(SiteError, match="does not go with whiten"):
        planned(model, x, scale="paper")


def test_half_precision_trains_in_the_precision_of_v():
    """Under autocast a product of weights would lose what makes the input white."""
    model, x, _ = drawn("bias")
    attach(planned(model, x), model)
    expected = model.body.fuse.weight.detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.body.fuse.weight.detach(), expected)  # the same kernel on the same tensors
