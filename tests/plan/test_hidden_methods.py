"""Networks with an attribute of the name of one of nn.Module's methods, as ESPNet's `self.modules = []`."""

import copy
import json

import pytest
import torch
from torch import nn

import equalize
from equalize.moments.measure import measure_branches
from tests.support.networks import save_code
from tests.support.scenes import write_scenes

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=3, hidden=("modules",)):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.deep = nn.Conv2d(4, 6, 3, padding=1, stride=2)
        self.fuse = nn.Conv2d(10, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.classifier = nn.Conv2d(5, num_classes, 1)
        for name in hidden:
            setattr(self, name, list(self.encoder.children()) if name == "modules" else [])

    def forward(self, x):
        low = self.encoder(x)
        high = nn.functional.interpolate(self.deep(low), size=low.shape[2:], mode="bilinear")
        return self.classifier(self.norm(self.fuse(torch.cat([high, low], 1))).relu())

class Reads(Net):
    '''Cannot be exported.'''

    def forward(self, x):
        return super().forward(x + 1 if x.sum().item() == 0.5 else x)
"""


def networks() -> dict:
    scope: dict = {}
    exec(NETWORK, scope)
    return scope


# torch itself calls `children`, `named_modules` and others: a network that hides these cannot be put into eval mode.
@pytest.mark.parametrize("hidden", [("modules",), ("parameters",), ("buffers",), ("modules", "parameters", "buffers")])
@pytest.mark.parametrize("kind", ["Net", "Reads"])
def test_the_whole_way(kind, hidden):
    make = networks()[kind]
    torch.manual_seed(0)
    model = make(hidden=hidden).eval()
    plain = make(hidden=())
    plain.load_state_dict(model.state_dict())
    original = copy.deepcopy(model)
    batches = [torch.randn(2, 3, 16, 16) for _ in range(2)]
    scan = equalize.scan(model, batches[0])
    assert [site.layer for site in scan.sites] == ["fuse"]
    moments = equalize.measure(model, scan.sites, batches)
    assert moments == equalize.measure(plain.eval(), scan.sites, batches)  # the same kernels on the same images
    plan = equalize.calibrate(model, batches, "rescale")
    assert {"encoder.1.running_mean", "fuse.weight", "norm.running_var"} <= set(plan.changed)
    equalize.apply(plan, original)
    state = model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in original.state_dict().items())  # the same edits
    before = {key: tensor.clone() for key, tensor in state.items()}
    equalize.attach(plan, model)
    assert nn.utils.parametrize.is_parametrized(model.fuse)
    torch.testing.assert_close(model(batches[0]), original(batches[0]))
    equalize.fold(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())  # V never moved


def test_a_cut_graph_measures_it_too(monkeypatch):
    monkeypatch.setattr("equalize.moments.measure._PAYS", 0)
    torch.manual_seed(1)
    model = networks()["Net"]().eval()
    images = torch.randn(8, 3, 32, 32)
    sites = equalize.scan(model, images[:1]).sites
    cut = measure_branches(model, sites, images.split(4))
    hooks = measure_branches(model, sites, iter(images.split(4)))
    assert cut.method == "cut graph"
    assert hooks.method.startswith("hooks")
    for one, other in zip(cut.moments["fuse"], hooks.moments["fuse"], strict=True):
        assert one.std == pytest.approx(other.std, rel=1e-5)  # other kernels in another order


def test_through_the_command_line(run_cli, photos, tmp_path):
    name = save_code(NETWORK, tmp_path)
    model = (name.source, "--arch", name.arch)
    out = tmp_path / "out"
    ran = run_cli("calibrate", *model, "--data", photos, "-o", out, "--strategy", "rescale", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["check"]["interior"] < 1e-5
    ran = run_cli("verify", out, "--against", *model)
    assert ran.code == 0, ran.err
    data = write_scenes(tmp_path / "data", 3, counts={"train": 4, "val": 2})
    flags = ("--max-steps", 1, "--batch-size", 2, "--device", "cpu", "--workers", 0, "--freeze-norms")
    ran = run_cli("finetune", out, *model[1:], "--data", data, "-o", tmp_path / "trained", *flags, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["steps"] == 1
