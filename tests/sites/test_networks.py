"""What `scan` finds in networks of three libraries, against lists written by hand from the libraries' sources.

Networks live on the meta device: a scan needs shapes only. A branch is written (channels, resampling, factor), in the
order of the concat; one factor stands for both spatial axes.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import architectures
import pytest
import torch
from torch import nn

from equalize.sites.scan import Scan, scan
from equalize.sites.sites import Site
from tests.support.tracers import exported_ops, record, record_fake, said_by

BranchRow = tuple[int, str | None, float]


@dataclass(frozen=True, kw_only=True)
class Network:
    build: Callable[[], nn.Module]
    sites: Sequence[tuple[str, Sequence[BranchRow]]]
    size: int = 64
    refused: Sequence[str] = ()


def torchvision_network(name: str) -> nn.Module:
    from torchvision.models import segmentation

    return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=3)


def smp_network(name: str, encoder: str = "resnet18", **options) -> nn.Module:
    import segmentation_models_pytorch as smp

    return getattr(smp, name)(encoder, encoder_weights=None, classes=3, **options)


def architecture(name: str) -> nn.Module:
    """As the table of architectures in the documentation has it."""
    return architectures.transformers(name, *architectures.TRANSFORMERS[name])


def upernet_convnext() -> nn.Module:
    convnext = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 32, 64], "out_features": architectures.STAGES}
    kind, fields = architectures.TRANSFORMERS["UperNetForSemanticSegmentation"]
    changes = {"backbone_config": ("ConvNextConfig", convnext), "pool_scales": [1, 2], "auxiliary_concat_input": True}
    return architectures.transformers("UperNetForSemanticSegmentation", kind, {**fields, **changes})


def classifier(name: str) -> nn.Module:
    from torchvision import models

    if name == "densenet":
        return models.DenseNet(block_config=(2, 3), num_init_features=8, growth_rate=4)
    return getattr(models, name)(weights=None)


UNET_PLUS_PLUS = "decoder.blocks.x_{}.conv1.0"

NETWORKS = {
    # torchvision.models.segmentation: deeplabv3.py; backbones end at stride 8 and 16
    "torchvision deeplabv3_resnet50": Network(
        build=lambda: torchvision_network("deeplabv3_resnet50"),
        sites=[("classifier.0.project.0", [*[(256, None, 1)] * 4, (256, "bilinear", 8)])],
    ),
    "torchvision fcn_resnet50": Network(
        build=lambda: torchvision_network("fcn_resnet50"), sites=[], refused=["model: has no concat of features"]
    ),
    "torchvision lraspp": Network(
        build=lambda: torchvision_network("lraspp_mobilenet_v3_large"),
        sites=[],
        refused=["classifier: fuses by addition: no fusion weights stand behind the branches"],
    ),
    # segmentation_models_pytorch/decoders
    "smp Unet": Network(
        build=lambda: smp_network("Unet"),
        sites=[
            ("decoder.blocks.0.conv1.0", [(512, "nearest", 2), (256, None, 1)]),
            ("decoder.blocks.1.conv1.0", [(256, "nearest", 2), (128, None, 1)]),
            ("decoder.blocks.2.conv1.0", [(128, "nearest", 2), (64, None, 1)]),
            ("decoder.blocks.3.conv1.0", [(64, "nearest", 2), (64, None, 1)]),
        ],
    ),
    "smp Unet, bicubic": Network(
        build=lambda: smp_network("Unet", encoder_depth=3, decoder_channels=(8, 6, 4), decoder_interpolation="bicubic"),
        sites=[
            ("decoder.blocks.0.conv1.0", [(128, "bicubic", 2), (64, None, 1)]),
            ("decoder.blocks.1.conv1.0", [(8, "bicubic", 2), (64, None, 1)]),
        ],
    ),
    "smp Unet over timm's ResNet": Network(
        build=lambda: smp_network("Unet", "tu-resnet10t", encoder_depth=3, decoder_channels=(8, 6, 4)),
        sites=[
            ("decoder.blocks.0.conv1.0", [(128, "nearest", 2), (64, None, 1)]),
            ("decoder.blocks.1.conv1.0", [(8, "nearest", 2), (64, None, 1)]),
        ],
    ),
    "smp UnetPlusPlus": Network(
        build=lambda: smp_network("UnetPlusPlus"),
        sites=[  # up(left neighbor), then every node below at the same level, then the encoder's
            (UNET_PLUS_PLUS.format("0_0"), [(512, "nearest", 2), (256, None, 1)]),
            (UNET_PLUS_PLUS.format("1_1"), [(256, "nearest", 2), (128, None, 1)]),
            (UNET_PLUS_PLUS.format("2_2"), [(128, "nearest", 2), (64, None, 1)]),
            (UNET_PLUS_PLUS.format("3_3"), [(64, "nearest", 2), (64, None, 1)]),
            (UNET_PLUS_PLUS.format("0_1"), [(256, "nearest", 2), (128, None, 1), (128, None, 1)]),
            (UNET_PLUS_PLUS.format("1_2"), [(128, "nearest", 2), *[(64, None, 1)] * 2]),
            (UNET_PLUS_PLUS.format("2_3"), [(64, "nearest", 2), *[(64, None, 1)] * 2]),
            (UNET_PLUS_PLUS.format("0_2"), [(128, "nearest", 2), *[(64, None, 1)] * 3]),
            (UNET_PLUS_PLUS.format("1_3"), [(64, "nearest", 2), *[(64, None, 1)] * 3]),
            (UNET_PLUS_PLUS.format("0_3"), [(64, "nearest", 2), *[(64, None, 1)] * 4]),
        ],
    ),
    "smp MAnet": Network(  # the upsampled branch is multiplied by an attention before the concat
        build=lambda: smp_network("MAnet"),
        sites=[
            ("decoder.blocks.0.conv1.0", [(256, "nearest", 2), (256, None, 1)]),
            ("decoder.blocks.1.conv1.0", [(128, "nearest", 2), (128, None, 1)]),
            ("decoder.blocks.2.conv1.0", [(64, "nearest", 2), (64, None, 1)]),
            ("decoder.blocks.3.conv1.0", [(64, "nearest", 2), (64, None, 1)]),
        ],
    ),
    "smp PSPNet": Network(  # stride 8: 64 -> 8 x 8, pooled to 1, 2, 3 and 6
        build=lambda: smp_network("PSPNet"),
        sites=[
            (
                "decoder.conv.0",
                [
                    (32, "bilinear", 8),
                    (32, "bilinear", 4),
                    (32, "bilinear", 8 / 3),
                    (32, "bilinear", 8 / 6),
                    (128, None, 1),
                ],
            )
        ],
    ),
    "smp DeepLabV3": Network(
        build=lambda: smp_network("DeepLabV3"),
        sites=[("decoder.aspp.project.0", [*[(256, None, 1)] * 4, (256, "bilinear", 8)])],
    ),
    "smp DeepLabV3Plus": Network(
        build=lambda: smp_network("DeepLabV3Plus"),
        sites=[
            ("decoder.aspp.0.project.0", [*[(256, None, 1)] * 4, (256, "bilinear", 4)]),
            ("decoder.block2.0.0", [(256, "bilinear", 4), (48, None, 1)]),
        ],
    ),
    "smp UPerNet": Network(  # 192 -> 6 x 6 at stride 32, pooled to 1, 2, 3 and 6
        build=lambda: smp_network("UPerNet"),
        size=192,
        sites=[
            (
                "decoder.psp.out_conv.0",
                [
                    (512, None, 1),
                    (256, "bilinear", 6),
                    (256, "bilinear", 3),
                    (256, "bilinear", 2),
                    (256, "bilinear", 1),
                ],
            ),
            ("decoder.fusion_block.0", [(256, "bilinear", factor) for factor in (1, 2, 4, 8)]),
        ],
    ),
    "smp Segformer": Network(
        build=lambda: smp_network("Segformer"),
        sites=[("decoder.fuse_stage.0", [(256, "bilinear", factor) for factor in (8, 4, 2, 1, 0.5)])],
    ),
    "smp FPN that merges by cat": Network(  # straight into the head; the last of each branch's upsamplings is by two
        build=lambda: smp_network("FPN", decoder_merge_policy="cat"),
        sites=[("segmentation_head.0", [*[(128, "bilinear", 2)] * 3, (128, None, 1)])],
    ),
    "smp FPN": Network(
        build=lambda: smp_network("FPN"),
        sites=[],
        refused=[
            f"decoder.{level}: fuses by addition: no fusion weights stand behind the branches"
            for level in ("p4", "p3", "p2")
        ],
    ),
    "smp Linknet": Network(
        build=lambda: smp_network("Linknet"),
        sites=[],
        refused=[
            f"decoder.blocks.{block}: fuses by addition: no fusion weights stand behind the branches"
            for block in range(4)
        ],
    ),
    # transformers
    "transformers SegFormer": Network(
        build=lambda: architecture("SegformerForSemanticSegmentation"),
        sites=[("decode_head.linear_fuse", [(12, "bilinear", factor) for factor in (8, 4, 2, 1)])],
    ),
    "transformers UPerNet over Swin": Network(
        build=lambda: architecture("UperNetForSemanticSegmentation"),
        size=128,
        sites=[
            ("decode_head.bottleneck.conv", [(64, None, 1), *[(12, "bilinear", 4 / size) for size in (1, 2, 3, 6)]]),
            (
                "decode_head.fpn_bottleneck.conv",
                [(12, None, 1), (12, "bilinear", 2), (12, "bilinear", 4), (12, "bilinear", 8)],
            ),
        ],
    ),
    "transformers UPerNet over ConvNeXt": Network(
        build=upernet_convnext,
        size=128,
        sites=[
            ("decode_head.bottleneck.conv", [(64, None, 1), (12, "bilinear", 4), (12, "bilinear", 2)]),
            (
                "decode_head.fpn_bottleneck.conv",
                [(12, None, 1), (12, "bilinear", 2), (12, "bilinear", 4), (12, "bilinear", 8)],
            ),
        ],
    ),
    "transformers BEiT": Network(  # 4 x 4 patches; the neck makes 16, 8, 4 and 2 of it, the last by pooling
        build=lambda: architecture("BeitForSemanticSegmentation"),
        sites=[
            (
                "decode_head.psp_bottleneck.convolution",
                [(16, None, 1), *[(16, "bilinear", 2 / size) for size in (1, 2, 3, 6)]],
            ),
            (
                "decode_head.fpn_bottleneck.convolution",
                [(16, None, 1), (16, "bilinear", 2), (16, "bilinear", 4), (16, "bilinear", 8)],
            ),
        ],
    ),
    "transformers MobileViT": Network(
        build=lambda: architecture("MobileViTForSemanticSegmentation"),
        sites=[("segmentation_head.aspp.project.convolution", [*[(12, None, 1)] * 4, (12, "bilinear", 4)])],
    ),
    "transformers MobileNetV2": Network(
        build=lambda: architecture("MobileNetV2ForSemanticSegmentation"),
        sites=[("segmentation_head.conv_projection.convolution", [(256, "bilinear", 4), (256, None, 1)])],
    ),
    "transformers DPT": Network(build=lambda: architecture("DPTForSemanticSegmentation"), sites=[]),  # plain: see below
    **{
        f"torchvision {name}": Network(build=functools.partial(classifier, name), sites=[], size=96)
        for name in ("densenet", "squeezenet1_1")
    },
}


def built(name: str) -> tuple[nn.Module, torch.Tensor]:
    network = NETWORKS[name]
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own, when building
        return network.build().eval(), torch.empty(1, 3, network.size, network.size, device="meta")


@functools.cache
def scanned(name: str) -> Scan:
    return scan(*built(name), kinds=("resampled", "plain"))


def sites_of(name: str, kind: str) -> list[Site]:
    return [site for site in scanned(name).sites if site.kind == kind]


def rows(sites: Sequence[Site]) -> list[tuple[str, list[BranchRow]]]:
    return [
        (site.layer, [(each.stop - each.start, each.resampling, each.factor[0]) for each in site.branches])
        for site in sites
    ]


@pytest.mark.parametrize("name", NETWORKS)
def test_fusion_layers(name):
    network, found, sites = NETWORKS[name], scanned(name), sites_of(name, "resampled")
    assert rows(sites) == list(network.sites)
    for site in sites:
        starts = [branch.start for branch in site.branches]
        stops = [branch.stop for branch in site.branches]
        assert starts == [0, *stops[:-1]]
        assert all(len(set(branch.factor)) == 1 for branch in site.branches)
    reasons = [f"{refusal.at}: {refusal.reason}" for refusal in found.refusals]
    for reason in network.refused:
        assert reason in reasons
    assert found.sites or found.refusals


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if at % 6 else ()) for at, name in enumerate(NETWORKS)]
)
def test_a_recording_says_the_same_as_export(name):
    """Every field of every site, and the refusals: from the same operators."""
    model, example = built(name)
    found, recorded = scanned(name), said_by(record_fake, model, (example,))
    assert (found.tracer, found.ran) == ("recorder", False)
    assert (found.sites, found.refusals, found.norms) == (recorded[0], recorded[2], recorded[3])
    assert recorded == said_by(exported_ops, model, (example,))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_run_says_the_same_as_a_recording_on_fake_tensors(name):
    model, example = built(name)
    assert said_by(record, model, (example,)) == said_by(record_fake, model, (example,))


def test_facts_of_a_pointwise_layer_before_batch_norm():
    (site,) = sites_of("torchvision deeplabv3_resnet50", "resampled")
    assert (site.weight, site.bias, site.norm) == ("classifier.0.project.0.weight", None, "classifier.0.project.1")
    assert (site.op, site.kernel, site.axis, site.groups) == ("conv2d", (1, 1), 1, 1)
    assert (site.kind, site.exact_border, site.shift) == ("resampled", True, None)
    assert [branch.source for branch in site.branches] == [
        "classifier.0.convs.0.0",
        "classifier.0.convs.1.0",
        "classifier.0.convs.2.0",
        "classifier.0.convs.3.0",
        "classifier.0.convs.4.1",
    ]
    assert site.branches[4].producers == ("classifier.0.convs.4.2.weight", "classifier.0.convs.4.2.bias")


def test_facts_of_a_depthwise_layer():
    aspp, fusion = sites_of("smp DeepLabV3Plus", "resampled")
    assert (fusion.kernel, fusion.axis, fusion.groups, fusion.exact_border) == ((3, 3), 0, 304, True)
    assert (fusion.bias, fusion.norm, fusion.shift) == (None, None, None)  # a pointwise convolution is behind
    assert fusion.upstream == (aspp.layer,)


def test_unet_skips_are_fixed_where_the_encoder_adds_them_up():
    sites = sites_of("smp Unet", "resampled")
    for site in sites:
        assert site.branches[1].fixed is not None
    # the upsampled ones come from BatchNorms: of the encoder's last block through an addition, then of the decoder
    assert sites[0].branches[0].fixed is not None
    assert sites[1].branches[0].producers == ("decoder.blocks.0.conv2.1.weight", "decoder.blocks.0.conv2.1.bias")


def test_segformers_linear_projections_can_move():
    (site,) = sites_of("transformers SegFormer", "resampled")
    for level, branch in zip((3, 2, 1, 0), site.branches, strict=True):
        name = f"decode_head.linear_projections.{level}.proj"
        assert branch.producers == (f"{name}.weight", f"{name}.bias")
        assert branch.source == name


def test_upernets_last_fusion_is_behind_its_pyramid():
    pyramid, last = sites_of("transformers UPerNet over Swin", "resampled")
    assert last.upstream == (pyramid.layer,)
    assert pyramid.upstream == ()
    assert "decode_head.bottleneck.batch_norm.running_mean" in pyramid.norms
    assert "decode_head.fpn_bottleneck.batch_norm.running_mean" in pyramid.norms
    assert last.norms == ("decode_head.fpn_bottleneck.batch_norm.running_mean",)
    assert "decode_head.lateral_convs.0.batch_norm.running_mean" not in pyramid.norms


def test_patch_merging_is_refused_because_a_norm_follows():
    refusals = scanned("transformers UPerNet over Swin").refusals
    merging = [refusal for refusal in refusals if "downsample" in refusal.at]
    assert len(merging) == 3
    assert all("already normalized by layer_norm" in refusal.reason for refusal in merging)


def test_auxiliary_concat_of_input_and_output_is_plain():
    sites = sites_of("transformers UPerNet over ConvNeXt", "plain")
    assert rows(sites) == [("auxiliary_head.conv_cat.conv", [(32, None, 1), (6, None, 1)])]


def test_mobilevits_encoder_fuses_without_resampling():
    stages = [("2", "1", 8), ("3", "1", 8), ("4", "1", 8)]
    expected = [
        (f"mobilevit.encoder.layer.{stage}.fusion.convolution", [(width, None, 1), (width, None, 1)])
        for stage, _, width in stages
    ]
    assert rows(sites_of("transformers MobileViT", "plain")) == expected


def test_dpt_projects_each_token_beside_the_readout():
    sites = sites_of("transformers DPT", "plain")
    assert [site.layer for site in sites] == [f"neck.reassemble_stage.readout_projects.{level}.0" for level in range(4)]
    for site in sites:
        assert (site.op, site.kernel, site.axis) == ("linear", (), 1)
        assert [(branch.start, branch.stop) for branch in site.branches] == [(0, 16), (16, 32)]


def test_densenets_concats_are_normalized_before_every_layer():
    found = scanned("torchvision densenet")
    assert found.sites == ()
    assert len(found.refusals) == 1 + 2 + 2  # all dense layers but each first read a concat, and what follows a block
    assert {refusal.reason.split(" batch_norm")[0] for refusal in found.refusals} == {"already normalized by"}


def test_squeezenets_fires_feed_each_other():
    """features: conv relu pool fire3 fire4 fire5 pool fire7..; each fire concatenates two halves of its output."""
    sites = sites_of("torchvision squeezenet1_1", "plain")
    half = {3: 64, 4: 64, 6: 128, 7: 128, 9: 192, 10: 192, 11: 256, 12: 256}
    readers = {
        "features.4.squeeze": 3,
        "features.6.squeeze": 4,  # behind a max pool
        "features.7.squeeze": 6,
        "features.9.squeeze": 7,  # behind a max pool
        "features.10.squeeze": 9,
        "features.11.squeeze": 10,
        "features.12.squeeze": 11,
        "classifier.1": 12,
    }
    assert rows(sites) == [(layer, [(half[fire], None, 1)] * 2) for layer, fire in readers.items()]
    assert {site.layer: site.shift for site in sites} == {
        layer: None if layer in {"features.6.squeeze", "features.9.squeeze"} else "bias" for layer in readers
    }
