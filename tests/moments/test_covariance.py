"""Statistics of a fusion layer's input against a direct computation on the tensor that really enters it."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import equalize
from equalize.distributed import joined, rank_and_number
from equalize.moments import covariance
from equalize.moments import measure as measurement
from equalize.moments.blocks import Block, Blocks
from equalize.moments.measure import measure_branches
from equalize.moments.sampling import POSITIONS, draw_fractions, places_on
from tests.support.networks import CONVS, Fusion
from tests.support.side_by_side import in_processes


class Pyramid(nn.Module):
    """Two branches that are interpolated, one that is not, read by `fuse` through whatever `way` says."""

    def __init__(self, mode: str = "bilinear", way=None, groups: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 6, 3, stride=3, padding=1)
        self.fuse = nn.Conv2d(12, 6, 3, padding=1, groups=groups)
        self.mode = {"mode": mode, **({} if mode == "nearest" else {"align_corners": mode == "corners"})}
        if mode == "corners":
            self.mode["mode"] = "bilinear"
        self.way = way

    def forward(self, x):
        stem = self.stem(x).relu()
        deep = self.down(stem)
        pooled = F.adaptive_avg_pool2d(deep[:, :2], 1)
        parts = [
            F.interpolate(deep, stem.shape[2:], **self.mode),
            stem,
            F.interpolate(pooled, stem.shape[2:], **self.mode),
        ]
        u = torch.cat(parts, 1)
        return self.fuse(u if self.way is None else self.way(u))


class Labeled(Blocks):
    """Fixed blocks of batches with labels, which processes may share."""

    shared = True

    def __init__(self, images, labels, size: int = 2) -> None:
        self._parts = list(zip(images.split(size), labels.split(size), strict=True))
        self._size = size
        self.shapes = ((size, *images.shape[1:]),)
        self.pixels = images.shape[0] * images[0, 0].numel()

    def number(self):
        return len(self._parts)

    def read(self, first, step):
        for index in range(first, len(self._parts), step):
            images, labels = self._parts[index]
            yield Block(batches=(images,), first=index * self._size, labels=(labels,))


def entering(model, images):
    """What enters `fuse`, (N, C, *) in float64, image by image."""
    seen = []
    handle = model.fuse.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    with torch.no_grad():
        for image in images:
            model.eval()(image[None])
    handle.remove()
    return torch.cat(seen)


def rows_at_positions(u, labels=None):
    """The sampled rows (R, C) of every image, by a loop over its positions; the labels (R,) of the nearest pixels."""
    rows, found = [], []
    for index, image in enumerate(u):
        grid = image.shape[1:]
        for place in zip(*(axis[0].tolist() for axis in places_on(grid, draw_fractions(index, 1))), strict=True):
            if labels is not None:
                sides = labels.shape[1:]
                y, x = (int((at + 0.5) / on * side) for at, on, side in zip(place, grid, sides, strict=True))
                if labels[index, y, x] < 0:
                    continue
                found.append(int(labels[index, y, x]))
            rows.append(image[(slice(None), *place)])
    return torch.stack(rows), torch.tensor(found)


def assert_statistics(found, rows, labels=None):
    d = rows - rows.mean(0)
    assert found.positions == len(rows)
    scale = rows.std(0, correction=0)
    # float32 values; the cut graph runs other kernels than the hook
    assert ((found.mean_C - rows.mean(0)).abs() <= 1e-5 * scale + 1e-6).all()
    assert ((found.covariance_CC - d.T @ d / len(d)).abs() <= 1e-5 * scale[:, None] * scale + 1e-9).all()
    if labels is None:
        assert found.cross_CK.shape == (rows.shape[1], 0)
        return
    y = F.one_hot(labels).double()
    y = y[:, y.any(0)]
    y = y - y.mean(0)
    assert found.label_variance == pytest.approx(float(y.square().sum(1).mean()), rel=1e-12)
    assert ((found.cross_CK - d.T @ y / len(d)).abs() <= 1e-5 * scale[:, None] + 1e-9).all()


@pytest.mark.parametrize("by", ["graph", "hooks"])
@pytest.mark.parametrize(
    ("mode", "way"),
    [
        ("bilinear", None),
        ("corners", None),
        ("nearest", None),
        ("bilinear", torch.relu),  # the branches are not the concat's own
        ("bilinear", lambda u: F.pad(u, (2, 1, 0, 3))),
    ],
)
def test_statistics_are_those_of_the_concat(by, mode, way, monkeypatch):
    monkeypatch.setattr(measurement, "_PAYS", 0 if by == "graph" else 1 << 62)
    monkeypatch.setattr(covariance, "_RUN", 500)  # several runs to be merged
    torch.manual_seed(0)
    model = Pyramid(mode, way).eval()
    images = torch.randn(7, 3, 20, 26) + torch.arange(7.0).view(-1, 1, 1, 1)
    (site,) = equalize.scan(model, images[:2]).sites
    measured = measure_branches(model, [site], images.split([3, 2, 2]), statistics=True)
    assert measured.method.startswith("cut graph" if by == "graph" else "hooks")
    u = entering(model, images)
    rows, _ = rows_at_positions(u)
    found = measured.statistics["fuse"]
    assert len(rows) == 7 * POSITIONS
    assert_statistics(found.whole, rows)
    for half, parity in zip(found.halves, (0, 1), strict=True):
        assert_statistics(half, rows[torch.arange(7).repeat_interleave(POSITIONS) % 2 == parity])


@pytest.mark.parametrize("by", ["graph", "hooks"])
def test_labels_come_from_the_nearest_pixel_and_ignored_ones_drop_out(by, monkeypatch):
    monkeypatch.setattr(measurement, "_PAYS", 0 if by == "graph" else 1 << 62)
    monkeypatch.setattr(covariance, "_RUN", 300)
    torch.manual_seed(0)
    model = Pyramid().eval()
    images = torch.randn(6, 3, 20, 26)
    labels = torch.randint(-1, 4, (6, 40, 50))
    labels[labels == 2] = 200
    labels[3] = -1
    (site,) = equalize.scan(model, images[:2]).sites
    found = measure_branches(model, [site], Labeled(images, labels), statistics=True).statistics["fuse"]
    rows, of = rows_at_positions(entering(model, images), labels)
    assert_statistics(found.whole, rows, of)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_one_to_three_axes_and_small_grids(dims):
    torch.manual_seed(0)
    sides = (12,) if dims == 1 else (4,) * dims
    model = Fusion(CONVS[dims](6, 5, 1), dims=dims).eval()
    images = torch.randn(3, 3, *sides)
    (site,) = equalize.scan(model, images[:2]).sites
    found = measure_branches(model, [site], [images], statistics=True).statistics["fuse"]
    u = entering(model, images)
    assert_statistics(found.whole, u.flatten(2).movedim(1, 2).flatten(0, 1))  # every position of a small grid


def test_a_linear_layer_reads_its_channels_last():
    torch.manual_seed(0)
    model = Fusion(nn.Linear(6, 5)).eval()
    images = torch.randn(3, 3, 8, 8)
    (site,) = equalize.scan(model, images[:2]).sites
    found = measure_branches(model, [site], [images], statistics=True).statistics["fuse"]
    assert_statistics(found.whole, entering(model, images).flatten(0, 2))


def test_none_where_rows_are_not_images_and_none_unless_asked_for():
    class Windows(Fusion):
        def forward(self, x):
            u = self.features(x)
            return self.fuse(u.unflatten(3, (2, -1)).movedim(3, 1).flatten(0, 1))

    torch.manual_seed(0)
    model = Windows(nn.Conv2d(6, 5, 1)).eval()
    images = torch.randn(3, 3, 8, 8)
    sites = equalize.scan(model, images[:2]).sites
    assert sites
    measured = measure_branches(model, sites, [images], statistics=True, histograms=True)
    assert not measured.statistics
    assert not measured.histograms
    assert not measure_branches(model, sites, [images]).statistics


def bits(statistics):
    """Everything, to the last bit."""
    parts = (statistics.whole, *statistics.halves)
    tensors = [tensor for part in parts for tensor in (part.mean_C, part.covariance_CC, part.cross_CK)]
    return [*(tensor.tolist() for tensor in tensors), *(part.label_variance for part in parts)]


def collect(folder):
    """Run in each of several processes."""
    with joined(lambda error: 2):
        torch.manual_seed(0)
        model = Pyramid().eval()
        images, labels = torch.randn(11, 3, 20, 26), torch.randint(-1, 4, (11, 20, 26))
        (site,) = equalize.scan(model, images[:2]).sites
        covariance._RUN = 300
        found = measure_branches(model, [site], Labeled(images, labels), statistics=True, histograms=True)
        rank, _ = rank_and_number()
        content = [bits(found.statistics["fuse"]), found.histograms["fuse"].tolist()]
        (folder / f"{rank}.json").write_text(json.dumps(content))


def test_any_number_of_processes_comes_to_the_same_bits(tmp_path):
    """The same kernels on the same shapes, merged in the order of the images."""
    found = []
    for number in (1, 3):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert in_processes(number, collect, folder) == [0] * number
        found += [json.loads((folder / f"{rank}.json").read_text()) for rank in range(number)]
    assert len(found) == 4
    assert all(each == found[0] for each in found)


def test_autocast_is_of_the_network_alone():
    """Under bf16 the products would keep three digits."""
    x_RC = torch.randn(5000, 16)
    sums = covariance._Sums.empty(16, torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        sums.add(covariance.Rows(x_RC, None, torch.arange(5000)))
        sums.flush()
    torch.testing.assert_close(sums.moments_CC / 5000, torch.cov(x_RC.double().T, correction=0), rtol=0, atol=1e-5)


def test_products_after_the_pass_are_of_full_precision(monkeypatch):
    """Of a small pass all are."""
    flushed, flush = [], covariance._Sums.flush

    def spy(sums):
        flushed.append(torch.backends.cuda.matmul.fp32_precision)
        flush(sums)

    monkeypatch.setattr(covariance._Sums, "flush", spy)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        equalize.calibrate(Pyramid(), [torch.randn(4, 3, 12, 12)], "auto")
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(flushed) == {"ieee"}
