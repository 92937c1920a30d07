"""Moments of branches against a float64 two-pass oracle on what plain forward hooks see."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from equalize.errors import NumericsError, SiteError
from equalize.moments import batch_norms as norms
from equalize.moments import measure as measurement
from equalize.moments.blocks import as_blocks
from equalize.moments.measure import measure, measure_branches
from equalize.sites.scan import scan
from tests.support.tolerance import assert_same_moments


class Decoder(nn.Module):
    """Three branches of other scales and offsets into one padded convolution."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.offset = offset
        self.low = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.high = nn.Conv2d(3, 2, 1)
        self.drop = nn.Dropout(0.5)
        self.pooled = nn.Conv2d(3, 3, 1)
        self.fuse = nn.Conv2d(9, 5, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(5)

    def forward(self, x):
        low = F.interpolate(self.low(x), size=x.shape[2:], mode="bilinear")
        pooled = F.interpolate(self.pooled(x.mean((2, 3), keepdim=True)), size=x.shape[2:])
        fused = torch.cat([low * 0.01, self.high(x) + self.offset, pooled], dim=1)
        return self.norm(self.fuse(self.drop(fused)))


RANGES = [(0, 4), (4, 6), (6, 9)]


def seen_by_hook(model: nn.Module, layer: nn.Module, batches) -> torch.Tensor:
    """Everything that enters `layer`, in float64."""
    inputs: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].double()))
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat(inputs)


def two_pass(x: torch.Tensor) -> tuple[int, float, float]:
    mean = math.fsum(x.flatten().tolist()) / x.numel()
    return x.numel(), mean, math.sqrt(math.fsum(((x - mean) ** 2).flatten().tolist()) / x.numel())


@pytest.fixture
def images():
    return torch.randn(7, 3, 12, 10, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("offset", [0.0, 10.0, 1e3, 1e4])
@pytest.mark.parametrize("split", [[7], [1] * 7, [3, 1, 2, 1], [6, 1]])
def test_moments_match_two_passes_over_everything(images, offset, split):
    torch.manual_seed(1)
    model = Decoder(offset)
    (site,) = scan(model, images[:1]).sites
    assert [(branch.start, branch.stop) for branch in site.branches] == RANGES
    measured = measure(model, [site], images.split(split))["fuse"]
    # the same batches: at offset 1e4 a float32 has three decimals, and another kernel may round a value the other way
    everything = seen_by_hook(model, model.fuse, images.split(split))
    for moments, (start, stop) in zip(measured, RANGES, strict=True):
        count, mean, std = two_pass(everything[:, start:stop])
        assert moments.count == count
        assert moments.images == 7
        assert moments.mean == pytest.approx(mean, rel=1e-6, abs=1e-6 * std)
        assert moments.std == pytest.approx(std, rel=1e-6)
    if offset:
        assert measured[1].mean / measured[1].std > offset / 2


def test_images_of_several_sizes(images):
    torch.manual_seed(1)
    model = Decoder()
    sites = scan(model, images[:1]).sites
    batches = [images[:2], images[2:3, :, :6, :8], images[3:, :, :, :4]]
    measured = measure(model, sites, batches)["fuse"]
    parts = [seen_by_hook(model, model.fuse, [batch]) for batch in batches]
    for moments, (start, stop) in zip(measured, RANGES, strict=True):
        count, mean, std = two_pass(torch.cat([part[:, start:stop].flatten() for part in parts]))
        assert moments.count == count
        assert moments.mean == pytest.approx(mean, rel=1e-6, abs=1e-6 * std)
        assert moments.std == pytest.approx(std, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_promoted(images, dtype):
    torch.manual_seed(1)
    model = Decoder().to(dtype)
    sites = scan(model, images[:1].to(dtype)).sites
    measured = measure(model, sites, [images.to(dtype)])["fuse"]
    everything = seen_by_hook(model, model.fuse, [images.to(dtype)])  # the same kernels: bfloat16 has two decimals
    for moments, (start, stop) in zip(measured, RANGES, strict=True):
        _, mean, std = two_pass(everything[:, start:stop])
        assert moments.mean == pytest.approx(mean, rel=1e-6, abs=1e-6 * std)
        assert moments.std == pytest.approx(std, rel=1e-6)


class Functional(nn.Module):
    """Kernels that are called functionally, two of them kept by one module, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, 6, 1, 1))
        self.second = nn.Parameter(torch.randn(7, 5, 1, 1))
        self.last = nn.Linear(4 + 5, 2)

    def forward(self, x):
        small = F.avg_pool2d(x, 2)
        u = torch.cat([F.interpolate(small, scale_factor=2.0), 5 * x], 1)
        y = F.conv2d(input=u, weight=self.first)
        v = torch.cat([F.interpolate(y[:, :2, ::2, ::2], scale_factor=2.0, mode="bilinear"), 100 + x], 1)
        z = torch.conv2d(v, self.second)
        w = torch.cat([y.permute(0, 2, 3, 1), z[:, :5].permute(0, 2, 3, 1)], dim=-1)
        return self.last(w)


def test_functional_kernels_of_one_module_are_kept_apart(images):
    torch.manual_seed(2)
    model = Functional().eval()
    found = scan(model, images[:1], kinds=("resampled", "plain"))
    assert [site.weight for site in found.sites] == ["first", "second", "last.weight"]
    assert len({site.layer for site in found.sites}) == 3
    measured = measure(model, found.sites, images.split(2))
    small = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2.0)
    y = F.conv2d(torch.cat([small, 5 * images], 1), model.first.detach())
    _, mean, std = two_pass((100 + images).double())
    assert measured[found.sites[1].layer][1].mean == pytest.approx(mean, rel=1e-6)
    assert measured[found.sites[1].layer][1].std == pytest.approx(std, rel=1e-6)
    count, mean, std = two_pass(y.double())
    first = measured["last"][0]
    assert (first.count, first.images) == (count, 7)
    assert first.mean == pytest.approx(mean, rel=1e-5, abs=1e-6 * std)
    assert first.std == pytest.approx(std, rel=1e-5)


class Restless(Decoder):
    """Changes its buffers and draws numbers whenever it runs; one is replaced rather than written to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(2))
        self.interrupt = False

    def forward(self, x):
        self.calls += 1
        self.replaced = self.replaced + torch.rand(2)
        if self.interrupt:
            raise KeyboardInterrupt
        return super().forward(x)


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_model_is_left_as_it_was(images, interrupted):
    torch.manual_seed(3)
    model = Restless()
    sites = scan(model, images[:1]).sites
    model.train()
    model.norm.eval()
    seen: list[int] = []
    model.fuse.register_forward_hook(lambda *_: seen.append(1))
    hooks = {name: list(module._forward_hooks) for name, module in model.named_modules()}
    modes = {name: module.training for name, module in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    buffers = {name: id(buffer) for name, buffer in model.named_buffers()}
    tf32 = torch.backends.cudnn.allow_tf32
    random = torch.get_rng_state()
    model.interrupt = interrupted
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            measure(model, sites, [images])
    else:
        measure(model, sites, [images])
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.backends.cudnn.allow_tf32 == tf32
    assert torch.is_grad_enabled()
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: list(module._forward_hooks) for name, module in model.named_modules()} == hooks
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == buffers
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_the_first_bad_image_is_named(images):
    torch.manual_seed(4)
    model = Decoder()
    sites = scan(model, images[:1]).sites
    images[4, 1, 3, 3] = math.nan
    names = [f"street_{number}.png" for number in range(7)]
    with pytest.raises(NumericsError) as caught:
        measure(model, sites, images.split(3), names=names)
    assert caught.value.where == "fuse"
    assert "street_4.png" in str(caught.value)
    assert "0..4" in str(caught.value)
    assert caught.value.exit_code == 4


def test_infinite_activations_are_refused(images):
    model = Decoder(math.inf)
    sites = scan(model, images[:1]).sites
    with pytest.raises(NumericsError, match=r"channels 4\.\.6"):
        measure(model, sites, [images])


class Clips(nn.Module):
    """One layer sees frames, the next whole clips, the last their places one by one, places first."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 2, 1)
        self.frames, self.clips, self.places = nn.Conv2d(6, 2, 1), nn.Conv2d(12, 2, 1), nn.Linear(4, 2)

    def forward(self, x):
        frames = x.flatten(0, 1)
        low = F.interpolate(self.low(F.avg_pool2d(frames, 2)), scale_factor=2.0)
        y = self.frames(torch.cat([low, self.high(frames)], 1)).view(len(x), -1, *x.shape[3:])
        y = self.clips(torch.cat([y, F.interpolate(F.avg_pool2d(y, 2), scale_factor=2.0)], 1))
        u = torch.cat([y, F.interpolate(F.avg_pool2d(y, 2), scale_factor=2.0)], 1)
        return self.places(u.flatten(2).permute(2, 0, 1))


@pytest.mark.parametrize("pays", [0, 2**23])
def test_layers_that_see_an_image_in_several_parts(pays, monkeypatch):
    monkeypatch.setattr(measurement, "_PAYS", pays)
    torch.manual_seed(0)
    model = Clips().eval()
    for clips in (torch.randn(5, 3, 3, 4, 4), torch.randn(2, 3, 3, 4, 4)):
        sites = scan(model, clips).sites
        assert [site.layer for site in sites] == ["frames", "clips", "places"]
        found = measure(model, sites, [clips, clips[:2]])
        for site in sites:
            axis, layer = -1 if site.op == "linear" else 1, model.get_submodule(site.layer)
            parts = [seen_by_hook(model, layer, [each]).movedim(axis, 0).flatten(1) for each in (clips, clips[:2])]
            for branch, moments in zip(site.branches, found[site.layer], strict=True):
                count, mean, std = two_pass(torch.cat(parts, 1)[branch.start : branch.stop])
                assert moments.count == count
                assert moments.mean == pytest.approx(mean, rel=1e-5, abs=1e-6)
                assert moments.std == pytest.approx(std, rel=1e-5)
        assert found["frames"][0].images == found["clips"][0].images


class Looped(Decoder):
    """The decoder on one image after the other, or on the batch twice."""

    def __init__(self, each: bool) -> None:
        super().__init__()
        self.each = each

    def forward(self, x):
        if len(x) == 1:
            return super().forward(x)
        return torch.cat([super(Looped, self).forward(part) for part in (x.split(1) if self.each else (x, -x))])


@pytest.mark.parametrize("each", [True, False])
def test_every_call_of_a_layer_counts(each, images):
    model, plain = Looped(each).eval(), Decoder().eval()
    plain.load_state_dict(model.state_dict())
    sites = scan(model, images[:1]).sites
    parts = [images] if each else [torch.cat([image, -image]) for image in images.split(1)]
    for found, expected in zip(
        measure(model, sites, [images])["fuse"], measure(plain, sites, parts)["fuse"], strict=True
    ):
        assert (found.count, found.images) == (expected.count, len(images))
        assert (found.mean, found.std) == pytest.approx((expected.mean, expected.std), rel=1e-5)


def test_batches_as_a_loader_gives_them(images):
    model = Decoder()
    sites = scan(model, images[:2]).sites
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), batch_size=3)
    expected = measure(model, sites, images.split(3))["fuse"]  # views, at other alignments than what is collated
    assert_same_moments(measure(model, sites, loader)["fuse"], expected)
    with pytest.raises(SiteError, match=r"^batches: must be tensors or tuples of tensors, got dict"):
        measure(model, sites, [{"pixel_values": images}])


class Scaled(Decoder):
    def forward(self, factor, x):
        return super().forward(x * factor.reshape(-1, 1, 1, 1))


@pytest.mark.parametrize("factor", [torch.tensor(2.0), torch.tensor([2.0, 2.0])])
def test_first_inputs_that_are_no_images(images, factor):
    model, plain = Scaled(), Decoder()
    plain.load_state_dict(model.state_dict())
    sites = scan(model, (factor, images[:2])).sites
    (found,) = measure(model, sites, [(factor, images[:2])]).values()
    (expected,) = measure(plain, sites, [images[:2] * 2]).values()
    for ours, theirs in zip(found, expected, strict=True):  # both images may be merged as one: in another order
        assert ours.count == theirs.count
        assert ours.mean == pytest.approx(theirs.mean, abs=1e-6 * theirs.std)
        assert ours.std == pytest.approx(theirs.std, rel=1e-6)


def test_no_images(images):
    model = Decoder()
    with pytest.raises(SiteError, match="hold no image"):
        measure(model, scan(model, images[:1]).sites, [])
    sites = scan(model, images[:0]).sites  # shapes are all that a scan looks at
    assert [len(site.branches) for site in sites] == [3]
    with pytest.raises(SiteError, match="hold no image"):
        measure(model, sites, [images[:0]])
    found, expected = measure(model, sites, [images[:0], images]), measure(model, sites, [images])
    assert_same_moments(found["fuse"], expected["fuse"])


def test_no_weights(images):
    with torch.device("meta"):
        model = Decoder()
    with pytest.raises(SiteError, match=r"^Decoder: is on the meta device"):
        measure(model, scan(model, images).sites, [images])


def test_a_cache_that_tracing_filled_is_named(images):
    cache: dict[str, torch.Tensor] = {}

    class Cached(Decoder):
        def forward(self, x):
            return super().forward(x + cache.setdefault("grid", torch.ones(12, 10)))

    model = Cached()
    sites = scan(model, images).sites
    with pytest.raises(SiteError, match="keeps tensors from when it was traced, in a cache outside its modules"):
        measure(model, sites, [images])
    cache.clear()
    model(images)
    assert measure(model, scan(model, images).sites, [images])["fuse"][0].count == 7 * 4 * 12 * 10


def test_no_sites_asks_for_no_images():
    assert measure(nn.Conv2d(3, 3, 1), [], iter(())) == {}


def test_a_layer_that_is_not_called_is_named(images):
    class Sometimes(Decoder):
        def forward(self, x):
            return super().forward(x) if x.shape[2] == 12 else self.high(x)

    model = Sometimes()
    sites = scan(model, images[:1]).sites
    with pytest.raises(SiteError, match=r"^fuse\.weight: was not called"):
        measure(model, sites, [images, images[:, :, :8]])


def test_tolerance_stops_early_and_only_when_enough_is_known(images):
    torch.manual_seed(5)
    model = Decoder()
    sites = scan(model, images[:1]).sites
    taken: list[int] = []

    def stream():
        for number in range(200):
            taken.append(number)
            yield torch.randn(1, 3, 12, 12)

    moments = measure(model, sites, stream(), tolerance=0.1)["fuse"]
    assert 32 <= len(taken) < 200
    assert all(each.ci95 is not None and each.ci95 <= 0.1 for each in moments)
    everything = len(taken)
    taken.clear()
    measure(model, sites, stream(), tolerance=0.01)
    assert len(taken) > everything


@pytest.mark.parametrize("pays", [0, 1 << 62])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate"])
def test_padding_of_the_layer_itself_is_not_measured(mode, pays, monkeypatch):
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.fuse = nn.Conv2d(6, 4, 3, padding=1, padding_mode=mode)

        def forward(self, x):
            low = F.interpolate(F.avg_pool2d(x, 3), size=x.shape[2:], mode="bilinear")
            return self.fuse(torch.cat([x, low], 1))

    monkeypatch.setattr("equalize.moments.measure._PAYS", pays)
    torch.manual_seed(0)
    model, batches = Padded(), [torch.randn(2, 3, 9, 9), torch.randn(3, 3, 9, 9)]
    inputs = []
    handle = model.fuse.register_forward_pre_hook(lambda module, args: inputs.append(args[0].double()))
    for batch in batches:
        model(batch)
    handle.remove()
    whole = torch.cat(inputs)
    found = measure(model, scan(model, batches[0]).sites, batches)["fuse"]
    assert found[1].std == pytest.approx(float(whole[:, 3:].std(correction=0)), rel=1e-6)
    assert found[1].count == whole[:, 3:].numel()


class Moves(TorchDispatchMode):
    """Notes every operator that brings a tensor to an accelerator, or from it."""

    def __init__(self) -> None:
        super().__init__()
        self.there: list[str] = []
        self.back: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        before, after = (
            {x.device.type for x in pytree.tree_leaves(each) if isinstance(x, torch.Tensor)} for each in (args, result)
        )
        if before == {"cpu"} and "cuda" in after:
            self.there.append(str(func))
        if "cuda" in before and after == {"cpu"}:
            self.back.append(str(func))
        return result


def test_nothing_waits_for_an_accelerator_before_the_results_are_asked_for():
    """Meta tensors stand in for the device: reading a value fails."""
    sites = scan(Decoder(), torch.randn(2, 3, 12, 10)).sites
    with FakeTensorMode() as fake, torch.device("cuda"):
        model = Decoder().eval()
    with fake, torch.no_grad(), Moves() as moves:
        blocks = as_blocks([torch.empty(4, 3, 12, 10), torch.empty(3, 3, 12, 10)])
        meter = measurement._Meter(model, sites, blocks, statistics=False, histograms=False)
        key = "norm.running_mean"
        observers = {key: partial(norms.see_moments, key, norms._running(dict(model.named_buffers()), key))}
        for block in blocks.read(0, 1):
            rows = meter.rows(block)
            ((seen,),) = norms._observed(model, observers, block)
        assert (len(moves.there), moves.back) == (4, [])  # twice the two batches
        with pytest.raises(DataDependentOutputException):  # whether they are finite
            measurement._finite(rows, sites, block)
        assert len(moves.back) == 1
        assert seen.moments_2NC.cpu().device.type == "cpu"


def test_it_says_how_it_was_measured(images, monkeypatch):
    model = Decoder()
    sites = scan(model, images[:1]).sites
    by_hooks = measure_branches(model, sites, [images])
    assert by_hooks.method == "hooks (so few images that cutting the graph would take longer)"
    assert by_hooks.shapes == ((7, 3, 12, 10),)
    assert measure_branches(model, sites, iter([images, images[:2]])).shapes == ((7, 3, 12, 10),)
    monkeypatch.setattr(measurement, "_PAYS", 0)
    by_graph = measure_branches(model, sites, [images])
    assert (by_graph.method, by_graph.images) == ("cut graph", 7)

    class OneSize(Decoder):
        def forward(self, x):
            return super().forward(x.view(7, 3, 12, 10))

    method = measure_branches(OneSize(), sites, [images]).method
    assert method.startswith("hooks (no cut graph: ")
    assert "\n" not in method


def test_other_sizes_than_the_first_are_measured_by_hooks(images, monkeypatch):
    monkeypatch.setattr(measurement, "_PAYS", 0)
    torch.manual_seed(6)
    model = Decoder()
    sites = scan(model, images[:1]).sites
    batches = [images[:3], images[3:6, :, :8], images[:2].transpose(2, 3), images[6:]]
    cut = []
    inside = measurement.CutGraph

    class Counted(inside):
        def __call__(self, inputs, fractions_NP=None):
            cut.append(tuple(inputs[0].shape))
            return super().__call__(inputs, fractions_NP)

    monkeypatch.setattr(measurement, "CutGraph", Counted)
    found = measure(model, sites, batches)["fuse"]
    assert cut == [(3, 3, 12, 10)]
    monkeypatch.setattr(measurement, "_PAYS", 1 << 62)
    assert_same_moments(found, measure(model, sites, batches)["fuse"])
