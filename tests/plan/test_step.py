"""The table "What a step does" of docs/design.md, measured: one step of torch's optimizers on channels that meet its
assumptions exactly, in float64."""

import copy
import itertools
import math

import pytest
import torch
from scipy.linalg import hadamard
from torch import nn

from equalize.moments.measure import measure
from equalize.plan.apply import apply
from equalize.plan.attach import attach
from equalize.plan.strategies import make_plan
from equalize.sites.scan import scan

WIDTHS, SIGMAS = (16, 8, 4), (0.2, 1.5, 5.0)
ENDS = (0, 16, 24, 28)
C = sum(WIDTHS)
RMS = math.sqrt(sum(width * sigma**2 for width, sigma in zip(WIDTHS, SIGMAS, strict=True)) / C)
MEAN = sum(width * sigma for width, sigma in zip(WIDTHS, SIGMAS, strict=True)) / C
GRADIENT = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
# Columns of +-1, each of mean zero, any two uncorrelated over the 32 examples.
Z = torch.tensor(hadamard(32)[:, 1 : C + 1], dtype=torch.float64).view(32, C, 1, 1)


class Layer(nn.Module):
    """Each branch made by factors of sigma_b, one a channel; fused by weights of one size."""

    def __init__(self):
        super().__init__()
        self.producers = nn.ModuleList(nn.Conv2d(width, width, 1, groups=width, bias=False) for width in WIDTHS)
        self.fuse = nn.Conv2d(C, 3, 1, bias=False)
        self.double().eval()
        with torch.no_grad():
            for producer, sigma in zip(self.producers, SIGMAS, strict=True):
                producer.weight.fill_(sigma)
            signs = torch.randint(0, 2, self.fuse.weight.shape, generator=torch.Generator().manual_seed(0))
            self.fuse.weight.copy_(0.3 * (2 * signs - 1))

    def features(self, z):
        parts = [z[:, start:stop] for start, stop in itertools.pairwise(ENDS)]
        return torch.cat([producer(part) for producer, part in zip(self.producers, parts, strict=True)], 1)

    def forward(self, z):
        return self.fuse(self.features(z))


def network(way, scale):
    """The layer treated in one of the table's ways, and the tau of that."""
    model = Layer()
    if way == "none":
        return model, 1.0
    strategy = {"explicit": "rescale", "folded": "rescale", "preserve": "preserve", "migrated": "migrate"}[way]
    sites = scan(model, Z, kinds=("resampled", "plain")).sites
    plan = make_plan(model, sites, measure(model, sites, [Z]), strategy, scale=scale)
    apply(plan, model)
    if way in {"explicit", "preserve"}:
        attach(plan, model)
    return model, plan.sites[0].tau


def by_branch(tensor, axis=1):
    return [part.detach() for part in tensor.split(WIDTHS, axis)]


def contributions(weight, u):
    """Each branch's part of W u: (32, 3) each."""
    return [
        torch.einsum("oc,nc->no", w[..., 0, 0], part[..., 0, 0])
        for w, part in zip(by_branch(weight), by_branch(u), strict=True)
    ]


def stepped(model, parameters, optimizer):
    """A copy after one step with the gradient of example 0."""
    model = copy.deepcopy(model)
    make = {
        "SGD": lambda each: torch.optim.SGD(each, lr=1e-3),
        "Adam": lambda each: torch.optim.Adam(each, lr=1e-3, eps=0.0),
    }[optimizer]
    step = make(list(parameters(model)))
    (model(Z)[0, :, 0, 0] * GRADIENT).sum().backward()
    step.step()
    return model


def step_of(model, optimizer, signs):
    """What a step of the fusion layer adds to y, by branch: own response (3,), or root mean square over all (3,)."""
    after = stepped(model, lambda each: each.fuse.parameters(), optimizer)
    parts = contributions(after.fuse.weight - model.fuse.weight, model.features(Z))
    if signs == "independent":
        return [part.square().mean(0) for part in parts]
    return [part[0].abs() for part in parts]


def relative(before, after):
    """Root mean square of each branch's step over that of its weights."""
    return torch.stack(
        [
            (new.detach() - old.detach()).square().mean().sqrt() / old.detach().square().mean().sqrt()
            for old, new in zip(before, after, strict=True)
        ]
    )


def shares(parts):
    total = torch.stack(parts)
    return (total / total.sum(0)).T  # (3, B): the same for every output


P = [width * sigma**2 / (C * RMS**2) for width, sigma in zip(WIDTHS, SIGMAS, strict=True)]
Q = [width * sigma / (C * MEAN) for width, sigma in zip(WIDTHS, SIGMAS, strict=True)]
EQUAL = [width / C for width in WIDTHS]
WAYS = ("none", "explicit", "folded", "preserve", "migrated")
close = {"rtol": 1e-9, "atol": 1e-9}


def each(values):
    return torch.tensor(values, dtype=torch.float64).expand(3, -1)


@pytest.mark.parametrize("scale", ["step", "paper"])
@pytest.mark.parametrize("way", WAYS)
def test_share_of_each_branch_at_the_start(way, scale):
    model, _ = network(way, scale)
    found = shares([part.square().mean(0) for part in contributions(model.fuse.weight, model.features(Z))])
    torch.testing.assert_close(found, each(EQUAL if way in {"explicit", "folded"} else P), **close)


KINDS = [("SGD", "coherent"), ("Adam", "independent"), ("Adam", "coherent")]


@pytest.mark.parametrize("scale", ["step", "paper"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("optimizer", "signs"), KINDS)
def test_share_in_the_step_and_its_size(optimizer, signs, way, scale):
    (model, tau), (plain, _) = network(way, scale), network("none", scale)
    found, reference = step_of(model, optimizer, signs), step_of(plain, optimizer, signs)
    as_plain = Q if (optimizer, signs) == ("Adam", "coherent") else P
    torch.testing.assert_close(shares(found), each(as_plain if way in {"none", "folded"} else EQUAL), **close)
    size = sum(found) / sum(reference)
    if signs == "independent":
        size = size.sqrt()
    factor = {"SGD": (tau / RMS) ** 2, "Adam": tau / (RMS if signs == "independent" else MEAN)}[optimizer]
    torch.testing.assert_close(size, torch.full_like(size, 1.0 if way in {"none", "folded"} else factor), **close)
    if scale == "step" and signs != "coherent":
        torch.testing.assert_close(size, torch.ones_like(size), **close)


# way: powers of tau/sigma_b under SGD and Adam: of the fusion weights, of the producers
RATES = {
    "none": ((0, 0), (0, 0)),
    "explicit": ((1, 0), (1, 0)),
    "folded": ((-1, -1), (1, 0)),
    "preserve": ((2, 1), (0, 0)),
    "migrated": ((2, 1), (-2, -1)),
}


@pytest.mark.parametrize("scale", ["step", "paper"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_relative_rates_of_weights_and_of_their_producers(optimizer, way, scale):
    (model, tau), (plain, _) = network(way, scale), network("none", scale)
    rates = []
    for net in (model, plain):
        after = stepped(net, lambda each: each.fuse.parameters(), optimizer)
        fused = relative(by_branch(net.fuse.weight), by_branch(after.fuse.weight))
        after = stepped(net, lambda each: each.producers.parameters(), optimizer)
        made = relative(list(net.producers.parameters()), list(after.producers.parameters()))
        rates.append((fused, made))
    ratio = tau / torch.tensor(SIGMAS, dtype=torch.float64)
    for ours, theirs, powers in zip(*rates, RATES[way], strict=True):
        torch.testing.assert_close(ours / theirs, ratio ** powers[optimizer == "Adam"], **close)
