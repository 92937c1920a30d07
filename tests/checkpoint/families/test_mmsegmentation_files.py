"""Files of mmsegmentation as they come: training states, other classes, backbones alone, configs that are run."""

import json
import pickle
import sys

import numpy as np
import pytest
import torch

from equalize.checkpoint.families.mmsegmentation.config import read_literals
from equalize.checkpoint.files.pickle_stubs import SAFE_GLOBALS
from equalize.checkpoint.loading import ModelName, load, reload
from equalize.errors import CheckpointError
from tests.support.mmseg_networks import config_text, saved, silent, stock
from tests.support.tolerance import assert_same_outputs


@pytest.fixture(scope="module")
def psp(tmp_path_factory):
    """A whole checkpoint with its config beside it. Read only."""
    return saved(tmp_path_factory.mktemp("psp"), "PSPHead")


def rewritten(source, path, change):
    content = torch.load(source, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


def test_a_training_state_keeps_its_histories(psp, tmp_path):
    with silent():
        from mmengine.logging import HistoryBuffer
    hub = {
        "log_scalars": {"train/loss": HistoryBuffer([1.5, 2.5], [1, 2])},
        "runtime_info": {"best_mIoU": np.float64(3.25), "iter": 3},
        "resumed_keys": {"train/loss": True},
    }
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    change = {"message_hub": hub, "optimizer": optimizer, "param_schedulers": [{"last_step": 2}]}
    source = rewritten(psp, tmp_path / "iter_3.pth", lambda content: content.update(change))
    checkpoint = load(source)
    with torch.no_grad():
        checkpoint.model.decode_head.bottleneck.conv.weight.mul_(2)
    checkpoint.save(tmp_path / "out")
    before = torch.load(source, weights_only=False)
    after = torch.load(tmp_path / "out" / "model.pth", weights_only=False)
    assert list(after) == list(before)
    history = after["message_hub"]["log_scalars"]["train/loss"]
    assert type(history) is HistoryBuffer
    assert [part.tolist() for part in history.data] == [[1.5, 2.5], [1, 2]]
    assert history.statistics("mean") == pytest.approx(4 / 3)
    assert after["message_hub"]["runtime_info"] == {"best_mIoU": 3.25, "iter": 3}
    assert after["optimizer"]["state"][0]["momentum_buffer"].tolist() == [1, 1]
    assert after["meta"] == before["meta"]
    assert torch.equal(
        after["state_dict"]["decode_head.bottleneck.conv.weight"],
        2 * before["state_dict"]["decode_head.bottleneck.conv.weight"],
    )
    again = load(tmp_path / "out")
    assert torch.equal(
        again.model.state_dict()["backbone.stem.0.weight"], after["state_dict"]["backbone.stem.0.weight"]
    )


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call",
    [
        Call(getattr, "text", "format"),
        Call(getattr, Call(getattr, "text", "format"), "__call__"),
        Call(getattr, np.ndarray, "tofile"),
        Call(getattr, np.float64(1), "__class__"),
        Call(np.dtype, "O"),
        Call(np.dtype, [("a", "O")]),
        np.array([object], dtype=object),
        np.zeros(2, dtype=[("a", "f4")]),
        np.random.default_rng,
    ],
)
def test_what_stands_for_numpy_and_getattr_lets_nothing_else_pass(psp, tmp_path, call):
    path = rewritten(psp, tmp_path / "x.pth", lambda content: content["meta"].update(a=call))
    with pytest.raises(CheckpointError, match=r"nothing was run|damaged"):
        load(path)


def test_the_notes_call_nothing():
    """Each stands in for a function and holds what that would have been given."""
    names = {name: note for note, name in SAFE_GLOBALS}
    note = names["numpy._core.multiarray._reconstruct"](names["numpy.ndarray"], (1 << 40,), b"b")
    note.__setstate__((1, (1 << 40,), None, False, b""))
    assert pickle.dumps(note, 2).startswith(b"\x80\x02cnumpy")


def test_another_number_of_classes_draws_the_classifiers_alone(psp, tmp_path):
    checkpoint = load(psp, num_classes=5, init_missing=True, seed=1)
    heads = ("decode_head", "auxiliary_head")
    assert set(checkpoint.newly_initialized) == {
        f"{head}.conv_seg.{part}" for head in heads for part in ("weight", "bias")
    }
    weight = checkpoint.model.state_dict()["decode_head.conv_seg.weight"]
    assert 0 < weight.abs().max() < 0.06  # as mmsegmentation draws it: normal, 0.01
    checkpoint.with_names("abcde").save(tmp_path / "out")
    again, theirs = load(tmp_path / "out"), stock(tmp_path / "out" / "config.py", tmp_path / "out" / "model.pth")
    assert again.classes == theirs.dataset_meta["classes"] == tuple("abcde")
    meta = torch.load(tmp_path / "out" / "model.pth", weights_only=True)["meta"]
    assert meta["cfg"] == (tmp_path / "out" / "config.py").read_text()
    assert {"num_classes": 5}.items() <= read_literals(meta["cfg"], "cfg")["model"]["decode_head"].items()
    checkpoint.save(tmp_path / "unnamed")
    assert "dataset_meta" not in torch.load(tmp_path / "unnamed" / "model.pth", weights_only=True)["meta"]
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert_same_outputs(again.logits(x), theirs(x))
        assert again.logits(x).shape[1] == 5
    with pytest.raises(CheckpointError, match="another shape"):
        load(psp, num_classes=5)


@pytest.mark.parametrize("number", [None, 5])
@pytest.mark.parametrize("said_by", ["the config", "the data set alone", "both"])
def test_what_labels_were_trained_on(said_by, number, psp, tmp_path):
    """Also in the config inside the file, where somebody takes that alone."""

    def reduce(content):
        meta = content["meta"]
        said = {"the data set alone": "", "the config": ", reduce_zero_label=True", "both": ", reduce_zero_label=True"}
        meta["cfg"] = meta["cfg"].replace(", reduce_zero_label=False", said[said_by])
        meta["dataset_meta"]["reduce_zero_label"] = True
        if said_by == "the config":
            del meta["dataset_meta"]["reduce_zero_label"]

    source = rewritten(psp, tmp_path / "ade.pth", reduce)
    checkpoint = load(source, num_classes=number, init_missing=number is not None)
    assert checkpoint.preprocess.reduce_labels is True
    if number is not None:
        checkpoint = checkpoint.with_names("abcde")
    checkpoint.with_reduced_labels(False).save(tmp_path / "out")
    for place in (tmp_path / "out", tmp_path / "out/model.pth"):
        assert load(place).preprocess.reduce_labels is False
    assert "reduce_zero_label=True" not in (tmp_path / "out/config.py").read_text()


def test_a_backbone_alone_gets_its_decoder_drawn(psp, tmp_path):
    def behead(content):
        state = content["state_dict"]
        content["state_dict"] = {key: value for key, value in state.items() if key.startswith("backbone.")}

    path = rewritten(psp, tmp_path / "backbone.pth", behead)
    with pytest.raises(CheckpointError, match="--init-missing"):
        load(path)
    checkpoint = load(path, init_missing=True)
    assert all(key.startswith(("decode_head.", "auxiliary_head.")) for key in checkpoint.newly_initialized)
    original = torch.load(psp, weights_only=True)["state_dict"]
    assert torch.equal(checkpoint.model.state_dict()["backbone.stem.0.weight"], original["backbone.stem.0.weight"])


def backbone_of(source):
    """The backbone's state dict under its own keys."""
    state = torch.load(source, weights_only=True)["state_dict"]
    return {key.removeprefix("backbone."): tensor for key, tensor in state.items() if key.startswith("backbone.")}


FORMS = {  # of a backbone's file: what it holds, given the backbone's state dict under its own keys
    "bare": lambda state: state,
    "of timm": lambda state: {"model": state, "epoch": 3},
    "wrapped": lambda state: {"state_dict": {f"model.backbone.{key}": tensor for key, tensor in state.items()}},
    "of mmpretrain": lambda state: {
        "meta": {"cfg": "model = dict(type='ImageClassifier')", "dataset_meta": {"classes": ["cat"]}, "seed": 3},
        "state_dict": {f"backbone.{key}": tensor for key, tensor in state.items()} | {"head.fc.bias": torch.ones(1)},
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_mmsegmentation_loads_what_was_a_backbone(psp, tmp_path, form):
    backbone = backbone_of(psp)
    torch.save(FORMS[form](backbone), tmp_path / "in.pth")
    checkpoint = load(tmp_path / "in.pth", f"mmseg:{psp.with_suffix('.py')}", init_missing=True)
    checkpoint.with_names("abc").save(tmp_path / "out")
    theirs, ours = stock(tmp_path / "out" / "config.py", tmp_path / "out" / "model.pth"), load(tmp_path / "out")
    assert theirs.dataset_meta["classes"] == tuple("abc")
    assert all(torch.equal(tensor, theirs.backbone.state_dict()[key]) for key, tensor in backbone.items())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_same_outputs(ours.logits(x), theirs(x))
        assert_same_outputs(checkpoint.logits(x), theirs(x))
    content = torch.load(tmp_path / "out" / "model.pth", weights_only=True)
    assert content.get("epoch", 3) == 3
    assert content["meta"].pop("cfg") == (tmp_path / "out" / "config.py").read_text()
    assert content["meta"].keys() - {"seed"} == {"dataset_meta"}
    assert ("seed" in content["meta"]) == (form == "of mmpretrain")
    assert load(tmp_path / "out" / "model.pth").newly_initialized == ()  # the file says itself what it is


def test_a_bare_backbone_is_equalized_and_verified(psp, run_cli, photos, tmp_path):
    torch.save(backbone_of(psp), tmp_path / "in.pth")
    arch, out = ("--arch", f"mmseg:{psp.with_suffix('.py')}"), tmp_path / "out"
    where = (tmp_path / "in.pth", "--data", photos, "-o", out, "--size", 64)
    ran = run_cli("calibrate", *where, *arch, "--init-missing")
    assert ran.code == 0, ran.err
    ran = run_cli("verify", out, "--against", tmp_path / "in.pth", *arch)
    assert ran.code == 0, ran.err


def test_the_config_that_the_user_names_is_run_and_then_needed_no_more(psp, tmp_path, monkeypatch):
    """Once its values are written beside the weights, they say all."""
    (tmp_path / "base.py").write_text(config_text("PSPHead"))
    config = tmp_path / "config.py"
    config.write_text(
        "_base_ = './base.py'\nopen('RUN', 'w').close()\nmodel = dict(decode_head=dict(channels=2 + 2))\n"
    )
    path = rewritten(psp, tmp_path / "bare.pth", lambda content: content.pop("meta"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="holds no config of mmsegmentation; name the config: --arch"):
        load(path)
    assert not (tmp_path / "RUN").exists()
    checkpoint = load(path, f"mmseg:{config}")
    assert (tmp_path / "RUN").exists()
    checkpoint.save(tmp_path / "out")
    (tmp_path / "RUN").unlink()
    assert json.loads((tmp_path / "out" / "architecture.json").read_text())["arch"] == "mmseg"
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert_same_outputs(load(tmp_path / "out").logits(x), checkpoint.logits(x))
    assert not (tmp_path / "RUN").exists()


def test_parts_of_the_users_own_need_his_config_each_time(psp, tmp_path):
    (tmp_path / "my_backbone.py").write_text(
        "from mmseg.models.backbones import ResNetV1c\n"
        "from mmseg.registry import MODELS\n\n\n"
        "@MODELS.register_module(force=True)\nclass MyBackbone(ResNetV1c):\n"
        "    def __init__(self, options, **kwargs):\n"
        "        super().__init__(**kwargs)\n        self.width = options.width\n"  # as parts of mmsegmentation do
    )
    config = tmp_path / "mine.py"
    text = config_text("PSPHead").replace("'ResNetV1c'", "'MyBackbone', options=dict(width=4)")
    config.write_text(text + "custom_imports = dict(imports=['my_backbone'], allow_failed_imports=False)\n")
    path = rewritten(psp, tmp_path / "mine.pth", lambda content: content["meta"].update(cfg=config.read_text()))
    with pytest.raises(CheckpointError, match=r"custom_imports.*--arch mmseg:config\.py"):
        load(path)
    sys.path.insert(0, str(tmp_path))
    try:
        checkpoint = load(path, f"mmseg:{config}", num_classes=4, init_missing=True)
        checkpoint.save(tmp_path / "out")
        with pytest.raises(CheckpointError, match="name that code again: --arch mmseg:"):
            load(tmp_path / "out")
        again = reload(tmp_path / "out", f"mmseg:{config}")
    finally:
        sys.path.remove(str(tmp_path))
    assert type(again.backbone).__name__ == "MyBackbone"
    assert again.backbone.width == 4
    assert again.decode_head.num_classes == 4


def test_a_convnext_like_backbone_and_both_kinds_of_batchnorm(tmp_path):
    path = saved(tmp_path, "FCNHead", "MSCAN")
    checkpoint = load(path)
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in checkpoint.model.modules())
    x = torch.randn(2, 3, 64, 64)
    theirs = stock(path.with_suffix(".py"), path)
    with torch.no_grad():
        assert_same_outputs(checkpoint.logits(x), theirs(x))


def test_without_the_extra_one_line_says_what_to_install(psp, run_cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "mmseg.models", None)
    ran = run_cli("scan", psp)
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.count("\n") == 1
    assert "pip install 'equalize[mmseg]'" in ran.err


def test_json_alone_on_stdout(psp, run_cli):
    ran = run_cli("scan", psp, "--size", "64", "--json")
    found = json.loads(ran.out)
    assert (ran.code, found["family"]) == (0, "mmsegmentation")
    assert found["architecture"] == "EncoderDecoder (ResNetV1c, PSPHead)"
    assert [site["layer"] for site in found["sites"]] == ["decode_head.bottleneck.conv"]


@pytest.mark.parametrize("arch", ["mmseg", "mmseg:nowhere.py"])
def test_no_config(psp, tmp_path, arch):
    path = rewritten(psp, tmp_path / "bare.pth", lambda content: content.pop("meta"))
    with pytest.raises(CheckpointError, match="config"):
        ModelName(source=str(path), arch=arch).load()
    with pytest.raises(CheckpointError, match="--arch-arg"):
        ModelName(source=str(psp), arch_args={"depth": 3}, arch="mmseg").load()
