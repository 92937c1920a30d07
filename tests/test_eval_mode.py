"""A model is left as it was found, whatever is done with it meanwhile."""

import pytest
import torch
from torch import nn

from equalize.checkpoint.build import construct
from equalize.eval_mode import eval_mode
from equalize.graph.record import record
from equalize.plan.draw import redraw


class Keeps(nn.Module):
    """Keeps what it has seen, and replaces one of its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5).eval()
        self.register_buffer("steps", torch.zeros(()))
        self.seen: list[torch.Tensor] = []
        self.cache = {"sizes": {1}}

    def forward(self, x):
        self.steps = self.steps + 1
        self.norm.running_mean.add_(1)
        self.seen.append(x)
        self.cache["sizes"].add(len(x))
        self.extra = x
        return self.drop(self.norm(x)) + torch.rand(())


def run(model, *, attributes):
    with eval_mode(model, attributes=attributes):
        assert not any(module.training for module in model.modules())
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not model(torch.randn(2, 3, 4, 4)).requires_grad
        raise KeyboardInterrupt


@pytest.fixture
def with_tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("with_tf32")
@pytest.mark.parametrize("attributes", [False, True])
def test_everything_is_as_it_was_found_also_when_interrupted(attributes):
    model = Keeps().train()
    model.drop.eval()
    buffers = {key: (buffer, buffer.clone()) for key, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        run(model, attributes=attributes)
    assert [module.training for module in model.modules()] == [True, True, False]
    assert torch.is_grad_enabled()
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.equal(torch.get_rng_state(), state)  # the same bytes
    for key, buffer in model.named_buffers():
        assert buffer is buffers[key][0]
        assert torch.equal(buffer, buffers[key][1])  # copied back
    left = not attributes
    assert (len(model.seen), model.cache["sizes"]) == (left, {1, 2} if left else {1})
    assert not hasattr(model, "extra")  # of a module that replaced a buffer


class Fills(nn.Module):
    """Fills a buffer when it is first called, and again for another width."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", None)
        self.width = 0

    def forward(self, x):
        if self.width != x.shape[-1]:
            self.grid = torch.linspace(-1, 1, x.shape[-1])
            self.width = x.shape[-1]
        return x + self.grid


def test_a_buffer_that_the_forward_fills_is_empty_again():
    model = Fills()
    for _ in range(2):
        with eval_mode(model):
            model(torch.zeros(4))
        assert not model.state_dict()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch.jit is deprecated
def test_a_part_in_torch_script():
    model = nn.Sequential(torch.jit.script(nn.BatchNorm2d(3)))
    with eval_mode(model):
        model[0].running_mean.add_(1)
    assert model[0].training
    assert not model[0].running_mean.any()


def test_a_buffer_whose_elements_share_memory_is_no_hindrance():
    model = nn.Dropout()
    model.register_buffer("zeros", torch.zeros(1).expand(4))
    with eval_mode(model):
        assert not model.training
    assert model.training
    assert torch.equal(model.zeros, torch.zeros(4))


def precisions():
    """What each switch of torch says, or that it cannot be read, as where older and newer ones disagree."""
    cudnn, mkldnn, cuda = torch.backends.cudnn, torch.backends.mkldnn, torch.backends.cuda
    found = [each.fp32_precision for each in (cuda.matmul, mkldnn.matmul, cudnn.conv, cudnn.rnn)]
    older = (torch.get_float32_matmul_precision, lambda: cuda.matmul.allow_tf32, lambda: cudnn.allow_tf32)
    for read in older:
        try:
            found.append(read())
        except RuntimeError:
            found.append("unreadable")
    return found


@pytest.fixture
def default_precisions():
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for switch in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        switch.fp32_precision = "none"


@pytest.mark.usefixtures("default_precisions")
@pytest.mark.parametrize(
    "lower",
    [
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    ],
)
def test_older_and_newer_switches_of_precision(lower):
    lower()
    before = precisions()
    with eval_mode(nn.Dropout()):
        assert precisions()[:6] == ["ieee"] * 4 + ["highest", False]
    assert precisions() == before


def test_seeds_of_a_gpu_are_the_callers(monkeypatch):
    """Whatever is drawn or run here is on the CPU; nothing would put the seeds of CUDA back."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("CUDA was seeded"))
    layer = nn.Conv2d(3, 3, 1)
    redraw(layer, 5)
    construct(lambda: nn.Conv2d(3, 3, 1), "layer")
    record(layer, (torch.randn(1, 3, 4, 4),))


class TwoGraphs(nn.Module):
    """Does something else in each mode, which its `train` chooses, as torchvision's feature extractors do."""

    def train(self, mode=True):
        self.does = torch.abs if mode else torch.neg
        return super().train(mode)

    def forward(self, x):
        return self.does(x)


class Merges(nn.Linear):
    """Adds an adapter to its weight in eval mode, and takes it out in training, as loralib's layers do."""

    def __init__(self):
        super().__init__(4, 4)
        self.adapter = nn.Parameter(torch.randn(4, 4))
        self.merged = False

    def train(self, mode=True):
        if self.merged == mode:
            self.weight.data += -self.adapter.data if mode else self.adapter.data
            self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        return super().forward(x) + (0 if self.merged else x @ self.adapter.T)


@pytest.mark.parametrize("attributes", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_modules_that_switch_by_a_train_of_their_own_are_switched_back(training, attributes):
    model = nn.Sequential(TwoGraphs()).train(training)
    x = torch.tensor([-1.0, 2.0])
    with eval_mode(model, attributes=attributes):
        torch.testing.assert_close(model(x), -x)
    torch.testing.assert_close(model(x), x.abs() if training else -x)


def test_feature_extractors_with_weights_of_their_own_are_switched_too():
    """Vision transformers have them: the class token lies in the graph."""
    from torchvision.models import vit_b_16
    from torchvision.models.feature_extraction import create_feature_extractor

    with torch.device("meta"):
        model = create_feature_extractor(vit_b_16(), ["encoder.ln"]).train()
    graph = model.graph
    with eval_mode(model):
        assert model.graph is model.eval_graph
    assert model.graph is graph


@pytest.mark.parametrize("attributes", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_adapters_that_merge_in_eval_mode_stay_as_they_were(training, attributes):
    model = nn.Sequential(Merges()).train(training)
    x = torch.randn(3, 4)
    before = model(x)
    weight = model[0].weight.detach().clone()
    with eval_mode(model, attributes=attributes):
        torch.testing.assert_close(model(x), before)
    assert torch.equal(model[0].weight, weight)  # nothing was computed with it
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(x), before)
