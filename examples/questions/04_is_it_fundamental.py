"""Is it only upsampling? Any fusion layer of unequal scale: how much of a step's effect comes from each branch.

One example takes one step of SGD or of Adam on the fusion weights; the change of the layer's output is split by
branch. By theory the shares are C_b s_b^2 / sum C s^2 under SGD and C_b s_b / sum C s under Adam (every weight moves by
the rate, in the direction that raises this output most), with s_b the scale that the optimizer sees.
"""

import copy

import torch
from common import print_key, print_table
from torch import Tensor, nn

import equalize

SIGMAS, CHANNELS, EXAMPLES = (0.3, 1.0, 3.0), 16, 100
KINDS = (torch.optim.SGD, torch.optim.Adam)


class Concat(nn.Module):
    """A fusion layer without any resampling."""

    def __init__(self, layer: nn.Module, axis: int) -> None:
        super().__init__()
        self.fuse = layer
        self.axis = axis

    def forward(self, *branches: Tensor) -> Tensor:
        return self.fuse(torch.cat(branches, self.axis))


def shares(model: Concat, inputs: tuple[Tensor, ...], kind: type[torch.optim.Optimizer]) -> Tensor:
    """The mean share (B,) of each branch in the change of an output by the step that the example itself caused."""
    found = []
    for index in range(EXAMPLES):
        trained = copy.deepcopy(model)
        example = tuple(x[index : index + 1] for x in inputs)
        before = trained.fuse.weight.detach().clone()
        optimizer = kind(trained.parameters(), lr=1e-3)
        trained(*example).select(1, 0).sum().backward()
        optimizer.step()
        change = (trained.fuse.weight.detach() - before)[0].flatten()
        u = torch.cat([x.flatten() for x in example])
        found.append((change * u).view(len(SIGMAS), -1).sum(1))
    total = torch.stack(found).sum(0)
    return total / total.sum()


def by_branch(values: Tensor | list[float]) -> str:
    """In percent."""
    return " / ".join(f"{100 * float(value):.1f}" for value in values)


generator = torch.Generator().manual_seed(0)
width = CHANNELS * len(SIGMAS)
LAYERS = {
    "linear on vectors": (lambda: Concat(nn.Linear(width, 8), -1), ()),
    "1-d convolution": (lambda: Concat(nn.Conv1d(width, 8, 1), 1), (1,)),
    "2-d convolution": (lambda: Concat(nn.Conv2d(width, 8, 3), 1), (3, 3)),
}
rows = []
for name, (make, space) in LAYERS.items():
    inputs = tuple(sigma * torch.randn(EXAMPLES, CHANNELS, *space, generator=generator) for sigma in SIGMAS)
    for arm in ("none", "folded", "explicit"):
        torch.manual_seed(0)
        model = make()
        found = equalize.scan(model, tuple(x[:2] for x in inputs), kinds=("plain",))
        if arm != "none":
            plan = equalize.calibrate(model, [inputs], "rescale", found=found)
            if arm == "explicit":
                equalize.attach(plan, model)
        rows.append([name, arm, *(by_branch(shares(model, inputs, kind)) for kind in KINDS)])
for power, arms in ((1, "none, folded"), (0, "explicit")):
    parts = [[sigma ** (power * each) for sigma in SIGMAS] for each in (2, 1)]
    rows.append(["theory", arms, *(by_branch([value / sum(part) for value in part]) for part in parts)])
print_table(["fusion layer", "trained as", "share of the step, SGD, %", "Adam, %"], rows)
print_key(float(rows[6][2].split()[-1]))
