"""What reads a branch in training alone."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import equalize
from equalize.sites.scan import scan

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """An auxiliary head that inference leaves out."""

    def __init__(self):
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.high = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.ReLU())
        self.fuse = nn.Conv2d(6, 3, 1)
        self.auxiliary = nn.Conv2d(4, 3, 1)

    def features(self, x):
        return self.low(x), self.high(x)

    def main(self, low, high):
        return self.fuse(torch.cat([F.interpolate(low, size=high.shape[2:], mode="bilinear"), high], 1))

    def heads(self, x):
        low, high = self.features(x)
        return self.main(low, high), self.extra(low)

    def extra(self, low):
        return self.auxiliary(low)


class InForward(Net):
    def forward(self, x):
        return self.heads(x) if self.training else self.main(*self.features(x))


class BehindDropout(Net):
    def forward(self, x):
        low, high = self.features(x)
        y = self.main(low, high)
        return (y, self.extra(F.dropout(low, 0.1, self.training))) if self.training else y


class CalledByItsLibrary(Net):
    """As mmsegmentation, whose loss calls the auxiliary heads."""

    def forward(self, x):
        return self.main(*self.features(x))


class Returned(Net):
    """A feature for a loss of its own; every parameter is read in inference."""

    def forward(self, x):
        low, high = self.features(x)
        y = self.main(low, high) + 0 * self.auxiliary(low).mean()
        return (y, low) if self.training else y


class Shared(InForward):
    """The fusion layer's own weight reads another tensor in training."""

    def __init__(self):
        super().__init__()
        self.auxiliary = nn.Conv2d(6, 3, 1)
        self.auxiliary.weight = self.fuse.weight

    def extra(self, low):
        return self.auxiliary(torch.cat([low, low[:, :2]], 1))


@pytest.mark.parametrize("net", [InForward, BehindDropout, CalledByItsLibrary, Returned, Shared])
def test_migrate_keeps_every_output_of_training(net):
    torch.manual_seed(0)
    model = net().eval()
    with torch.no_grad():
        model.low[0].weight *= 0.1
        before = copy.deepcopy(model).heads(X)
        found = scan(model, X, calls=[net.heads] if net is CalledByItsLibrary else [])
        equalize.calibrate(model, [X], "migrate", found=found)
        after = model.heads(X)
    moved = [branch.fixed is None for site in found.sites for branch in site.branches]
    held = {Returned: [False, True], Shared: [False, False]}
    assert moved == held.get(net, [True, True])
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_an_uncalled_layer_holds_the_branches_that_it_may_read():
    (site,) = scan(CalledByItsLibrary(), X).sites
    expected = "auxiliary.weight, which the network's forward does not call, may read this branch"
    assert [branch.fixed for branch in site.branches] == [expected, None]


class Kept(Net):
    """A feature stays on the module, for a loss."""

    def forward(self, x):
        low, high = self.features(x)
        self.last = [low]
        return self.main(low, high) + 0 * self.auxiliary(high.repeat(1, 2, 1, 1)).mean()


class InAnObject(Net):
    def forward(self, x):
        low, high = self.features(x)
        y = self.main(low, high) + 0 * self.auxiliary(high.repeat(1, 2, 1, 1)).mean()
        return SimpleNamespace(logits=y, features=[low])


@pytest.mark.parametrize("net", [Kept, InAnObject])
def test_features_that_are_kept_or_returned_in_an_object_are_outputs(net):
    (site,) = scan(net(), X).sites
    assert site.branches[0].fixed == "this branch is an output of the network too"
