"""How often the 95 % interval of a branch's sigma holds the sigma of all images.

    python examples/interval_coverage.py MODEL DATA [--size 192x256] [--tolerance 0.01] [--subsets 1000] [--seed 0]

Every image of DATA, all splits, is measured once by itself. Then random subsets are drawn, and each gives an interval
as `equalize.measure` would: subsets of fixed sizes, and subsets that grow until every interval is as tight as
--tolerance, looked at as often as a calibration does. Two kinds of subset: drawn with replacement, as from a world of
which DATA is a sample, and without, as a calibration draws from a folder. The second kind holds the truth more often
than it should, the more of the images it takes, because the interval takes no account of that share. The worst of
several branches is also the unluckiest: with 1000 subsets that costs about one of 100.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

import equalize
from equalize.data.dataset import open_data
from equalize.data.images import read_image
from equalize.moments.blocks import FEWEST_IMAGES
from equalize.moments.moments import ImageMoments, pool

SPLITS = ("train", "val", "test")
REPEATS = 4  # so many times the images are drawn with replacement before a subset stops growing


class Branch:
    """One branch's moments in every image of a data set."""

    def __init__(self, name: str, moments: Sequence[equalize.Moments]) -> None:
        self.name = name
        self.count = moments[0].count
        self.mean_I = torch.tensor([each.mean for each in moments], dtype=torch.float64)
        self.m2_I = torch.tensor([each.m2 for each in moments], dtype=torch.float64)
        self.truth = self.of(torch.arange(len(moments))).std

    def of(self, index_I: Tensor) -> equalize.Moments:
        """The pooled moments of some of the images."""
        return pool([ImageMoments(count=self.count, mean_N=self.mean_I[index_I], m2_N=self.m2_I[index_I])])

    def holds(self, index_I: Tensor) -> bool:
        """Whether the interval from these images holds the sigma of all."""
        found = self.of(index_I)
        return found.ci95 is not None and abs(found.std - self.truth) <= found.ci95 * found.std


def measure_each(model: str, data: Path, size: tuple[int, int]) -> list[Branch]:
    """Every image of the data set by itself."""
    checkpoint = equalize.load(model)
    images = [image for split in SPLITS for image in open_data(data, split=split).images]
    sites: Sequence[equalize.Site] = ()
    rows = []
    for image in images:
        x = checkpoint.preprocess(read_image(image), size).unsqueeze(0)
        sites = sites or equalize.scan(checkpoint.model, x).sites
        found = equalize.measure(checkpoint.model, sites, [x])
        rows.append([moments for site in sites for moments in found[site.layer]])
    names = [f"{site.layer} {branch.start}..{branch.stop}" for site in sites for branch in site.branches]
    return [Branch(name, column) for name, column in zip(names, zip(*rows, strict=True), strict=True)]


def grown(branches: Sequence[Branch], order_I: Tensor, tolerance: float) -> Tensor:
    """As many of the images, in this order, as a calibration measures before it stops."""
    for number in range(FEWEST_IMAGES, len(order_I), FEWEST_IMAGES):
        intervals = (branch.of(order_I[:number]).ci95 for branch in branches)
        if all(interval is not None and interval <= tolerance for interval in intervals):
            return order_I[:number]
    return order_I


def orders(images: int, subsets: int, seed: int, *, replace: bool) -> Iterator[Tensor]:
    """Random orders of the images."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(subsets):
        if replace:
            yield torch.randint(images, (REPEATS * images,), generator=generator)
        else:
            yield torch.randperm(images, generator=generator)


def report(branches: Sequence[Branch], kind: str, subsets: Sequence[Tensor]) -> None:
    """Prints in how many of 100 subsets the intervals hold the truth."""
    shares = [100 * sum(branch.holds(subset) for subset in subsets) / len(subsets) for branch in branches]
    sizes = sorted(len(subset) for subset in subsets)
    worst = branches[shares.index(min(shares))].name
    median = sizes[len(sizes) // 2]
    print(f"{kind:34} {median:6} {sum(shares) / len(shares):7.1f} {min(shares):7.1f}   {worst}")


def main() -> None:
    """Parses, measures, draws, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--size", default="192x256", help="HxW")
    parser.add_argument("--tolerance", type=float, nargs="+", default=[0.1, 0.05, 0.02, 0.01])
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--subsets", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    height, _, width = arguments.size.partition("x")
    branches = measure_each(arguments.model, arguments.data, (int(height), int(width)))
    images = len(branches[0].mean_I)
    print(f"{images} images, {len(branches)} branches, {arguments.subsets} subsets of each kind\n")
    print(f"{'subsets':34} {'images':>6} {'mean %':>7} {'worst %':>7}   worst branch")
    for replace, how in ((True, "with replacement"), (False, "without replacement")):
        drawn = list(orders(images, arguments.subsets, arguments.seed, replace=replace))
        for size in arguments.sizes:
            report(branches, f"{size}, {how}", [order[:size] for order in drawn])
        for tolerance in arguments.tolerance:
            stopped = [grown(branches, order, tolerance) for order in drawn]
            report(branches, f"until {tolerance:g}, {how}", stopped)


if __name__ == "__main__":
    main()
