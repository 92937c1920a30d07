"""The contract of families, over all of them: a further library is an entry here and in FAMILIES."""

import copy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from equalize.checkpoint.files.weights import state_on_disk
from equalize.checkpoint.loading import load, reload
from equalize.checkpoint.registry import FAMILIES, family_of_arch
from equalize.checkpoint.request import Request
from equalize.checkpoint.source import NO_WEIGHTS, locate, weights_at
from equalize.checkpoint.written import written_by
from equalize.errors import CheckpointError
from tests.support.mmseg_networks import saved, silent, stock

NETWORK = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=2):
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 3, padding=1)
        self.head, self.auxiliary = nn.Conv2d(4, num_classes, 1), nn.Conv2d(4, num_classes, 1)

    def forward(self, x):
        x = self.backbone(x)
        return {"out": self.head(x), "aux": self.auxiliary(x)}
"""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A checkpoint as its library saves it."""

    family: str
    source: Path
    stock: torch.nn.Module
    """What the library makes of it, without anything of ours."""
    heads: tuple[str, ...]
    """Modules that give the logits which carry a loss, the scored ones first."""
    arch: str | None = None


def of_transformers(directory, request):
    from transformers import UperNetForSemanticSegmentation

    source = request.getfixturevalue("upernet_dir")
    model = UperNetForSemanticSegmentation.from_pretrained(source)
    return Example(family="transformers", source=source, stock=model, heads=("decode_head", "auxiliary_head"))


def of_smp(directory, request):
    import segmentation_models_pytorch as smp

    source = request.getfixturevalue("smp_dir")
    return Example(family="smp", source=source, stock=smp.from_pretrained(source).eval(), heads=("segmentation_head",))


def of_smp_without_a_word(directory, request):
    import segmentation_models_pytorch as smp

    source, model = directory / "unet.pth", smp.from_pretrained(request.getfixturevalue("smp_resnet_dir")).eval()
    torch.save(model.state_dict(), source)
    return Example(family="smp", source=source, stock=model, heads=("segmentation_head",))


def of_torchvision(directory, request):
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

    torch.manual_seed(0)
    source = directory / "deeplab.pth"
    model = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3, aux_loss=True).eval()
    torch.save({"model": model.state_dict(), "epoch": 3}, source)
    return Example(family="torchvision", source=source, stock=model, heads=("classifier", "aux_classifier"))


def of_mmsegmentation(directory, request):
    strides = "strides=(1, 1), dilations=(1, 1)"  # its second head attends to features of the first one's size
    source = saved(directory, "OCRHead", changes={"strides=(1, 2), dilations=(1, 1)": strides})
    model = stock(source.with_suffix(".py"), source)
    heads = ("decode_head.1", "decode_head.0", "auxiliary_head")
    return Example(family="mmsegmentation", source=source, stock=model, heads=heads)


def of_a_user(directory, request):
    (directory / "net.py").write_text(NETWORK)
    names: dict = {}
    exec(NETWORK, names)
    torch.manual_seed(1)
    model = names["Net"](5).eval()
    torch.save(model.state_dict(), directory / "net.pth")
    return Example(
        family="custom", source=directory / "net.pth", stock=model, heads=("head", "auxiliary"),
        arch=f"{directory / 'net.py'}:Net",
    )  # fmt: skip


MAKERS = [of_transformers, of_smp, of_smp_without_a_word, of_torchvision, of_mmsegmentation, of_a_user]


@pytest.fixture(scope="module", params=MAKERS, ids=lambda make: make.__name__)
def example(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("example"), request)


def opened(example):
    arguments = {"num_classes": 5} if example.family == "custom" else {}
    return load(example.source, example.arch, arguments)


def same_tensors(one, other):
    """Bit for bit: they were read from the same bytes."""
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_every_family_has_an_example_and_a_name_of_its_own():
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names) == 5
    assert {make.__name__ for make in MAKERS} >= {"of_a_user", *(f"of_{name}" for name in names if name != "custom")}


def test_the_first_family_that_claims_it_is_its_own_and_the_only_library(example):
    place = locate(str(example.source))
    request = Request(source=str(example.source), arch=example.arch)
    weights = NO_WEIGHTS if place.config else weights_at(place)
    claimed = [family.name for family in FAMILIES if family.claims(place, weights, request)]
    assert claimed == [example.family]


def test_without_weights_the_structure_is_the_same(example):
    if example.family == "custom":
        checkpoint = load(example.source, example.arch, {"num_classes": 5}, weights=False)
    else:
        checkpoint = load(example.source, weights=False)
    shapes = {key: tensor.shape for key, tensor in checkpoint.model.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in example.stock.state_dict().items()}
    assert all(parameter.is_meta for parameter in checkpoint.model.parameters())
    with pytest.raises(CheckpointError, match="without weights"):
        checkpoint.save("out")


def test_what_is_loaded_saved_and_reloaded_is_what_its_library_has(example, tmp_path):
    checkpoint = opened(example)
    assert checkpoint.family == example.family
    assert checkpoint.newly_initialized == ()
    assert same_tensors(checkpoint.model.state_dict(), example.stock.state_dict())
    checkpoint.save(tmp_path / "out")
    assert same_tensors(state_on_disk(tmp_path / "out"), state_on_disk(example.source))
    again = reload(tmp_path / "out", example.arch)
    assert same_tensors(again.state_dict(), example.stock.state_dict())
    family = written_by(tmp_path / "out")
    assert family.name == example.family
    assert family.architecture(tmp_path / "out") == checkpoint.architecture
    assert same_tensors(load(tmp_path / "out", example.arch).model.state_dict(), example.stock.state_dict())


def test_a_changed_tensor_is_written_where_the_keys_say(example, tmp_path):
    checkpoint = opened(example)
    key = next(key for key, tensor in checkpoint.model.state_dict().items() if key.endswith("weight"))
    with torch.no_grad():
        checkpoint.model.state_dict()[key].mul_(2)
    checkpoint.save(tmp_path / "out")
    before, after = state_on_disk(example.source), state_on_disk(tmp_path / "out")
    assert [disk for disk in before if not torch.equal(before[disk], after[disk])] == [checkpoint.disk_keys()[key]]
    assert torch.equal(reload(tmp_path / "out", example.arch).state_dict()[key], 2 * example.stock.state_dict()[key])


def test_a_written_model_that_lacks_a_tensor_is_not_reloaded(example, tmp_path):
    opened(example).save(tmp_path / "out")
    path, *_ = sorted([*(tmp_path / "out").glob("*.pth"), *(tmp_path / "out").glob("*.safetensors")])
    if path.suffix == ".pth":
        content = torch.load(path, weights_only=True)
        state = content.get("state_dict", content.get("model", content))
        del state[next(key for key in state if key.endswith("weight"))]
        torch.save(content, path)
    else:
        state = load_file(path)
        del state[next(key for key in state if key.endswith("weight"))]
        save_file(state, path, {"format": "pt"})
    with pytest.raises(CheckpointError):
        reload(tmp_path / "out", example.arch)


def test_heads_are_those_that_give_logits_the_scored_one_first(example):
    """Against what hooks on the modules themselves see, in a model that nothing of ours has made."""
    model, seen = copy.deepcopy(example.stock), {}
    for name in example.heads:
        model.get_submodule(name).register_forward_hook(lambda *call, name=name: seen.setdefault(name, call[-1]))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        family = next(each for each in FAMILIES if each.name == example.family)
        found = list(family.heads(model, x).values())
        scored = load(example.source, example.arch, {"num_classes": 5} if example.arch else None).logits(x)
    assert len(found) == len(example.heads)
    for name, logits in zip(example.heads, found, strict=True):
        inside = torch.nn.functional.interpolate(seen[name], logits.shape[2:], mode="bilinear", align_corners=False)
        torch.testing.assert_close(logits, inside, rtol=1e-4, atol=1e-5)  # some resize their heads' logits in forward
    torch.testing.assert_close(found[0], scored, rtol=1e-4, atol=1e-5)  # two runs of the same network


def test_loading_code_loads_it_without_equalize(example, tmp_path):
    """Except a user's own network, whose code only the caller of equalize has."""
    opened(example).save(tmp_path / "out")
    code, names = written_by(tmp_path / "out").loading_code(tmp_path / "out"), {}
    assert ("equalize" in code) == (example.family == "custom")
    with silent():
        exec(code, names)
    assert not names["model"].training
    assert same_tensors(names["model"].state_dict(), example.stock.state_dict())


def test_loading_code_from_the_hub_names_the_repository_and_the_revision(example, tmp_path):
    opened(example).save(tmp_path / "out")
    code = written_by(tmp_path / "out").loading_code(tmp_path / "out", "acme/streets", "dev")
    assert (code == "") == (example.family == "custom")
    assert code == "" or ('"acme/streets"' in code and 'revision="dev"' in code)
    assert str(tmp_path) not in code
    compile(code, "card", "exec")


PUSH = """
import sys
from equalize.cli import main
code = main(["push", sys.argv[1], "acme/streets", "--dry-run", "--show-card"])
heavy = {"torch", "transformers", "torchvision", "segmentation_models_pytorch", "mmengine", "mmseg"} & set(sys.modules)
sys.exit(str(heavy) if heavy else code)
"""


def test_a_dry_run_of_a_push_imports_neither_torch_nor_the_library(example, tmp_path):
    opened(example).save(tmp_path / "out")
    command = [sys.executable, "-c", PUSH, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "## " in done.stdout


@pytest.mark.parametrize(
    ("arch", "family", "runs_code"),
    [
        ("transformers:dir", "transformers", False),
        ("smp:Unet", "smp", False),
        ("torchvision:fcn_resnet50", "torchvision", False),
        ("mmseg", "mmsegmentation", False),
        ("mmseg:config.py", "mmsegmentation", True),
        ("net.py:Net", "custom", True),
        ("package.module:Net", "custom", True),
    ],
)
def test_what_an_architecture_names_and_whether_that_runs(arch, family, runs_code, tmp_path):
    found = family_of_arch(arch)
    assert (found.name, found.runs_code(arch)) == (family, runs_code)
    if runs_code:
        assert found.recorded(arch, tmp_path) is None
