"""`equalize.attach` and `equalize.apply` as they are called in one's own loop."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parametrize

import equalize
from equalize.checkpoint.checkpoint import write_plan
from tests.plan.test_attach import drawn, planned


@pytest.fixture
def network():
    """A network and the plan `rescale` of it."""
    model, x, _ = drawn("bias")
    return model, planned(model, x, "rescale")


def in_forms(plan, directory: Path):
    write_plan(plan, directory)
    return [plan, directory, str(directory), directory / "equalize.json"]


def test_both_orders_and_places(network, tmp_path):
    model, plan = network
    for given in in_forms(plan, tmp_path):
        for call in (
            lambda given: equalize.attach(given, model),
            lambda given: equalize.attach(model, given),
            lambda given: equalize.attach(plan=given, model=model),
            lambda given: equalize.attach(given, torch.compile(model)),
            lambda given: equalize.attach(torch.nn.DataParallel(model), given),
        ):
            call(given)
            assert parametrize.is_parametrized(model.body.fuse, "weight")
            equalize.fold(model)


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.compile])
def test_a_plan_of_a_wrapped_network_is_that_of_the_network(wrap):
    model, x, _ = drawn("bias")
    wrapped = wrap(model)
    sites = equalize.scan(model, x).sites
    assert equalize.scan(wrapped, x).sites == sites
    moments = equalize.measure(wrapped, sites, [x])
    plan = equalize.make_plan(wrapped, sites, moments, "rescale")
    assert {edit.tensor for edit in plan.edits} == {"body.fuse.weight", "body.fuse.bias"}
    plan = equalize.calibrate(wrapped, [x], "rescale")
    equalize.attach(plan, wrapped)
    assert parametrize.is_parametrized(model.body.fuse, "weight")


def test_something_else_than_a_network_is_refused(network):
    plan = network[1]
    for call in (equalize.scan, equalize.calibrate, lambda given, x: equalize.measure(given, plan.sites, [x])):
        with pytest.raises(equalize.EqualizeError, match=r"^model: is no network, got Plan, expected a torch\.nn\."):
            call(plan, torch.zeros(1, 3, 10, 10))


def test_applying_in_both_orders(network, tmp_path):
    """To the last bit: the same plan on the same weights."""
    results = []
    for given in in_forms(network[1], tmp_path):
        for swapped in (False, True):
            model, _, _ = drawn("bias")
            before = model.body.fuse.weight.detach().clone()
            equalize.apply(*((model, given) if swapped else (given, model)))
            assert not torch.equal(model.body.fuse.weight, before)
            results.append(model.body.fuse.weight.detach())
    assert all(torch.equal(each, results[0]) for each in results)


@pytest.mark.parametrize("name", ["attach", "apply"])
def test_something_else_is_refused(network, tmp_path, name):
    model, plan = network
    call = getattr(equalize, name)
    takes = rf"^equalize\.{name}: takes a plan and a network, got "
    for given in [(), (plan,), (plan, plan), (model, model), (plan, model, 1), (None, model)]:
        with pytest.raises(equalize.EqualizeError, match=takes):
            call(*given)
    with pytest.raises(equalize.EqualizeError, match=takes + "dict, Head"):
        call({}, model)
    with pytest.raises(equalize.EqualizeError, match=r"does not exist; give an equalize\.json or a directory with one"):
        call(tmp_path, model)
    (tmp_path / "equalize.json").write_text(json.dumps({"schema": 7}))
    with pytest.raises(equalize.EqualizeError, match="is no plan of this version"):
        call(model, tmp_path)


def test_a_checkpoint_in_place_of_its_model(segformer_dir, network):
    checkpoint = equalize.load(segformer_dir)
    with pytest.raises(equalize.EqualizeError, match=r"got Plan, Checkpoint.*; give checkpoint\.model"):
        equalize.attach(network[1], checkpoint)


@pytest.mark.slow
def test_types(tmp_path):
    """A type checker takes both orders and refuses two plans."""
    lines = [
        "from pathlib import Path",
        "import equalize",
        "from torch import nn",
        "def f(plan: equalize.Plan, model: nn.Module) -> None:",
        "    equalize.attach(plan, model); equalize.attach(model, plan); equalize.apply(model, 'OUT')",
        "    equalize.apply(Path('OUT'), model); equalize.attach(plan=plan, model=model)",
        "    equalize.attach(plan, plan)",
    ]
    file = tmp_path / "use.py"
    file.write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(equalize.__file__).parents[1])
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1, done.stdout
    assert "use.py:7: error: No overload variant" in errors[0]


def test_weights_are_not_equalized_twice(network):
    """As where a cell of a notebook runs again: the factors would be squared."""
    plan = network[1]
    model, x, _ = drawn("bias")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    equalize.apply(plan, model)
    once = model.body.fuse.weight.detach().clone()
    for again in (lambda: equalize.apply(plan, model), lambda: equalize.calibrate(model, [x], "rescale")):
        with pytest.raises(equalize.EqualizeError, match=r"^body\.fuse\.weight: is already equalized.*; load"):
            again()
        assert torch.equal(model.body.fuse.weight, once)
    model.load_state_dict(before)
    equalize.calibrate(model, [x], "rescale")
    torch.testing.assert_close(model.body.fuse.weight, once, rtol=1e-5, atol=1e-6)  # sigmas summed anew
    model.load_state_dict(before)
    equalize.apply(plan, model)
    assert torch.equal(model.body.fuse.weight, once)


def test_an_attached_network_is_folded_before_it_is_equalized_again(network):
    """Its sites would be refused one by one, and the plan be empty."""
    plan = network[1]
    model, x, _ = drawn("bias")
    equalize.attach(plan, model)
    for again in (lambda: equalize.calibrate(model, [x]), lambda: equalize.apply(plan, model)):
        with pytest.raises(equalize.EqualizeError, match=r"^body\.fuse: is attached to a plan; call fold first$"):
            again()
    equalize.fold(model)
    assert len(equalize.calibrate(model, [x]).equalized) == 1


def test_a_plan_that_equalizes_nothing_says_so(network, caplog):
    model, plan = network
    equalize.attach(plan, model)
    equalize.fold(model)
    assert not caplog.text
    equalize.attach(replace(plan, sites=()), model)
    assert "the plan equalizes no layer; the network is trained as it is" in caplog.text
