"""How many images? Sigma, its interval and the result of training against the number of images that were measured."""

import torch
from common import Problem, loss, prepared, print_key, print_table, steps

import equalize

SUBSETS, RUNS = 100, 4

problem = Problem.make(0, images=256, channels=8, contrast=0.3)
skip, deep, _ = problem.train
model = prepared(problem, "none", 0)
sites = equalize.scan(model, (skip[:2], deep[:2])).sites
truth = equalize.measure(model, sites, [(skip, deep)])["fuse"]
generator = torch.Generator().manual_seed(0)


def result(index: torch.Tensor | None) -> float:
    """The test loss after 100 explicit steps with sigma from these images, None for all."""
    model = prepared(problem, "explicit", 0, index)
    for _ in steps(model, problem, torch.optim.Adam(model.parameters(), lr=3e-3), 100):
        pass
    return loss(model, problem.test)


rows = []
for number in (4, 16, 64, 256):
    subsets = [torch.randint(len(skip), (number,), generator=generator) for _ in range(SUBSETS)]
    found = [equalize.measure(model, sites, [(skip[index], deep[index])])["fuse"] for index in subsets]
    pairs = [(each, true) for branches in found for each, true in zip(branches, truth, strict=True)]
    error = torch.tensor([each.std / true.std - 1 for each, true in pairs])
    held = sum(abs(each.std - true.std) <= each.ci95 * each.std for each, true in pairs) / len(pairs)
    said = sum(each.ci95 for each, _ in pairs) / len(pairs)
    results = torch.tensor([result(index) for index in subsets[:RUNS]])
    row = [number, f"{100 * error.square().mean().sqrt():.1f} %", f"{100 * said:.1f} %", f"{100 * held:.0f} %"]
    rows.append([*row, f"{results.min():.3f} to {results.max():.3f}"])
rows.append(["all", "0", "-", "-", f"{result(None):.3f}"])
header = ["images", "error of sigma (rms)", "interval said (ci95)", "it held sigma", f"test loss, {RUNS} subsets"]
print_table(header, rows)
print_key(float(rows[2][1].split()[0]))
