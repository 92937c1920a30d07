"""Global or batch statistics? One number a branch against one a batch, on images whose contrast differs."""

import torch
from common import Fuse, print_key, print_table, random_field

import equalize

IMAGES = 256

generator = torch.Generator().manual_seed(0)
contrast = torch.exp(0.5 * torch.randn(IMAGES, 1, 1, 1, generator=generator))
level = torch.randn(IMAGES, 1, 1, 1, generator=generator)
deep = random_field((IMAGES, 8, 4, 4), 0.5, generator) * contrast + level
skip = random_field((IMAGES, 8, 8, 8), 0.5, generator)
model = Fuse([8, 8])
sites = equalize.scan(model, (skip[:2], deep[:2])).sites


def sigma(index: torch.Tensor, size: int) -> float:
    """Of the upsampled branch over these images, read `size` at a time."""
    batches = [(skip[part], deep[part]) for part in index.split(size)]
    return equalize.measure(model, sites, batches)["fuse"][1].std


everything = torch.arange(IMAGES)
rows, spread = [], {}
for size in (1, 4, 16, 64):
    # batches that hold image 0: what explicit equalizers with batch statistics would divide it by
    others = [torch.randint(1, IMAGES, (size - 1,), generator=generator) for _ in range(100)]
    around = torch.tensor([sigma(torch.cat([everything[:1], each]), size) for each in others])
    batches = torch.tensor([sigma(part, size) for part in everything.split(size)])
    spread[size], other = (float(each.std() / each.mean()) for each in (batches, around))
    rows.append([size, spread[size], float(batches.mean()), other, f"{sigma(everything, size):.6f}"])
print_table(
    [
        "batch size",
        "spread of sigma over batches",
        "mean of the batches' sigma",
        "spread for one image in 100 batches",
        "global sigma, read in such batches",
    ],
    rows,
)
print_key(spread[16])
