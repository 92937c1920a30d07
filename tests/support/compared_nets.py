"""Tiny networks to compare trainings of: one fusion layer, two, none."""

import sys
import textwrap
from pathlib import Path

import torch

from equalize.checkpoint.loading import ModelName

FACTORY = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, num_classes=5):
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
            self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
            self.fuse = nn.Conv2d(16, 8, 1)
            self.norm = nn.BatchNorm2d(8)
            self.classify = nn.Conv2d(8, num_classes, 1)

        def forward(self, x):
            low = self.backbone(x)
            high = nn.functional.interpolate(0.1 * self.deep(low), scale_factor=2, mode="bilinear")
            return self.classify(self.norm(self.fuse(torch.cat([low, high], 1))).relu())

    def row(inputs, outputs):
        norms = [nn.BatchNorm2d(outputs), nn.ReLU(), nn.Conv2d(outputs, outputs, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
        return nn.Sequential(nn.Conv2d(inputs, outputs, 1), *norms)

    class Two(nn.Module):
        '''Two fusion layers, one behind the other, each with two BatchNorms behind it.'''

        def __init__(self, num_classes=5):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
            self.deep = nn.Conv2d(8, 8, 3, 2, 1)
            self.first = row(16, 6)
            self.last = row(14, 6)
            self.classify = nn.Conv2d(6, num_classes, 1)

        def forward(self, x):
            low = self.stem(x)
            high = nn.functional.interpolate(self.deep(low), scale_factor=2, mode="bilinear")
            first = nn.functional.max_pool2d(self.first(torch.cat([low, high], 1)), 2)
            high = nn.functional.interpolate(first, scale_factor=2, mode="bilinear")
            return self.classify(self.last(torch.cat([low, high], 1)))

    class Plain(nn.Module):
        def __init__(self, num_classes=5):
            super().__init__()
            self.backbone = nn.Conv2d(3, 8, 3, 2, 1)
            self.classify = nn.Conv2d(8, num_classes, 1)

        def forward(self, x):
            return self.classify(self.backbone(x).relu())
"""


def write_nets(directory: Path) -> Path:
    """Writes the factory, whole.pth, backbone.pth (nothing else of it), two.pth and plain.pth."""
    (directory / "compared_net.py").write_text(textwrap.dedent(FACTORY))
    sys.path.insert(0, str(directory))
    import compared_net

    sys.path.remove(str(directory))
    torch.manual_seed(11)
    whole = compared_net.Net().state_dict()
    torch.save(whole, directory / "whole.pth")
    torch.save({key: value for key, value in whole.items() if key.startswith("backbone")}, directory / "backbone.pth")
    torch.save(compared_net.Two().state_dict(), directory / "two.pth")
    torch.save(compared_net.Plain().state_dict(), directory / "plain.pth")
    return directory


def named(nets, file="whole.pth", factory="Net", **flags) -> ModelName:
    return ModelName(source=str(nets / file), arch=f"{nets / 'compared_net.py'}:{factory}", **flags)
