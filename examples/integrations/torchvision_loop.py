"""A loop of one's own, as torchvision's references/segmentation/train.py: SGD, polynomial rate, an average of weights.

python examples/integrations/torchvision_loop.py OUT [--resume]
"""

import json
import sys
from pathlib import Path

import torch
from scenes import CLASSES, Scenes, batches, mean_iou
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

import equalize

EPOCHS = 6


def network() -> nn.Module:
    """DeepLabV3, drawn."""
    model = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=len(CLASSES))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.3  # there are few steps
    return model


def main(out: Path, resume: bool) -> None:
    """Writes OUT/checkpoint.pth after each epoch and goes on from it; OUT/plan.json is what was measured."""
    out.mkdir(parents=True, exist_ok=True)
    model = network()
    if resume:
        plan = equalize.Plan.read(out / "plan.json")
    else:
        plan = equalize.calibrate(model, batches(), strategy="rescale")
        (out / "plan.json").write_text(json.dumps(plan.to_json()))
    equalize.attach(plan, model)  # before copies are made; the state dicts below hold plain weights
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    loader = DataLoader(Scenes("train"), batch_size=6, shuffle=True)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, EPOCHS * len(loader), power=0.9)
    start = 0
    if resume:
        state = torch.load(out / "checkpoint.pth")
        model.load_state_dict(state["model"])
        average.load_state_dict(state["model_ema"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["lr_scheduler"])
        start = state["epoch"] + 1
    for epoch in range(start, EPOCHS):
        model.train()
        for images, labels in loader:
            loss = nn.functional.cross_entropy(model(images)["out"], labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
        print(f"epoch {epoch}: loss {loss:.3f}, mIoU {mean_iou(model, lambda output: output['out']):.1f}")
        state = {
            "model": model.state_dict(),
            "model_ema": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": schedule.state_dict(),
            "epoch": epoch,
        }
        torch.save(state, out / "checkpoint.pth")
    equalize.fold(model)
    plain = network()
    plain.load_state_dict(torch.load(out / "checkpoint.pth")["model"])  # plain weights
    print(f"after: mIoU {mean_iou(plain, lambda output: output['out']):.1f}, {out / 'checkpoint.pth'}")


if __name__ == "__main__":
    torch.manual_seed(0)
    main(Path(sys.argv[1]), "--resume" in sys.argv)
