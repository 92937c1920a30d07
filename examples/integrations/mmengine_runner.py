"""mmengine's Runner and mmsegmentation: calibrate a UPerNet that was just drawn, train it, load it with `init_model`.

python examples/integrations/mmengine_runner.py OUT
"""

import os
import sys
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.apis import init_model
from mmseg.structures import SegDataSample
from scenes import CLASSES, SIZE, Scenes, batches, mean_iou

import equalize
from equalize.integrations import EqualizeHook

os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # mmengine 0.10.7 reads its own checkpoints like that alone
NORM = "norm_cfg=dict(type='BN')"
CONFIG = f"""
default_scope = 'mmseg'
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', size={SIZE}),
    backbone=dict(type='ResNetV1c', depth=18, out_indices=(0, 1, 2, 3), {NORM}),
    decode_head=dict(
        type='UPerHead', in_channels=[64, 128, 256, 512], in_index=[0, 1, 2, 3], pool_scales=(1, 2, 3, 6), channels=32,
        num_classes={len(CLASSES)}, align_corners=False, {NORM}, loss_decode=dict(type='CrossEntropyLoss')),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
"""


def pack(pairs: list) -> dict:
    """A batch as mmsegmentation's networks take it."""
    samples = [SegDataSample(gt_sem_seg=PixelData(data=labels[None])) for _, labels in pairs]
    return {"inputs": [image for image, _ in pairs], "data_samples": samples}


def main(out: Path) -> None:
    """Writes OUT/equalized/model.pth with its plan, and OUT/run/iter_N.pth as the runner does."""
    out.mkdir(parents=True, exist_ok=True)
    config = Config.fromstring(CONFIG, ".py")
    drawn = init_model(config, device="cpu")
    torch.save({"meta": {"cfg": config.pretty_text}, "state_dict": drawn.state_dict()}, out / "drawn.pth")
    checkpoint = equalize.load(out / "drawn.pth")  # what `equalize calibrate drawn.pth --data IMAGES -o OUT` does:
    plan = equalize.calibrate(checkpoint.model, batches(), strategy="rescale")
    checkpoint.save(out / "equalized", plan)

    loader = {"batch_size": 6, "num_workers": 0, "dataset": Scenes("train"), "collate_fn": pack}
    runner = Runner(
        model=config.model,
        work_dir=str(out / "run"),
        load_from=str(out / "equalized" / "model.pth"),  # the hook finds equalize.json beside it
        train_dataloader={**loader, "sampler": {"type": "InfiniteSampler", "shuffle": True}},
        train_cfg={"by_epoch": False, "max_iters": 24},
        optim_wrapper={"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 1e-3}},
        default_hooks={"checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": 12}},
        custom_hooks=[EqualizeHook()],
        default_scope="mmseg",
        cfg=config,
    )
    runner.train()
    trained = init_model(config, str(out / "run" / "iter_24.pth"), device="cpu")  # plain weights
    print(f"after: mIoU {mean_iou(trained):.1f}, {out / 'run' / 'iter_24.pth'}")


if __name__ == "__main__":
    torch.manual_seed(0)
    main(Path(sys.argv[1]))
