"""Tiny networks of mmsegmentation, one a head of the paper, as its own training would have saved them. No tests."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

CLASSES = ("sky", "road", "tree")
NORM = "norm_cfg=dict(type='SyncBN', requires_grad=True)"
LOSS = "loss_decode=dict(type='CrossEntropyLoss', loss_weight={})"
HEAD = f"channels=4, num_classes=3, dropout_ratio=0.1, align_corners=False, {NORM}, {LOSS.format(1.0)}"
RESNET = (
    "dict(type='ResNetV1c', depth=18, num_stages=2, out_indices=(0, 1), strides=(1, 2), dilations=(1, 1), "
    f"base_channels=4, stem_channels=4, {NORM}, init_cfg=dict(type='Pretrained', checkpoint='https://host.invalid/x'))"
)
SWIN = (
    "dict(type='SwinTransformer', pretrain_img_size=64, embed_dims=4, window_size=4, depths=(1, 1), num_heads=(1, 1), "
    "strides=(4, 2), out_indices=(0, 1), mlp_ratio=2, norm_cfg=dict(type='LN', requires_grad=True))"
)
MSCAN = (
    "dict(type='MSCAN', embed_dims=[4, 8], depths=[1, 1], num_stages=2, mlp_ratios=[2, 2], "
    "drop_rate=0.0, norm_cfg=dict(type='BN', requires_grad=True))"
)
BACKBONES = {
    "ResNetV1c": RESNET,
    "SwinTransformer": SWIN,
    "MSCAN": MSCAN,
    "PIDNet": f"dict(type='PIDNet', channels=4, ppm_channels=4, num_stem_blocks=2, num_branch_blocks=2, {NORM})",
    "DDRNet": f"dict(type='DDRNet', channels=4, ppm_channels=4, {NORM})",
}
HEADS = {
    "UPerHead": f"dict(type='UPerHead', in_channels=[4, 8], in_index=[0, 1], pool_scales=(1, 2, 3, 6), {HEAD})",
    "PSPHead": f"dict(type='PSPHead', in_channels=8, in_index=1, pool_scales=(1, 2, 3, 6), {HEAD})",
    "ASPPHead": f"dict(type='ASPPHead', in_channels=8, in_index=1, dilations=(1, 6, 12), {HEAD})",
    "DepthwiseSeparableASPPHead": "dict(type='DepthwiseSeparableASPPHead', in_channels=8, in_index=1, "
    f"dilations=(1, 6, 12), c1_in_channels=4, c1_channels=2, {HEAD})",
    "FCNHead": f"dict(type='FCNHead', in_channels=8, in_index=1, num_convs=2, concat_input=True, {HEAD})",
}
HEADS["OCRHead"] = (  # a cascade: its first head's logits are the second's input
    f"[dict(type='FCNHead', in_channels=4, in_index=0, num_convs=1, concat_input=False, {HEAD}), "
    f"dict(type='OCRHead', in_channels=8, in_index=1, ocr_channels=4, {HEAD})]"
)
HEADS["PIDHead"] = f"dict(type='PIDHead', in_channels=16, {HEAD})"
HEADS["DDRHead"] = f"dict(type='DDRHead', in_channels=16, {HEAD})"
AUXILIARY = (
    f"dict(type='FCNHead', in_channels=4, in_index=0, channels=4, num_convs=1, concat_input=False, num_classes=3, "
    f"dropout_ratio=0.1, align_corners=False, {NORM}, {LOSS.format(0.4)})"
)


def config_text(head: str, backbone: str = "ResNetV1c") -> str:
    """A config as mmengine dumps it into a checkpoint."""
    cascade = HEADS[head].startswith("[")
    segmentor = "'CascadeEncoderDecoder', num_stages=2" if cascade else "'EncoderDecoder'"
    return f"""
data_preprocessor = dict(
    type='SegDataPreProcessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True,
    pad_val=0, seg_pad_val=255, size=(64, 64))
default_scope = 'mmseg'
model = dict(
    type={segmentor},
    data_preprocessor=dict(
        type='SegDataPreProcessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True,
        pad_val=0, seg_pad_val=255, size=(64, 64)),
    pretrained='open-mmlab://resnet18_v1c',
    backbone={BACKBONES[backbone]},
    decode_head={HEADS[head]},
    auxiliary_head={AUXILIARY},
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
train_pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=False)]
"""


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """mmsegmentation prints what it loads, and warns of its own defaults and of what mmcv-lite lacks."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        yield


def stock(config: Path, checkpoint: Path | None = None) -> torch.nn.Module:
    """What mmsegmentation itself makes of a config and a checkpoint; nothing of ours."""
    with silent():
        from mmseg.apis import init_model

        return init_model(str(config), checkpoint and str(checkpoint), device="cpu")


def saved(folder: Path, head: str, backbone: str = "ResNetV1c", changes: dict[str, str] | None = None) -> Path:
    """A checkpoint of a network that has seen data, as mmengine's runner saves it, its config beside it."""
    text = config_text(head, backbone)
    for before, after in (changes or {}).items():
        assert before in text
        text = text.replace(before, after)
    path = folder / f"{head}.pth"
    path.with_suffix(".py").write_text(text)
    torch.manual_seed(3)
    model = stock(path.with_suffix(".py"))
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.num_batches_tracked += 1
            module.running_mean.uniform_(-0.1, 0.1)
    meta = {
        "cfg": text,
        "seed": 3,
        "epoch": 1,
        "iter": 2,
        "mmengine_version": "0.10.7",
        "dataset_meta": {"classes": CLASSES, "palette": [[1, 2, 3], [4, 5, 6], [7, 8, 9]], "reduce_zero_label": False},
    }
    torch.save({"meta": meta, "state_dict": model.state_dict()}, path)
    return path
