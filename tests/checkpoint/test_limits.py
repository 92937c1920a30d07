"""Networks that a checkpoint describes are as large as what it holds, and as deep as they like."""

import json
import os
import resource

import pytest
import torch
import transformers
from torch import nn

from equalize.checkpoint.limits import limit_construction
from equalize.checkpoint.loading import load
from equalize.commands.scan import select_sites
from equalize.errors import CheckpointError

FULL = {"w": torch.empty(10, 10)}


def test_a_network_of_the_size_of_its_file_is_built():
    with limit_construction(FULL):
        model = nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10))
    assert len(model) == 2
    with torch.device("meta"):
        nn.Linear(1 << 17, 1 << 17)  # no longer bounded


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: nn.Linear(1 << 14, 1 << 12), "values"),
        (lambda: nn.ParameterList(torch.empty(1) for _ in range(1100)), "tensors"),
        (lambda: nn.Module().register_buffer("a", torch.empty(1 << 25)), "values"),
    ],
    ids=["wide", "many", "buffer"],
)
def test_a_network_far_larger_than_its_file_is_not(make, what):
    with limit_construction(FULL), pytest.raises(ValueError, match=f"far more {what}"):
        make()


def test_a_decoder_that_is_drawn_has_room_of_its_own():
    with limit_construction(FULL, draw=True):
        nn.Linear(1 << 13, 1 << 12)
    with limit_construction(None), torch.device("meta"):
        nn.Linear(1 << 20, 1 << 20)


@pytest.fixture(scope="module")
def deep_dir(tmp_path_factory):
    """A directory of transformers whose backbone has 120 layers of 8 channels."""
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[30] * 4, layer_type="basic", out_features=stages
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=8, auxiliary_channels=4, auxiliary_in_channels=8, num_labels=3
    )
    directory = tmp_path_factory.mktemp("deep")
    transformers.UperNetForSemanticSegmentation(config).save_pretrained(directory)
    return directory


@pytest.mark.slow
def test_a_network_is_not_refused_for_its_depth(deep_dir):
    assert len(load(deep_dir).model.backbone.encoder.stages[0].layers) == 30
    found = select_sites(load(deep_dir, weights=False).model, (1, 3, 32, 32))
    assert {"decode_head.bottleneck.conv", "decode_head.fpn_bottleneck.conv"} == {site.layer for site in found.sites}


def test_a_network_of_as_many_tensors_as_its_file_is_not_refused():
    room = {f"{number}": torch.empty(1) for number in range(10_000)}
    with limit_construction(room):
        assert len(nn.ParameterList(torch.empty(1) for _ in range(10_000))) == 10_000


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
    "depths": ("segformer_dir", {"depths": [10_000] * 4}),
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
