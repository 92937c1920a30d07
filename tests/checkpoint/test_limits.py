"""Networks that a checkpoint describes are as large as what it holds, and no real one is refused."""

import json
import os
import resource

import pytest
import torch
import transformers
from torch import nn

from equalize.checkpoint import load
from equalize.checkpoint.limits import bounded, check_counts
from equalize.errors import CheckpointError

FULL = {"w": torch.empty(10, 10)}


def test_a_network_of_the_size_of_its_file_is_built():
    with bounded(FULL):
        model = nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10))
    assert len(model) == 2
    with torch.device("meta"):
        nn.Linear(1 << 17, 1 << 17)  # no longer bounded


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: nn.Linear(1 << 14, 1 << 12), "values"),
        (lambda: nn.ParameterList(torch.empty(1) for _ in range(1100)), "tensors"),
        (lambda: nn.Sequential(*(nn.Identity() for _ in range(17_000))), "modules"),
        (lambda: nn.Module().register_buffer("a", torch.empty(1 << 25)), "values"),
    ],
    ids=["wide", "many", "empty", "buffer"],
)
def test_a_network_far_larger_than_its_file_is_not(make, what):
    with bounded(FULL), pytest.raises(ValueError, match=f"far more {what}"):
        make()


def test_a_decoder_that_is_drawn_has_room_of_its_own():
    with bounded(FULL, draw=True):
        nn.Linear(1 << 13, 1 << 12)
    with bounded(None), torch.device("meta"):
        nn.Linear(1 << 20, 1 << 20)


def resnet_152() -> transformers.PreTrainedConfig:
    backbone = transformers.ResNetConfig(depths=[3, 8, 36, 3], out_features=["stage1", "stage2", "stage3", "stage4"])
    return transformers.MaskFormerConfig(backbone_config=backbone)


def swin_large(kind: str) -> transformers.PreTrainedConfig:
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = transformers.SwinConfig(embed_dim=192, depths=[2, 2, 18, 2], window_size=12, out_features=stages)
    return getattr(transformers, kind)(backbone_config=backbone)


LARGE = {
    "segformer-b5": lambda: transformers.SegformerConfig(depths=[3, 6, 40, 3]),
    "maskformer-resnet152": resnet_152,
    "mask2former-swin-l": lambda: swin_large("Mask2FormerConfig"),
    "oneformer-swin-l": lambda: swin_large("OneFormerConfig"),
    "upernet-swin-l": lambda: swin_large("UperNetConfig"),
    "beit-l": lambda: transformers.BeitConfig(num_hidden_layers=24, num_labels=21_841),
    "dpt-g": lambda: transformers.DPTConfig(num_hidden_layers=40),
    "eomt-g": lambda: transformers.EomtConfig(num_hidden_layers=40),
    "convnext-xxl": lambda: transformers.ConvNextConfig(depths=[3, 4, 30, 3]),
    "mobilenet": lambda: transformers.MobileNetV2Config(),
}


@pytest.mark.parametrize("name", LARGE)
def test_the_largest_networks_that_there_are_pass(name):
    check_counts(name, json.loads(LARGE[name]().to_json_string(use_diff=False)))


@pytest.mark.parametrize(
    "config",
    [
        {"depths": [1000]},
        {"num_hidden_layers": 10**30},
        {"encoder": [{"n_blocks": 60}, {"n_blocks": 60}]},
        {"id": [0] * 1001},
        {"num_labels": 10**9},
        {"pool_scales": [1, 2, 1000]},
        {"backbone": {"window_size": 10_000}},
    ],
    ids=str,
)
def test_numbers_that_no_network_has_are_refused(config):
    with pytest.raises(CheckpointError, match="at most"):
        check_counts("config.json", config)


def edited(source, target, **changes):
    target.mkdir()
    for path in source.iterdir():
        if path.name != "config.json":
            os.link(path, target / path.name)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


WIDE = 1_000_000
GIANTS = {
    "hidden_sizes": ("segformer_dir", {"hidden_sizes": [WIDE] * 4}),
    "decoder_hidden_size": ("segformer_dir", {"decoder_hidden_size": WIDE}),
    "mlp_ratios": ("segformer_dir", {"mlp_ratios": [WIDE] * 4}),
    "num_channels": ("segformer_dir", {"num_channels": WIDE}),
    "hidden_size": ("upernet_dir", {"hidden_size": WIDE}),
    "auxiliary_num_convs": ("upernet_dir", {"auxiliary_num_convs": WIDE}),
    "decoder_channels": ("smp_resnet_dir", {"decoder_channels": [WIDE] * 5}),
    "in_channels": ("smp_resnet_dir", {"in_channels": WIDE}),
    "classes": ("smp_resnet_dir", {"classes": 10 * WIDE}),
}


@pytest.mark.parametrize("draw", [False, True])
@pytest.mark.parametrize("name", GIANTS)
def test_a_giant_config_beside_small_weights_takes_no_memory(request, tmp_path, name, draw):
    fixture, changes = GIANTS[name]
    source = edited(request.getfixturevalue(fixture), tmp_path / "in", **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError):
        load(source, init_missing=draw)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "kernels-community/flash-attn"},
        {"_attn_implementation": "flash_attention_2"},
        {"encoder": {"experts_implementation": "somebody/experts"}},
        {"quantization_config": {"quant_method": "mxfp4"}},
    ],
    ids=str,
)
def test_configs_that_ask_for_kernels_are_refused(segformer_dir, tmp_path, changes):
    """transformers would fetch such code from the Hub and run it, if its package `kernels` is there."""
    source = edited(segformer_dir, tmp_path / "in", **changes)
    for weights in (True, False):
        with pytest.raises(CheckpointError, match=r"code from the Hub|quantized"):
            load(source, weights=weights)
