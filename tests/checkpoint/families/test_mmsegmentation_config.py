"""Configs that come with a checkpoint: read as data, and never able to reach more than mmsegmentation's own parts."""

import math

import pytest
import torch

from equalize.checkpoint.families.mmsegmentation import config as mmseg_config
from equalize.checkpoint.families.mmsegmentation import facts as mmseg_facts
from equalize.checkpoint.families.mmsegmentation import registry
from equalize.checkpoint.limits import limit_construction
from equalize.errors import CheckpointError
from tests.support.mmseg_networks import config_text

HEAD = "decode_head=dict(type='FCNHead', in_channels=4, in_index=0, channels=4, num_classes=3"
RESNET = "dict(type='ResNet', depth=18)"


def read(text):
    return mmseg_config.read_literals(text, "x.pth")


def build(text, room=None):
    """What loading does with a config up to the network, on weights that leave it all the room it needs."""
    model = mmseg_config.bare_model(read(text), "x.pth")
    registry.check_parts(model, "x.pth")
    with limit_construction(room or {"a": torch.empty(1 << 20)}):
        return registry.build(model, draw=False, trusted=False)


def model_text(backbone=RESNET, head=f"{HEAD})", more=""):
    return f"model = dict(type='EncoderDecoder', backbone={backbone}, {head}{more})"


def test_all_that_a_dump_holds():
    text = """
'''a docstring'''
a = dict(b=[1, -2.5, (True, None)], c=dict({'c-d': 'x', '7': dict(k={1, 2})}))
e = inf
f = -1e-3
g = nan
h = []
j = dict({'backbone.norm': dict(decay_mult=0.0)})
"""
    found = read(text)
    assert found["a"] == {"b": [1, -2.5, (True, None)], "c": {"c-d": "x", "7": {"k": {1, 2}}}}
    assert (found["e"], found["f"], found["h"]) == (math.inf, -1e-3, [])
    assert found["j"] == {"backbone.norm": {"decay_mult": 0.0}}
    assert math.isnan(found["g"])


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "from os import system",
        "a = open('CANARY', 'w')",
        "a = __import__('os').system('touch CANARY')",
        "a = dict(b=open('CANARY', 'w'))",
        "a = [open('CANARY', 'w')]",
        "a = dict(**open('CANARY', 'w'))",
        "a = dict([('b', open('CANARY', 'w'))])",
        "a = {**open('CANARY', 'w')}",
        "a = dict({'b': open('CANARY', 'w')})",
        "a = dict({open('CANARY', 'w'): 1})",
        "a = float(open('CANARY', 'w'))",
        'a = f\'{open("CANARY", "w")}\'',
        "a = 1 if open('CANARY', 'w') else 2",
        "a = [open(x, 'w') for x in ['CANARY']]",
        "a = lambda: 0",
        "open('CANARY', 'w')",
        "def f(x=open('CANARY', 'w')): pass",
        "class A(metaclass=open('CANARY', 'w')): pass",
        "dict = open",
        "a: open('CANARY', 'w') = 1",
        "a.b = 1",
        "a[0] = 1",
        "a = b = 1",
        "a += 1",
        "a = 10 ** 10 ** 10",
        "a = 'x' * 10 ** 10",
        "a = b",
        "a = tuple(3)",
        "a = " + "[" * 5000,
        "a = " + "-" * 5000 + "1",
        "a = " + "[" * 150 + "open('CANARY', 'w')" + "]" * 150,
        "a = " + "dict(a=" * 150 + "b" + ")" * 150,
        "a = (",
        "a = '\0'",
        "a = 1\nif a: pass",
        "custom_imports = dict(imports=['os'])",
    ],
)
def test_nothing_else_is_understood_and_nothing_is_run(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"--arch mmseg:config\.py"):
        read(f"{line}\nmodel = dict(type='EncoderDecoder')")
    assert not (tmp_path / "CANARY").exists()


def test_the_line_that_is_no_literal_is_named():
    with pytest.raises(CheckpointError, match=r"\(line 3: 'c=\[1, 10 \*\* 3\]\)'\)"):
        read("a = 1\nb = dict(\n    c=[1, 10 ** 3])")


@pytest.mark.parametrize(
    "text",
    [
        model_text(backbone="dict(type='os.system', command='touch CANARY')"),
        model_text(backbone="dict(type='subprocess.run', args=['touch', 'CANARY'])"),
        model_text(backbone="dict(type='canary')"),
        model_text(backbone="dict(type='ResNet', depth=18, norm_cfg=dict(type='canary'))"),
        model_text(backbone="dict(type='ResNet', depth=18, norm_cfg=dict(type=['canary']))"),
        model_text(backbone="dict(type='mmpretrain.ConvNeXt', arch='tiny')"),
        model_text(backbone="dict(type='TIMMBackbone', model_name='resnet18', checkpoint_path='canary')"),
        model_text(backbone="dict(type='VPD', diffusion_cfg=dict(checkpoint='canary'))"),
        model_text(more=", neck=dict(type='CLIPTextEncoder')"),
        model_text(more=", neck=dict(type='SegTTAModel')"),
        model_text(head=f"{HEAD})".replace("FCNHead", "PointHead")),
        model_text(backbone="dict(type='ResNet', depth=18, style='/etc/passwd')"),
        model_text(backbone="dict(type='ResNet', depth=18, style='https://host.invalid')"),
        model_text(backbone="dict(type='ResNet', depth=18, style=b'/etc/passwd')"),
        model_text(backbone="dict(type='ResNet', depth=18, style=...)"),
        model_text(backbone="dict(type='ResNet', depth=18, base_channels=1 << 20)"),
        model_text().replace("EncoderDecoder", "os.system"),
        model_text().replace("EncoderDecoder", "MultimodalEncoderDecoder"),
        "model = dict(backbone=1)",
        "model = 3",
        "a = 1",
    ],
)
def test_only_registered_parts_of_plain_words_and_numbers(text, tmp_path, monkeypatch):
    (tmp_path / "canary.py").write_text("open('CANARY', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CheckpointError):
        build(text)
    assert not (tmp_path / "CANARY").exists()


def test_what_a_registry_lacks_is_not_imported(tmp_path, monkeypatch):
    """Constructors take kinds of layers as bare words too, and a registry imports a word that it does not know."""
    (tmp_path / "canary.py").write_text("open('CANARY', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    models = registry.library()
    with registry._only_registered(), pytest.raises(RuntimeError, match="Failed to get canary"):
        models.get("canary")
    assert not (tmp_path / "CANARY").exists()
    models.get("canary")  # as it does otherwise
    assert (tmp_path / "CANARY").exists()


@pytest.mark.parametrize(
    "fields",
    [
        "init_cfg=dict(type='Pretrained', checkpoint='CANARY')",
        "pretrained='open-mmlab://resnet18'",
    ],
)
def test_weights_that_a_config_asks_for_are_not_fetched(fields):
    network = build(model_text(backbone=f"dict(type='ResNet', depth=18, {fields})"))
    assert "Pretrained" not in str(network.backbone.init_cfg)
    text = model_text(head=f"{HEAD}, loss_decode=dict(type='CrossEntropyLoss', class_weight='pkl'))")
    assert build(text).decode_head.loss_decode.class_weight is None


SWIN = "dict(type='SwinTransformer', embed_dims=64, strides=(4,), out_indices=(0,), num_heads=(1,), {})"


@pytest.mark.parametrize(
    "backbone",
    [
        SWIN.format("depths=(60000,)"),
        SWIN.format("depths=(1,), mlp_ratio=60000"),
        "dict(type='ResNet', depth=18, base_channels=10000000)",
    ],
)
def test_a_network_far_larger_than_the_file_is_not_built(backbone):
    with pytest.raises(ValueError, match="can fill"):
        build(model_text(backbone=backbone), {"a": torch.empty(10)})


def test_preprocessing_counts_pixels_from_0_to_255_and_knows_the_order_of_channels():
    found = mmseg_facts.preprocessing(read(config_text("FCNHead")), {})
    assert (found.mean, found.std) == ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    assert (found.rescale, found.channels, found.size, found.reduce_labels) == (1.0, "RGB", None, False)
    old = "dict(type='Normalize', mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], to_rgb=False)"
    found = mmseg_facts.preprocessing(read(f"train_pipeline = [{old}]\nmodel = dict(type='x')"), {})
    assert (found.mean, found.std, found.channels) == ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0), "BGR")
    gray = "model = dict(type='x', data_preprocessor=dict(mean=[127.5], std=[64]))"
    found = mmseg_facts.preprocessing(read(gray), {})
    assert (found.mean, found.std) == ((127.5,), (64.0,))
    found = mmseg_facts.preprocessing(read("p = [dict(reduce_zero_label=True)]\nmodel = dict(type='x')"), {})
    assert (found.reduce_labels, found.rescale, round(found.mean[0], 3)) == (True, 1.0, 123.675)


def test_what_meta_tells():
    text = "model = dict(type='EncoderDecoder')"
    assert mmseg_facts.config_text({"cfg": text}) == mmseg_facts.config_text({"config": text}) == text
    assert mmseg_facts.config_text({"cfg": "a = 1", "config": {"model": 3}}) is None
    assert mmseg_facts.class_names({"dataset_meta": {"classes": ["a", "b"]}}) == ("a", "b")
    assert mmseg_facts.class_names({"CLASSES": ("a",)}) == ("a",)
    moved = {"dataset_meta": {"label_map": {0: 0, 1: 255, 2: 1}}}
    assert "(label_map: 1 as 255, ...): masks have to be stored" in mmseg_facts.renumbered_note(moved)[0]
    assert mmseg_facts.renumbered_note({"dataset_meta": {"label_map": None}}) == ()
    assert mmseg_facts.class_names({"CLASSES": [1]}) is None
