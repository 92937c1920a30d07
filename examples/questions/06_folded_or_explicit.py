"""Folded against explicit, exactly: one step of the fusion weights, then many, in float64."""

import copy
from collections.abc import Callable

import torch
from common import Fuse, Problem, add_equalizers, print_key, print_table, steps
from torch import Tensor

import equalize

problem = Problem.make(0)
problem = Problem(train=tuple(x.double() if x.is_floating_point() else x for x in problem.train), test=problem.test)
torch.manual_seed(0)
plain = Fuse([16, 16]).double()
folded = copy.deepcopy(plain)
plan = equalize.calibrate(folded, [problem.train[:2]], "rescale")
(site,) = plan.sites
factors = [site.tau / branch.std for branch in site.branches]  # tau/sigma
per_channel = torch.tensor(factors, dtype=torch.float64).repeat_interleave(16).view(1, -1, 1, 1)

OPTIMIZERS: dict[str, Callable] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3, eps=1e-12),
}


def weights(arm: str, optimizer: str, number: int) -> Tensor:
    """The plain fusion weights after some steps."""
    if arm == "modules":
        model = copy.deepcopy(plain)
        add_equalizers(plan, model)
    else:
        model = copy.deepcopy(folded)
        if arm == "attach":
            equalize.attach(plan, model)
    for _ in steps(model, problem, OPTIMIZERS[optimizer](model.parameters()), number):
        pass
    if arm == "attach":
        equalize.fold(model)
    return model.fuse.weight.detach() * (per_channel if arm == "modules" else 1)


rows = []
for name in OPTIMIZERS:
    change = {arm: weights(arm, name, 1) - weights(arm, name, 0) for arm in ("attach", "folded")}
    parts = zip(change["attach"].split(16, 1), change["folded"].split(16, 1), ("skip", "deep"), factors, strict=True)
    for explicit, own, branch, factor in parts:
        due = factor ** (2 if name == "SGD" else 1)
        rows.append([name, branch, float(explicit.norm() / own.norm()), due])
print_table(["optimizer", "branch", "first step, explicit / folded", "theory: (tau/sigma)^2, tau/sigma"], rows)

print()
skip_ratio = rows[0][2]
rows, worst = [], 0.0
for name in OPTIMIZERS:
    for number in (1, 10, 100):
        expected = weights("modules", name, number)
        size = (expected - weights("modules", name, 0)).norm()
        attached, own = (float((weights(arm, name, number) - expected).norm() / size) for arm in ("attach", "folded"))
        rows.append([name, number, "yes" if attached < 1e-9 else f"no: {attached:.1e}", own])
        worst = max(worst, attached)
header = ["optimizer", "steps", "attach equals equalizer modules to 1e-9", "folded is away by, of the way made"]
print_table(header, rows)
assert worst < 1e-9, worst
print_key(skip_ratio)
