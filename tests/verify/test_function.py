"""The proof finds what it should find."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from equalize.errors import NumericsError
from equalize.plan.calibrate import calibrate
from equalize.verify.function import check_function
from equalize.verify.tensors import check_planned, check_tensors


class Net(nn.Module):
    """A padded fusion layer of two branches with offsets, and a head."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.high = nn.Conv2d(3, 4, 3, padding=1)
        self.low = nn.Conv2d(4, 4, 3, padding=1, stride=2)
        self.fuse = nn.Conv2d(8, 6, 3, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        high = self.high(x).relu() + 1
        low = F.interpolate(3 * self.low(high).relu(), size=high.shape[2:], mode="bilinear")
        return self.head(self.norm(self.fuse(torch.cat([high, low], 1))).relu())


def pair(strategy, bias=True, scale="step", norm=None):
    torch.manual_seed(0)
    original = Net(bias).eval()
    original.norm.num_batches_tracked += 1
    original.norm.running_mean.normal_()
    original.norm = norm or original.norm
    batches = [torch.randn(3, 3, 16, 20), torch.randn(2, 3, 16, 20)]
    written = copy.deepcopy(original)
    return original, written, calibrate(written, batches, strategy, scale=scale), batches


@pytest.mark.parametrize("scale", ["step", "paper"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("strategy", ["migrate", "preserve", "reinit", "rescale"])
def test_what_the_plan_made_passes(strategy, bias, scale):
    original, written, plan, batches = pair(strategy, bias, scale)
    check = check_function(original, written, plan, batches, lambda output: output)
    check_planned(original, written, plan)
    assert check.interior < 1e-6
    assert check.border < 1e-6  # a BatchNorm is behind: no mean is taken out
    if strategy in {"reinit", "rescale"}:
        assert check.max_abs_change > 0.01
    else:
        assert check.max_abs_change < 1e-5
    if strategy == "preserve":  # the same weights on the same batches
        assert check.to_json() == {"max_abs_change": 0.0, "interior": 0.0, "border": 0.0}


@pytest.mark.parametrize("strategy", ["reinit", "rescale"])
def test_where_means_are_taken_out_the_border_is_reported_apart(strategy):
    original, written, plan, batches = pair(strategy, norm=nn.GroupNorm(2, 6))
    check = check_function(original, written, plan, batches, lambda output: output)
    assert check.interior < 1e-6
    assert check.border > 0.01  # the means of these branches are far from the zeros that pad them


@pytest.mark.parametrize("strategy", ["migrate", "preserve", "reinit", "rescale"])
@pytest.mark.parametrize("key", ["fuse.weight", "fuse.bias", "high.weight", "norm.running_mean"])
def test_a_small_change_anywhere_is_found(strategy, key):
    original, written, plan, batches = pair(strategy)
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    with torch.no_grad():
        written.state_dict()[key].mul_(1.001)

    def prove():
        check_tensors(before, written.state_dict(), plan.changed)
        check_function(original, written, plan, batches, lambda output: output)
        check_planned(original, written, plan)

    with pytest.raises(NumericsError):
        prove()


def test_tensors_that_are_missing_added_or_of_another_dtype_are_named():
    state = {f"layer.{index}": torch.arange(3.0) + index for index in range(6)}
    check_tensors(state, dict(state), [])
    check_tensors(state, state | {"layer.0": torch.zeros(3), "drawn": torch.zeros(1)}, ["layer.0", "drawn"])
    with pytest.raises(NumericsError, match=r"layer\.0, layer\.1, layer\.2 and 3 more: are missing"):
        check_tensors(state, {}, [])
    with pytest.raises(NumericsError, match="extra: were added"):
        check_tensors(state, state | {"extra": torch.zeros(1)}, [])
    with pytest.raises(NumericsError, match=r"layer\.1: have another dtype"):
        check_tensors(state, state | {"layer.1": state["layer.1"].half()}, ["layer.1"])
    with pytest.raises(NumericsError, match=r"layer\.2: changed but are not in the plan"):
        check_tensors(state, state | {"layer.2": state["layer.2"] * (1 + 1e-7)}, [])


def test_bits_count_not_values():
    state = {"w": torch.tensor([0.0, float("nan")])}
    check_tensors(state, {"w": torch.tensor([0.0, float("nan")])}, [])
    with pytest.raises(NumericsError, match="changed but are not in the plan"):
        check_tensors(state, {"w": torch.tensor([-0.0, float("nan")])}, [])


class Autocast(Net):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x).float()


def test_a_forward_that_computes_in_bfloat16_is_named_as_the_cause():
    original, written, plan, batches = pair("rescale")
    for network in (original, written):
        network.__class__ = Autocast
    with pytest.raises(
        NumericsError, match=r"fuse: cannot be proven.* computes in bfloat16 \(torch.autocast"
    ) as caught:
        check_function(original, written, plan, batches, lambda output: output)
    assert "--strategy preserve" in str(caught.value)
    assert not torch.nn.modules.module._global_forward_pre_hooks
