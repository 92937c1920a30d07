"""Plans as files: written, read, replayed, refused."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from equalize.errors import InputError, NumericsError, SiteError
from equalize.plan.apply import apply, apply_edits
from equalize.plan.calibrate import calibrate
from equalize.plan.edits import Add, Draw, Scale, ScaleInputs, Set
from equalize.plan.plan import SCHEMA, Plan
from equalize.verify.function import check_function
from tests.support.networks import Fusion, batch_norm

STRATEGIES = ["auto", "migrate", "preserve", "reinit", "rescale"]


def network() -> Fusion:
    torch.manual_seed(0)
    return Fusion(
        nn.Conv2d(6, 5, 3, padding=1, bias=False), nn.Sequential(batch_norm(5), nn.ReLU(), nn.Conv2d(5, 3, 1))
    )


def images() -> list[torch.Tensor]:
    return list(torch.randn(6, 3, 10, 10, generator=torch.Generator().manual_seed(1)).split(2))


def same(a: nn.Module, b: nn.Module) -> bool:
    """To the last bit: an edit is float64 arithmetic element by element, or a draw from one generator."""
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("scale", ["step", "paper"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_applying_the_file_is_bit_identical(strategy, scale, tmp_path):
    model = network()
    fresh, untouched = copy.deepcopy(model), copy.deepcopy(model)
    plan = calibrate(model, images(), strategy, seed=5, scale=scale)
    path = tmp_path / "equalize.json"
    path.write_text(json.dumps(plan.to_json()), encoding="utf-8")
    for where in (path, str(path), tmp_path):
        read = Plan.read(where)
        assert read.to_json() == plan.to_json()
    torch.manual_seed(99)  # drawing depends on the plan's seed alone
    apply(read, fresh)
    assert same(fresh, model)
    assert same(fresh, untouched) == (strategy == "preserve")
    changed = {key for key, value in untouched.state_dict().items() if not torch.equal(fresh.state_dict()[key], value)}
    assert changed <= set(plan.changed)
    assert "fuse.weight" in changed or strategy == "preserve"


def test_a_plan_is_plain_numbers_and_names():
    plan = calibrate(network(), images(), "rescale", seed=3)
    content = plan.to_json()
    assert json.loads(json.dumps(content)) == content  # lists, not tuples; nothing that json would turn into a string
    assert content["schema"] == SCHEMA == 1
    assert (content["strategy"], content["seed"], content["scale"]) == ("rescale", 3, "step")
    assert content["changed"] == [
        "fuse.weight",
        "after.0.running_mean",
        "after.0.running_var",
        "after.0.num_batches_tracked",
    ]
    (site,) = content["sites"]
    assert set(site) == {
        "layer", "weight", "bias", "norm", "op", "kernel", "axis", "groups",
        "kind", "exact_border", "shift", "branches", "expect", "delta", "strategy", "tau",
    }  # fmt: skip
    assert site["strategy"] == "rescale"
    powers = [(branch["stop"] - branch["start"]) * branch["std"] ** 2 for branch in site["branches"]]
    assert site["tau"] == pytest.approx(math.sqrt(sum(powers) / 6))
    assert set(site["branches"][0]) == {
        "start", "stop", "resampling", "factor", "source", "count", "mean", "std", "ci95", "step_share",
    }  # fmt: skip


def test_edits_come_back_as_they_were():
    edits = (
        Draw(tensor="a.weight", seed=0),
        ScaleInputs(tensor="a.weight", axis=1, start=0, stop=4, groups=2, factor=0.1),
        Scale(tensor="b", factor=1 / 3, aliases=("e",)),
        Add(tensor="c", values=(1e-30, -2.0)),
        Set(tensor="d", values=(5.0,)),
    )
    plan = Plan(strategy="reinit", edits=edits, facts={"source": "x", "images": 3})
    read = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert read.edits == edits
    assert dict(read.facts) == {"source": "x", "images": 3}
    assert read.changed == ("a.weight", "b", "e", "c", "d")
    assert plan.to_json()["edits"][:2] == [
        {"tensor": "a.weight", "action": "draw", "seed": 0},
        {"tensor": "a.weight", "action": "scale", "axis": 1, "start": 0, "stop": 4, "groups": 2, "factor": 0.1},
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no plan of this version"),
        ({"schema": 2}, "got schema 2, expected 1"),
        ({"schema": 1}, "KeyError: 'strategy'"),
        ({"schema": 1, "strategy": "rescale", "seed": 0, "sites": [{}], "refusals": [], "edits": []}, "is no plan"),
        (
            {"schema": 1, "strategy": "rescale", "seed": 0, "sites": [], "refusals": [], "edits": [{"color": 1}]},
            "is no plan",
        ),
        ({"schema": 1, "strategy": "rescale", "seed": 0, "sites": [], "refusals": [], "edits": ["a"]}, "is no plan"),
        ({"schema": 1, "strategy": "rescale", "seed": 0, "sites": 3, "refusals": [], "edits": []}, "is no plan"),
        ({"schema": 1, "strategy": "rescale", "seed": 0, "sites": ["a"], "refusals": [], "edits": []}, "is no plan"),
    ],
)
def test_what_is_no_plan_is_refused(content, message):
    with pytest.raises(InputError, match=message):
        Plan.from_json(content)


def test_files_that_are_no_plans(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        Plan.read(tmp_path)
    path = tmp_path / "equalize.json"
    for content, message in [(b"{", "cannot be read as JSON"), (b"\xff\xfe", "cannot be read"), (b"[1]", "is no plan")]:
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            Plan.read(path)


def wider() -> nn.Module:
    model = network()
    model.fuse = nn.Conv2d(8, 5, 3, padding=1, bias=False)
    return model


def narrower() -> nn.Module:
    model = network()
    model.fuse = nn.Conv2d(5, 5, 3, padding=1, bias=False)
    return model


def other_kernel() -> nn.Module:
    model = network()
    model.fuse = nn.Conv2d(6, 5, 1, bias=False)
    return model


def more_outputs() -> nn.Module:
    model = network()
    model.fuse = nn.Conv2d(6, 7, 3, padding=1, bias=False)
    model.after[0] = nn.BatchNorm2d(7)
    return model


def without_norm() -> nn.Module:
    model = network()
    model.after[0] = nn.Identity()
    return model


@pytest.mark.parametrize("strategy", ["rescale", "reinit", "migrate"])
@pytest.mark.parametrize("other", [wider, narrower, other_kernel, lambda: nn.Linear(2, 2)])
def test_a_plan_that_does_not_fit_changes_nothing(strategy, other):
    plan = calibrate(network(), images(), strategy)
    model = other()
    before = copy.deepcopy(model)
    with pytest.raises(SiteError, match="plan"):
        apply(plan, model)
    assert same(model, before)


@pytest.mark.parametrize("other", [more_outputs, without_norm])
def test_norms_that_do_not_fit_are_refused_before_anything_changes(other):
    plan = calibrate(network(), images(), "rescale")
    model = other()
    before = copy.deepcopy(model)
    with pytest.raises(SiteError, match=r"after\.0\.running_mean"):
        apply(plan, model)
    assert same(model, before)


def test_edits_say_what_overflows():
    model = nn.Linear(2, 2).half()
    with pytest.raises(NumericsError, match=r"weight: is not finite in torch\.float16"):
        apply_edits([Scale(tensor="weight", factor=1e9)], model)


def test_an_edit_that_overflows_undoes_those_before_it():
    model = network()
    plan = calibrate(copy.deepcopy(model), images(), "rescale")
    before = copy.deepcopy(model)
    with pytest.raises(NumericsError, match="is not finite"):
        apply(replace(plan, edits=(*plan.edits, Scale(tensor="fuse.weight", factor=1e300))), model)
    assert same(model, before)


def test_edits_on_every_axis():
    """The channels of a grouped convolution count over all of its groups."""
    model = nn.Conv2d(6, 4, 1, groups=2, bias=False)
    nn.init.ones_(model.weight)
    apply_edits([ScaleInputs(tensor="weight", axis=1, start=2, stop=4, groups=2, factor=3.0)], model)
    assert model.weight.squeeze().tolist() == [[1, 1, 3], [1, 1, 3], [3, 1, 1], [3, 1, 1]]
    model = nn.ConvTranspose2d(3, 2, 1, bias=False)
    nn.init.ones_(model.weight)
    apply_edits([ScaleInputs(tensor="weight", axis=0, start=1, stop=3, factor=0.5)], model)
    assert model.weight.squeeze().tolist() == [[1, 1], [0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("place", "change"),
    [
        ("edits", {"factor": None}),
        ("edits", {"factor": float("inf")}),
        ("edits", {"start": 5, "stop": 2}),
        ("sites", {"branches": []}),
        ("sites", {"tau": 0.0}),
        ("sites", {"tau": float("nan")}),
        ("sites", {"strategy": "magic"}),
        ("sites", {"axis": 2}),
        ("sites", {"kernel": 3}),
        ("sites", {"weight": 5}),
        ("edits", {"factor": 0.0}),
        ("edits", {"values": [float("nan")]}),
        ("edits", {"values": ["a"]}),
    ],
)
def test_plans_that_were_edited_by_hand_are_refused(place, change):
    content = calibrate(network(), images(), "rescale").to_json()
    part = next(each for each in content[place] if change.keys() <= each.keys())
    part.update(change)
    with pytest.raises(InputError, match="is no plan"):
        Plan.from_json(content)


@pytest.mark.parametrize("change", [{"std": 0.0}, {"std": "1"}, {"mean": None}, {"start": 1}, {"stop": 7}])
def test_branches_that_were_edited_by_hand_are_refused(change):
    content = calibrate(network(), images(), "preserve").to_json()
    content["sites"][0]["branches"][0].update(change)
    with pytest.raises(InputError, match="is no plan"):
        Plan.from_json(content)


def old_content(keep_norm):
    """A plan as earlier versions wrote it: sigma to 1, or to what kept the norm; the shift in the norm's mean."""
    content = calibrate(network(), images(), "rescale", scale="paper").to_json()
    (site,) = content["sites"]
    del content["scale"], site["tau"]
    site |= {"shift": "running_mean", "exact_border": False}
    for edit in content["edits"]:
        if edit["action"] == "scale" and keep_norm:
            edit["factor"] *= 0.25
    return content | {"keep_norm": keep_norm}


@pytest.mark.parametrize("keep_norm", [False, True])
def test_plans_of_earlier_versions_are_read_and_applied(keep_norm):
    content = old_content(keep_norm)
    plan = Plan.from_json(content)
    (site,) = plan.sites
    assert (plan.scale, site.shift) == ("paper", None)
    assert site.tau == pytest.approx(0.25 if keep_norm else 1.0)
    model = network()
    before = model.fuse.weight.detach().clone()
    apply(plan, model)
    for branch in site.branches:
        expected = before[:, branch.start : branch.stop] * (0.25 if keep_norm else 1.0) / branch.std
        torch.testing.assert_close(model.fuse.weight.detach()[:, branch.start : branch.stop], expected)
    check_function(network(), model, plan, images(), lambda output: output)
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()
    assert plan.to_json().get("keep_norm", False) == keep_norm


def test_an_unknown_scale_is_refused():
    content = calibrate(network(), images(), "rescale").to_json() | {"scale": "rms"}
    with pytest.raises(InputError, match=r"is no plan .*unknown scale 'rms'"):
        Plan.from_json(content)
