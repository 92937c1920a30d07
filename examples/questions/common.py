"""What the examples share: random features of known statistics, a small fusion network, a problem for it, tables."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import equalize

torch.set_num_threads(1)

Batch = tuple[Tensor, ...]


def random_field(shape: Sequence[int], rho: float, generator: torch.Generator) -> Tensor:
    """Zero-mean features (N, C, H, W) of variance 1 whose autocorrelation at distance (i, j) is rho^(|i| + |j|)."""
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    for axis in (2, 3):
        place = torch.arange(shape[axis], dtype=torch.float64)
        covariance = rho ** (place - place.view(-1, 1)).abs()
        x = (x.movedim(axis, -1) @ torch.linalg.cholesky(covariance).T).movedim(-1, axis)
    return x.float()


class Fuse(nn.Module):
    """Brings every branch to the size of the first, concatenates and mixes them; a classifier behind."""

    def __init__(
        self, channels: Sequence[int], outputs: int = 32, classes: int = 4, kernel: int = 1, mode: str = "bilinear"
    ) -> None:
        super().__init__()
        self.mode = mode
        self.fuse = nn.Conv2d(sum(channels), outputs, kernel)
        self.classifier = nn.Conv2d(outputs, classes, 1)

    def forward(self, first: Tensor, *deeper: Tensor) -> Tensor:
        branches = [first, *(F.interpolate(x, size=first.shape[2:], mode=self.mode) for x in deeper)]
        return self.classifier(F.relu(self.fuse(torch.cat(branches, 1))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Labels that a random network gives to a skip of small scale and an upsampled branch of large scale.

    Attributes:
        train, test: the two branches, (N, C, 16, 16) and (N, C, 4, 4), and labels (N, 16, 16).
    """

    train: Batch
    test: Batch

    @classmethod
    @functools.cache
    def make(
        cls, seed: int, images: int = 64, skip_share: float = 0.9, channels: int = 16, contrast: float = 0.0
    ) -> "Problem":
        """`skip_share` of what decides the labels is in the skip, whose sigma is a twentieth of the other's.

        One label in ten is wrong. The images' contrasts are exp(`contrast` z), z normal.
        """
        generator = torch.Generator().manual_seed(seed)
        number = images + 64
        skip = random_field((number, channels, 16, 16), 0.5, generator)
        deep = random_field((number, channels, 4, 4), 0.5, generator)
        up = F.interpolate(deep, size=(16, 16), mode="bilinear")
        both = torch.cat([skip * skip_share**0.5, up / up.std() * (1 - skip_share) ** 0.5], 1)
        first, second = (torch.randn(shape, generator=generator) for shape in ((32, 2 * channels), (4, 32)))
        labels = (second @ F.relu(first @ both.movedim(1, 0).flatten(1))).argmax(0).view(number, 16, 16)
        wrong = torch.rand(labels.shape, generator=generator) < 0.1
        labels = torch.where(wrong, torch.randint(4, labels.shape, generator=generator), labels)
        contrast_N = torch.exp(contrast * torch.randn(2, number, 1, 1, 1, generator=generator))
        branches = (skip * contrast_N[0] / 20**0.5, deep * contrast_N[1] / up.std() * 20**0.5, labels)
        return cls(train=tuple(x[:images] for x in branches), test=tuple(x[images:] for x in branches))


def prepared(problem: Problem, arm: str, seed: int, images: Tensor | None = None) -> Fuse:
    """A network of weights drawn under `seed`, the same in every arm.

    Args:
        problem: whose training images are measured.
        arm: "none"; "folded", the scale in the weights and nowhere else; "explicit", trained as behind equalizers;
            "paper", folded to a scale of 1.
        seed: of the weights. images: the indices of those that are measured; None takes all.
    """
    skip, deep = (x if images is None else x[images] for x in problem.train[:2])
    found = sites_of(skip.shape[1], deep.shape[1])
    torch.manual_seed(seed)
    model = Fuse([skip.shape[1], deep.shape[1]])
    if arm != "none":
        scale = "paper" if arm == "paper" else "step"
        plan = equalize.calibrate(model, [(skip, deep)], "rescale", scale=scale, found=found)
        if arm == "explicit":
            equalize.attach(plan, model)
    return model


@functools.cache
def sites_of(first: int, deeper: int) -> equalize.Scan:
    """The fusion layer of a `Fuse` for a `Problem`, traced once: that takes as long as a training here."""
    return equalize.scan(Fuse([first, deeper]), (torch.zeros(2, first, 16, 16), torch.zeros(2, deeper, 4, 4)))


def add_equalizers(plan: equalize.Plan, model: nn.Module) -> None:
    """Real equalizers before each fusion layer: tau (u_b - mu_b)/sigma_b."""
    for site in plan.sites:

        def equalized(_: nn.Module, inputs: tuple[Tensor], site: equalize.Site = site) -> Tensor:
            branches = site.branches
            return torch.cat([(inputs[0][:, b.start : b.stop] - b.mean) * (site.tau / b.std) for b in branches], 1)

        model.get_submodule(site.layer).register_forward_pre_hook(equalized)


def steps(model: nn.Module, problem: Problem, optimizer: torch.optim.Optimizer, number: int) -> Iterator[int]:
    """Trains by batches of eight images in an order that is always the same; yields after each step."""
    generator = torch.Generator().manual_seed(0)
    for step in range(number):
        index = torch.randint(len(problem.train[0]), (8,), generator=generator)
        skip, deep, labels = (x[index] for x in problem.train)
        optimizer.zero_grad()
        F.cross_entropy(model(skip, deep), labels).backward()
        optimizer.step()
        yield step


def loss(model: nn.Module, data: Batch) -> float:
    """The mean cross entropy."""
    with torch.no_grad():
        return float(F.cross_entropy(model(*data[:-1]), data[-1]))


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """In Markdown, as it stands in docs/questions.md."""
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(f"{each:.3g}" if isinstance(each, float) else str(each) for each in row) + " |")


def print_key(value: float) -> None:
    """The number that the tests compare with docs/questions.md."""
    print(f"\nkey number: {value:.4g}")
