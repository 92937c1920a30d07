"""Make the table of architectures: what `equalize scan` finds in every segmentation class.

    python examples/architectures.py [--write docs/architectures.md]

Of torchvision, segmentation_models_pytorch and transformers, every class for semantic segmentation, and transformers'
universal ones that are used for it, each built small, on the meta device, without weights. It takes
half a minute of one core.
"""

import argparse
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from equalize.sites.scan import Scan, scan
from equalize.sites.sites import Refusal, Site

START, END = "<!-- architectures:start -->", "<!-- architectures:end -->"
Network = Callable[[], nn.Module]

STAGES = ["stage1", "stage2", "stage3", "stage4"]
SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 4, "out_features": STAGES}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "out_features": STAGES}
VIT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
NECK = {"neck_hidden_sizes": [4, 8, 16, 16], "fusion_hidden_size": 8}
PYRAMID = {"auxiliary_channels": 6}
DETR = {
    **{f"{side}_{of}": size for side in ("encoder", "decoder") for of, size in (("layers", 1), ("ffn_dim", 16))},
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "d_model": 64,
    "num_queries": 5,
}
QUERIES = {"hidden_dim": 32, "mask_dim": 32, "encoder_feedforward_dim": 16, "dim_feedforward": 16, "num_queries": 5}
MASKS = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, **QUERIES}


def torchvision(name: str) -> nn.Module:
    """One of torchvision's, as it is."""
    from torchvision.models import segmentation

    return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=3)  # type: ignore[no-any-return]


def smp(name: str) -> nn.Module:
    """One of smp's decoders over a small encoder; DPT wants a transformer, which timm has."""
    import segmentation_models_pytorch

    over = {"encoder_name": "tu-vit_tiny_patch16_224", "dynamic_img_size": True} if name == "DPT" else {}
    options = {"encoder_name": "resnet18", "encoder_weights": None, "classes": 3, **over}
    return getattr(segmentation_models_pytorch, name)(**options)  # type: ignore[no-any-return]


def transformers(name: str, config: str, fields: Mapping[str, object]) -> nn.Module:
    """One of transformers', from a config; a pair of a config's name and its fields stands for a config within."""
    import transformers as library

    def made(kind: str, fields: Mapping[str, object]) -> object:
        inner = {key: made(*value) if isinstance(value, tuple) else value for key, value in fields.items()}
        return getattr(library, kind)(**inner)

    return getattr(library, name)(made(config, fields))  # type: ignore[no-any-return]


TORCHVISION = (
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "deeplabv3_mobilenet_v3_large",
    "fcn_resnet50",
    "fcn_resnet101",
    "lraspp_mobilenet_v3_large",
)
SMP = (
    "Unet",
    "UnetPlusPlus",
    "MAnet",
    "Linknet",
    "FPN",
    "PSPNet",
    "PAN",
    "DeepLabV3",
    "DeepLabV3Plus",
    "UPerNet",
    "Segformer",
    "DPT",
)
TRANSFORMERS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "BeitForSemanticSegmentation": (
        "BeitConfig",
        {**VIT, **PYRAMID, "intermediate_size": 16, "out_indices": [1, 2, 3, 4]},
    ),
    "Data2VecVisionForSemanticSegmentation": (
        "Data2VecVisionConfig",
        {**VIT, **PYRAMID, "intermediate_size": 16, "out_indices": [1, 2, 3, 4]},
    ),
    "DPTForSemanticSegmentation": (
        "DPTConfig",
        {**VIT, **NECK, "intermediate_size": 16, "backbone_out_indices": [0, 1, 2, 3], "is_hybrid": False},
    ),
    "MobileNetV2ForSemanticSegmentation": ("MobileNetV2Config", {"output_stride": 16, "tf_padding": False}),
    "MobileViTForSemanticSegmentation": (
        "MobileViTConfig",
        {
            "hidden_sizes": [8, 8, 8],
            "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 16],
            "num_attention_heads": 1,
            "aspp_out_channels": 12,
            "output_stride": 16,
        },
    ),
    "MobileViTV2ForSemanticSegmentation": (
        "MobileViTV2Config",
        {"width_multiplier": 0.25, "n_attn_blocks": [1, 1, 1], "aspp_out_channels": 12, "output_stride": 16},
    ),
    "Sapiens2ForSemanticSegmentation": (
        "Sapiens2Config",
        {
            **VIT,
            "intermediate_size": 16,
            "num_key_value_attention_heads": 2,
            "num_register_tokens": 1,
            "head_config": ("Sapiens2HeadConfig", {"upsample_out_channels": [8], "conv_out_channels": [8]}),
        },
    ),
    "SegformerForSemanticSegmentation": (
        "SegformerConfig",
        {
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [8, 8, 16, 16],
            "num_attention_heads": [1, 1, 2, 2],
            "decoder_hidden_size": 12,
        },
    ),
    "Tipsv2DptForSemanticSegmentation": (
        "Tipsv2DptConfig",
        {
            **NECK,
            "backbone_config": (
                "Tipsv2VisionConfig",
                {**VIT, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False},
            ),
        },
    ),
    "UperNetForSemanticSegmentation": (
        "UperNetConfig",
        {"backbone_config": ("SwinConfig", SWIN), **PYRAMID, "hidden_size": 12, "auxiliary_in_channels": 32},
    ),
    "DetrForSegmentation": ("DetrConfig", {**DETR, "backbone_config": ("ResNetConfig", RESNET)}),
    "EomtForUniversalSegmentation": ("EomtConfig", {**VIT, "num_blocks": 1, "num_queries": 5}),
    "EomtDinov3ForUniversalSegmentation": (
        "EomtDinov3Config",
        {**VIT, "intermediate_size": 16, "num_blocks": 1, "num_queries": 5},
    ),
    "Mask2FormerForUniversalSegmentation": (
        "Mask2FormerConfig",
        {**MASKS, "backbone_config": ("SwinConfig", SWIN), "feature_size": 32, "mask_feature_size": 32},
    ),
    "MaskFormerForInstanceSegmentation": (
        "MaskFormerConfig",
        {
            "backbone_config": ("SwinConfig", SWIN),
            "decoder_config": ("DetrConfig", {**DETR, "backbone_config": ("ResNetConfig", RESNET)}),
            "fpn_feature_size": 32,
            "mask_feature_size": 16,
        },
    ),
    "OneFormerForUniversalSegmentation": (
        "OneFormerConfig",
        {
            **MASKS,
            "backbone_config": ("SwinConfig", SWIN),
            "conv_dim": 32,
            "text_encoder_width": 16,
            "text_encoder_num_layers": 1,
            "text_encoder_vocab_size": 50,
        },
    ),
    "RfDetrForInstanceSegmentation": (
        "RfDetrConfig",
        {
            "backbone_config": (
                "RfDetrDinov2Config",
                {**VIT, "num_windows": 2, "out_features": STAGES, "num_register_tokens": 0},
            ),
            "d_model": 32,
            "decoder_layers": 1,
            "decoder_ffn_dim": 16,
            "decoder_self_attention_heads": 2,
            "decoder_cross_attention_heads": 2,
            "num_queries": 5,
            "group_detr": 1,
        },
    ),
    "VideomtForUniversalSegmentation": ("VideomtConfig", {**VIT, "num_blocks": 1, "num_queries": 5}),
}


def networks() -> Iterator[tuple[str, str, Network]]:
    """Library, class and builder of every row."""
    for name in TORCHVISION:
        yield "torchvision", name, partial(torchvision, name)
    for name in SMP:
        yield "smp", name, partial(smp, name)
    for name, (config, fields) in TRANSFORMERS.items():
        yield "transformers", name, partial(transformers, name, config, fields)


def example_of(name: str) -> tuple[Tensor, ...]:
    """What the class of that name is called with; shapes only."""
    size = {"DPT": 224, "PAN": 128}.get(name, 64)
    image = torch.empty(2, 3, size, size, device="meta")
    if name.startswith("Videomt"):
        return (image[:, None],)
    if name.startswith("OneFormer"):
        return image, torch.empty(2, 77, dtype=torch.long, device="meta")  # the task, in tokens
    return (image,)


def on_meta(build: Network) -> nn.Module:
    """A network without weights."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own
        return build().eval()


def table() -> str:
    """The table, in Markdown."""
    lines = ["| library | class | fusion layers (branches of each) |", "|---|---|---|"]
    for library, name, build in networks():
        found = scan(on_meta(build), example_of(name), kinds=("resampled", "plain"))
        lines.append(f"| {library} | {name} | {_found(found)} |")
    return "\n".join(lines)


def _found(found: Scan) -> str:
    resampled = [site for site in found.sites if site.kind == "resampled"]
    plain = [site for site in found.sites if site.kind == "plain"]
    if resampled:
        return _layers(resampled)
    if plain:
        return f"none resampled; with `--all` {_layers(plain)}"
    return f"none: {_why(found.refusals)}"


def _layers(sites: Sequence[Site]) -> str:
    """Layers whose paths differ by numbers only stand together."""
    alike: dict[str, list[Site]] = {}
    for site in sites:
        alike.setdefault(re.sub(r"\d+", "#", site.layer), []).append(site)
    return ", ".join(_group(each) for each in alike.values())


def _group(sites: Sequence[Site]) -> str:
    """A path with `*` where numbers differ, and how many branches."""
    parts = zip(*(re.split(r"(\d+)", site.layer) for site in sites), strict=True)
    path = "".join(part[0] if len(set(part)) == 1 else "*" for part in parts)
    branches = sorted({len(site.branches) for site in sites})
    many = f"{len(sites)} x " if len(sites) > 1 else ""
    return f"{many}`{path}` ({'-'.join(map(str, dict.fromkeys((branches[0], branches[-1]))))})"


_REASONS = {
    "fuses by addition": "fuses by addition",
    "has no concat": "has no concat",
    "already normalized": "what is concatenated is normalized before any layer reads it",
    "is not linear": "what is concatenated is read by what is not linear",
}


def _why(refusals: Sequence[Refusal]) -> str:
    """The most telling reason."""
    return next(short for part, short in _REASONS.items() if any(part in each.reason for each in refusals))


def write(path: Path, text: str) -> None:
    """Puts the table between its marks in a Markdown file."""
    before, _, rest = path.read_text(encoding="utf-8").partition(START)
    old, _, after = rest.partition(END)
    if not old:
        raise SystemExit(f"{path} has no {START} ... {END}")
    path.write_text(f"{before}{START}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Prints the table, or writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="docs/architectures.md")
    arguments = parser.parse_args()
    text = table()
    if arguments.write:
        write(arguments.write, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
