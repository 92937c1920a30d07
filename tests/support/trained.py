"""A tiny network whose BatchNorms have the statistics of inputs that were prepared in one way. No tests."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from equalize.checkpoint.families.custom.family import load_factory
from equalize.checkpoint.loading import ModelName

FACTORY = """
import torch
from torch import nn
from torch.nn import functional as F


def block(inputs, outputs, stride=1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Net(nn.Module):
    def __init__(self, channels=3, classes=3, depth=1):
        super().__init__()
        self.stem = block(channels, 6)
        self.down = nn.Sequential(*(block(6, 6, 2) for _ in range(depth)))
        self.fuse = block(12, 6)
        self.classifier = nn.Conv2d(6, classes, 1)
        self.factor = 2**depth

    def forward(self, x):
        high = self.stem(x)
        low = F.interpolate(self.down(high), scale_factor=self.factor, mode="bilinear")
        return self.classifier(self.fuse(torch.cat([high, low], 1)))  # fails unless the factor divides both sides
"""


def trained_net(folder: Path, pictures: Path, prepare, **arguments) -> ModelName:
    """A state dict and its code, after BatchNorms averaged over the pictures (N, C, H, W) 0..255 as `prepare`d."""
    code = folder / "net.py"
    code.write_text(FACTORY)
    torch.manual_seed(3)
    model = load_factory(f"{code}:Net")(**arguments)
    x = prepare(_stacked(pictures))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # a plain average
    with torch.no_grad():
        for _ in range(4):
            model.train()(x)
    torch.save(model.state_dict(), folder / "net.pt")
    return ModelName(source=str(folder / "net.pt"), arch=f"{code}:Net", arch_args=arguments)


def _stacked(pictures: Path) -> torch.Tensor:
    """(N, C, H, W); empty if there are none."""
    pixels = [np.asarray(Image.open(path)) for path in sorted(pictures.rglob("*.png")) if "masks" not in path.parts]
    return torch.stack([torch.tensor(np.atleast_3d(each)).float().movedim(-1, 0) for each in pixels or [np.zeros(())]])
