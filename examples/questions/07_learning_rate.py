"""How sensitive is it to the learning rate? A small sweep with Adam; the labels are mostly in the weak skip."""

import torch
from common import Problem, loss, prepared, print_key, print_table, steps

RATES, SEEDS, STEPS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), (0, 1), 150


def final(arm: str, rate: float, seed: int) -> float:
    """The test loss after the last step."""
    problem = Problem.make(seed)
    model = prepared(problem, arm, seed)
    for _ in steps(model, problem, torch.optim.Adam(model.parameters(), lr=rate), STEPS):
        pass
    return loss(model, problem.test)


found = {
    arm: [sum(final(arm, rate, seed) for seed in SEEDS) / len(SEEDS) for rate in RATES]
    for arm in ("none", "folded", "explicit", "paper")
}
rows = []
for arm, losses in found.items():
    best = losses.index(min(losses))
    tenth = f"{losses[best - 2] - losses[best]:+.3f}" if best >= 2 else "-"
    rows.append([arm, *(f"{each:.3f}" for each in losses), f"{RATES[best]:g}", tenth])
print_table(["arm", *(f"{rate:g}" for rate in RATES), "best rate", "lost at a tenth of it"], rows)
print_key(min(found["none"]) - min(found["explicit"]))
