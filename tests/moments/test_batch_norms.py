"""Re-estimated BatchNorms against a direct variance over the concatenation, for uneven splits."""

import pytest
import torch
from torch import nn

import equalize
import equalize.graph.export
from equalize.moments.batch_norms import estimate_norms, untouched_norms
from tests.support.networks import batch_norm

SPLITS = [[11], [1] * 11, [5, 1, 2, 3], [10, 1]]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_direct_variance_over_the_concatenation(split, offset):
    torch.manual_seed(0)
    x = torch.randn(11, 3, 6, 5) * torch.rand(11, 3, 1, 1) * 4 + offset
    model = nn.Sequential(nn.Identity(), batch_norm(3)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    values = estimate_norms(model, ["1.running_mean"], x.split(split), {})
    rows = x.double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(values["1.running_mean"].double(), rows.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(values["1.running_var"].double(), rows.var(1, correction=0), rtol=1e-5, atol=0)
    assert int(values["1.num_batches_tracked"]) == len(split)
    assert model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_images_of_other_sizes_count_by_their_pixels():
    torch.manual_seed(1)
    parts = [torch.randn(2, 2, 8, 8), 5 + torch.randn(1, 2, 2, 3)]
    values = estimate_norms(nn.Sequential(batch_norm(2)), ["0.running_mean"], parts, {})
    rows = torch.cat([part.movedim(1, 0).flatten(1) for part in parts], 1).double()
    torch.testing.assert_close(values["0.running_mean"].double(), rows.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(values["0.running_var"].double(), rows.var(1, correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("norm", "shape"), [(nn.BatchNorm1d, (4, 3)), (nn.BatchNorm3d, (4, 3, 2, 2, 2))])
def test_other_ranks(norm, shape):
    torch.manual_seed(2)
    x = torch.randn(shape)
    values = estimate_norms(nn.Sequential(norm(3)), ["0.running_mean"], x.split(3), {})
    rows = x.movedim(1, 0).flatten(1)
    torch.testing.assert_close(values["0.running_var"], rows.var(1, correction=0))


def test_norms_that_are_not_asked_for_or_not_called_stay():
    class Some(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.kept, self.unused = batch_norm(2), batch_norm(2), batch_norm(2)

        def forward(self, x):
            return self.kept(self.used(x))

    values = estimate_norms(Some(), ["used.running_mean", "unused.running_mean"], [torch.randn(2, 2, 3, 3)], {})
    assert set(values) == {"used.running_mean", "used.running_var", "used.num_batches_tracked"}
    assert estimate_norms(Some(), [], [torch.randn(2, 2, 3, 3)], {}) == {}


def test_which_norms_never_saw_data():
    fresh, seen, converted, bare = nn.BatchNorm2d(2), batch_norm(2), batch_norm(2), nn.BatchNorm2d(2, affine=False)
    converted.num_batches_tracked.zero_()
    counted = nn.BatchNorm2d(2)
    counted.num_batches_tracked.fill_(1)
    untracked = nn.BatchNorm2d(2, track_running_stats=False)
    model = nn.Sequential(fresh, seen, converted, bare, counted, untracked, nn.InstanceNorm2d(2))
    assert untouched_norms(model) == ["0.running_mean", "3.running_mean"]
    assert untouched_norms(nn.BatchNorm2d(2)) == ["running_mean"]


class Row(nn.Module):
    """Five BatchNorms in a row, and one beside them."""

    def __init__(self):
        super().__init__()
        self.row = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3), batch_norm(4), nn.ReLU()) for _ in range(5)))
        self.beside = batch_norm(3)

    def forward(self, x):
        return self.row(x).mean() + self.beside(x).mean()


@pytest.mark.parametrize("split", SPLITS)
def test_norms_in_a_row_are_each_estimated_on_what_they_will_see(split):
    torch.manual_seed(4)
    model = Row().eval()
    x = torch.randn(11, 4, 16, 16)
    model.beside = batch_norm(4)
    graph = equalize.graph.export.trace(model, x)
    norms = [*(f"row.{place}.1.running_mean" for place in range(5)), "beside.running_mean"]
    assert graph.norms_before["row.3.1.running_mean"] == set(norms[:3])
    assert graph.norms_before["beside.running_mean"] == set()
    values = estimate_norms(model, norms, x.split(split), graph.norms_before)
    with torch.no_grad():
        seen = x.double()
        for place, block in enumerate(model.double().row):
            y = block[0](seen)
            rows = y.movedim(1, 0).flatten(1)
            mean, variance = rows.mean(1), rows.var(1, correction=0)
            torch.testing.assert_close(values[f"row.{place}.1.running_mean"].double(), mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(values[f"row.{place}.1.running_var"].double(), variance, rtol=1e-4, atol=0)
            shape = (1, -1, 1, 1)
            y = (y - mean.view(shape)) / (variance.view(shape) + block[1].eps).sqrt()
            seen = (y * block[1].weight.view(shape) + block[1].bias.view(shape)).relu()


def test_a_network_that_was_never_trained_takes_a_dozen_passes_at_most():
    passes = 0

    class Counted(list):
        def __iter__(self):
            nonlocal passes
            passes += 1
            return super().__iter__()

    model = nn.Sequential(*(nn.BatchNorm2d(2) for _ in range(20))).eval()
    norms = [f"{place}.running_mean" for place in range(20)]
    before = {key: set(norms[:place]) for place, key in enumerate(norms)}
    values = estimate_norms(model, norms, Counted([torch.randn(4, 2, 8, 8) * 3 + 1]), before)
    assert passes == 12
    for key in norms[1:]:
        assert values[key].abs().max() < 1e-3  # what comes out of a BatchNorm is centered


class TwoNames(nn.Module):
    """A BatchNorm that is an attribute and an element of a Sequential, before and behind a fusion layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.first_norm = nn.BatchNorm2d(4)
        self.stem = nn.Sequential(self.first, self.first_norm, nn.ReLU())
        self.fuse = nn.Conv2d(8, 4, 1, bias=False)
        self.last_norm = nn.BatchNorm2d(4)
        self.head = nn.Sequential(self.fuse, self.last_norm, nn.ReLU())

    def forward(self, x):
        y = self.stem(x)
        low = nn.functional.interpolate(nn.functional.avg_pool2d(y, 2), scale_factor=2, mode="bilinear")
        return self.head(torch.cat([y, low], 1))


def test_a_norm_of_two_names_is_estimated_on_what_it_will_see():
    torch.manual_seed(3)
    model = TwoNames()
    with torch.no_grad():
        model.first.weight.mul_(20)  # the second norm sees another scale once the first one is estimated
    batches = [torch.randn(3, 3, 8, 8) for _ in range(4)]
    equalize.calibrate(model, batches, "rescale")
    seen = []
    model.eval()
    handle = model.last_norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    rows = torch.cat(seen).double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(model.last_norm.running_var.double(), rows.var(1, correction=0), rtol=1e-4, atol=0)


def test_a_pass_ends_once_the_norms_are_known_and_their_error_is_what_it_says():
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(256, 400, 2, 2, generator=generator) + 0.5 * torch.randn(256, 400, 1, 1, generator=generator)

    def estimated(tolerance):
        taken = []
        batches = (taken.append(8) or batch for batch in images.split(8))
        values = estimate_norms(nn.Sequential(batch_norm(400)), ["0.running_mean"], batches, {}, tolerance=tolerance)
        return sum(taken), values["0.running_mean"], values["0.running_var"].sqrt()

    assert estimated(0.0)[0] == estimated(1e-3)[0] == 256
    number, mean, std = estimated(0.1)
    # in units of the variance 5/4 the mean of an image's four numbers has the variance 0.4, their squares that of 0.56
    assert number == 64 >= 0.54 / 0.1**2
    error = ((mean / 1.25**0.5).square() + (std / 1.25**0.5 - 1).square()).mean().sqrt()
    assert abs(error - (0.54 / 64) ** 0.5) < 0.01
