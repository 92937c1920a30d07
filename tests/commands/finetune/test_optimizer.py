"""What learns how fast, and when."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.lr_scheduler import PolynomialLR

from equalize.commands.finetune.config import TrainConfig
from equalize.commands.finetune.optimizer import make_optimizer, make_schedule

NAMES = ("backbone", "neck.backbone", "head")


class Net(nn.Module):
    """Convolutions and norms in the backbone, in a part that is only called so too, and in the head."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.neck = nn.ModuleDict({"backbone": nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))})
        self.head = nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))


@pytest.mark.parametrize(
    ("name", "kind", "rate", "decay"), [("adamw", "AdamW", 1e-4, 0.01), ("sgd", "SGD", 0.01, 5e-4)]
)
def test_the_head_learns_faster_and_vectors_do_not_decay(name, kind, rate, decay):
    model = Net()
    optimizer = make_optimizer(model, "backbone", TrainConfig(optimizer=name, head_lr_mult=10.0).resolved())
    assert type(optimizer).__name__ == kind
    found = {
        id(each): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for each in group["params"]
    }
    for place, times in zip(NAMES, (1, 10, 10), strict=True):
        convolution, norm = model.get_submodule(place)
        assert found.pop(id(convolution.weight)) == (pytest.approx(times * rate), decay)
        for vector in (convolution.bias, norm.weight, norm.bias):
            assert found.pop(id(vector)) == (pytest.approx(times * rate), 0.0)
    assert not found
    if name == "sgd":
        assert {group["momentum"] for group in optimizer.param_groups} == {0.9}


def test_fusion_layers_learn_at_a_rate_of_their_own_also_while_parametrized():
    model = Net()
    parametrize.register_parametrization(model.head[0], "weight", nn.Identity())
    config = TrainConfig(lr=0.1, head_lr_mult=2.0, fusion_lr_mult=3.0)
    optimizer = make_optimizer(model, "backbone", config, ("head.0.weight", "backbone.0.weight"))
    found = {id(each): group["lr"] for group in optimizer.param_groups for each in group["params"]}
    named = {name: found.pop(id(parameter)) for name, parameter in model.named_parameters()}
    assert not found
    assert named.pop("head.0.parametrizations.weight.original") == pytest.approx(0.1 * 2 * 3)
    assert named.pop("backbone.0.weight") == pytest.approx(0.1 * 3)
    assert all(rate == pytest.approx(0.1 * (1 if name.startswith("backbone") else 2)) for name, rate in named.items())


def rates(scheduled, steps):
    """The rate of each step."""
    found = []
    for _ in range(steps):
        found.append(scheduled.optimizer.param_groups[0]["lr"])
        scheduled.optimizer.step()
        scheduled.step()
    return found


def sgd(lr=0.1):
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


@pytest.mark.parametrize("power", [0.9, 2.0])
def test_the_decay_is_torchs_polynomial_one(power):
    mine = make_schedule(sgd(), 12, TrainConfig(power=power, warmup=0.0))
    torchs = PolynomialLR(sgd(), total_iters=12, power=power)
    assert rates(mine, 13) == pytest.approx(rates(torchs, 13), rel=1e-12)


def test_warm_up_rises_linearly_to_the_peak():
    found = rates(make_schedule(sgd(), 20, TrainConfig(warmup=0.25, power=1.0)), 20)
    assert found[:6] == pytest.approx([0.1 * step / 5 for step in range(6)])
    assert found[5:] == pytest.approx([0.1 * (1 - step / 15) for step in range(15)])


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_a_training_that_only_warms_up_has_a_last_step(steps):
    assert len(rates(make_schedule(sgd(), steps, TrainConfig(warmup=1.0)), steps)) == steps
