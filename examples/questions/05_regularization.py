"""Regularization or not? The test loss at equal training loss: labels of the skip, of both, of the deep branch.

Eight training images, so that the network can learn them by heart; the skip's sigma is a twentieth of the deep
branch's. A regularizer would lower the test loss at equal training loss wherever the labels come from. Two rates, as
the path might depend on it.
"""

import torch
from common import Problem, loss, prepared, print_key, print_table, steps

LEVELS, SEEDS, STEPS = (0.8, 0.7, 0.6), (0, 1, 2), 1500
CASES = ((2e-3, 0.9, "skip (weak)"), (8e-3, 0.9, "skip (weak)"), (2e-3, 0.5, "both"), (2e-3, 0.1, "deep (strong)"))


def curve(problem: Problem, arm: str, seed: int, rate: float) -> dict[float, tuple[float, int]]:
    """Test loss and step when the training loss first falls below each level, between two looks linearly."""
    model = prepared(problem, arm, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    before, found = (2.0, 2.0), {}
    for step in steps(model, problem, optimizer, STEPS):
        if step % 5 == 4:
            now = (loss(model, problem.train), loss(model, problem.test))
            for level in LEVELS:
                if level not in found and now[0] <= level:
                    part = (before[0] - level) / (before[0] - now[0])
                    found[level] = (before[1] + part * (now[1] - before[1]), step + 1)
            before = now
            if len(found) == len(LEVELS):
                break
    return found


rows, differences = [], {}
for rate, skip_share, where in CASES:
    found = {
        arm: [curve(Problem.make(seed, images=8, skip_share=skip_share), arm, seed, rate) for seed in SEEDS]
        for arm in ("none", "explicit")
    }
    for level in LEVELS:
        none, explicit = (torch.tensor([each[level] for each in found[arm]]).mean(0).tolist() for arm in found)
        rows.append([where, rate, level, none[0], explicit[0], f"{none[1]:.0f} / {explicit[1]:.0f}"])
        differences[where, rate, level] = explicit[0] - none[0]
header = ["labels come from", "rate", "training loss", "test loss, none", "explicit", "steps, none / explicit"]
print_table(header, rows)
print_key(differences["skip (weak)", 2e-3, 0.7])
