"""With a BatchNorm behind the fusion layer: what of the mean and what of the scale is left, after one step in float64.

Every arm starts at the plain network's function. What is compared is by how much one step changes the network's output
(in training mode): the difference to the change by the plain network's own step, as a share of that one.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import print_key, print_table
from torch import Tensor, nn

SIGMA, MEAN, COMMON = (0.3, 3.0), (1.0, -5.0), 10.0
TAU = (sum(sigma**2 for sigma in SIGMA) / len(SIGMA)) ** 0.5

torch.manual_seed(0)
u = torch.cat([sigma * torch.randn(16, 8, 8, 8) + mean for sigma, mean in zip(SIGMA, MEAN, strict=True)], 1).double()
labels = torch.randint(3, (16, 6, 6))
sigmas, means = (torch.tensor(values).double().repeat_interleave(8).view(-1, 1, 1) for values in (SIGMA, MEAN))


def network(norm: bool) -> nn.Sequential:
    """A fusion layer of kernel 3, without padding; a BatchNorm, if wanted; a classifier."""
    torch.manual_seed(0)
    behind = nn.BatchNorm2d(16) if norm else nn.Identity()
    model = nn.Sequential(nn.Conv2d(16, 16, 3, bias=not norm), behind, nn.ReLU(), nn.Conv2d(16, 3, 1))
    return model.double()


def way(model: nn.Sequential, x: Tensor, kind: Callable) -> tuple[Tensor, Tensor]:
    """The outputs before and after one step."""
    model = copy.deepcopy(model)
    optimizer = kind(model.parameters(), lr=1e-4)
    start = model(x)
    F.cross_entropy(start, labels).backward()
    optimizer.step()
    return start.detach(), model(x).detach()


def arm(model: nn.Sequential, name: str) -> tuple[nn.Sequential, Tensor]:
    """A network of the same function, and what its fusion layer sees."""
    model = copy.deepcopy(model)
    weight, bias = model[0].weight.data, model[0].bias
    if name == "centered":
        if bias is not None:  # without a BatchNorm the bias must keep the function
            bias.data += (weight * means).sum((1, 2, 3))
        return model, u - means
    if name == "all branches times 10, explicitly":
        if bias is not None:
            weight /= COMMON
        return model, COMMON * u
    if name == "all weights times 10":
        weight *= COMMON
        return model, u
    weight *= sigmas / TAU
    return model, u * TAU / sigmas


ARMS = ("centered", "all branches times 10, explicitly", "all weights times 10", "branches to one scale")
rows = []
for norm in (True, False):
    plain = network(norm)
    for name in ARMS:
        if name == "all weights times 10" and not norm:
            continue  # another function
        differences = []
        for kind in (torch.optim.SGD, torch.optim.Adam):
            start, end = way(plain, u, kind)
            own_start, own_end = way(*arm(plain, name), kind)
            assert torch.allclose(own_start, start, rtol=0, atol=1e-3 * float(start.std())), name
            differences.append(float((own_end - own_start - end + start).norm() / (end - start).norm()))
        shown = ["0 (rounding)" if each < 1e-6 else f"{each:.2g}" for each in differences]
        rows.append(["BatchNorm" if norm else "none, bias", name, *shown])
print_table(["behind", "what is done", "away from the plain step, SGD", "Adam"], rows)
assert rows[0][2] == "0 (rounding)"
print_key(float(rows[3][2]))
