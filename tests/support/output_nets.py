"""The ways in which published networks return their outputs, at a small size; written from their descriptions."""

import textwrap
from pathlib import Path

import torch

CODE = textwrap.dedent("""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Base(nn.Module):
        '''An encoder of two levels, one resampled fusion layer, a main and an auxiliary classifier.'''

        def __init__(self, num_classes=5):
            super().__init__()
            self.low = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
            self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
            self.fuse = nn.Conv2d(16, 8, 1)
            self.main = nn.Conv2d(8, num_classes, 1)
            self.auxiliary = nn.Conv2d(8, num_classes, 1)
            self.boundary = nn.Conv2d(8, 1, 1)

        def run(self, x):
            low = self.low(x)
            deep = self.deep(low)
            fused = self.fuse(torch.cat([low, F.interpolate(deep, size=low.shape[2:], mode="bilinear")], 1))
            return low, deep, self.main(fused)

    class AuxFirst(Base):
        '''HRNet with OCR: [auxiliary, main], also when it is evaluated.'''

        def forward(self, x):
            low, deep, main = self.run(x)
            return [self.auxiliary(low), main]

    class Pid(Base):
        '''PIDNet with its training outputs: detail branch, main, boundary.'''

        def forward(self, x):
            low, deep, main = self.run(x)
            return [self.auxiliary(low), main, self.boundary(low)]

    class Deep(Base):
        '''Deep supervision as in nnU-Net: full resolution first, then ever coarser.'''

        def forward(self, x):
            low, deep, main = self.run(x)
            return [F.interpolate(main, scale_factor=2), self.auxiliary(low), self.auxiliary(deep)]

    class DeepLast(Deep):
        def forward(self, x):
            return tuple(reversed(super().forward(x)))

    class Stacked(Base):
        '''As MONAI's DynUNet: in training one tensor with an axis for the levels.'''

        def forward(self, x):
            low, deep, main = self.run(x)
            return torch.stack([self.auxiliary(low), main], 1) if self.training else main

    class OnlyInTraining(Base):
        '''As ICNet, BiSeNet, K-Net: auxiliary outputs vanish in eval mode, and the main one is not the first.'''

        def forward(self, x):
            low, deep, main = self.run(x)
            return (self.auxiliary(low), self.boundary(low), main) if self.training else main

    class NeedsTargets(Base):
        def forward(self, x, targets=None):
            main = self.run(x)[2]
            return F.cross_entropy(main, targets) if self.training else main

    class Frozen(Base):
        def __init__(self, num_classes=5):
            super().__init__(num_classes)
            self.requires_grad_(False)

        def forward(self, x):
            return self.run(x)[2]

    class WithoutGradients(Base):
        @torch.no_grad()
        def forward(self, x):
            return self.run(x)[2]

    class Named(Base):
        def forward(self, x):
            low, deep, main = self.run(x)
            return {"aux_low": self.auxiliary(low), "seg": main}

    class WithFeatures(Base):
        '''Logits beside feature maps of another number of channels.'''

        def forward(self, x):
            low, deep, main = self.run(x)
            return {"features": (low, deep), "prediction": main}

    class Sigmoid(Base):
        def __init__(self, num_classes=1):
            super().__init__(num_classes)

        def forward(self, x):
            return torch.sigmoid(self.run(x)[2])

    class LogSigmoid(Sigmoid):
        def forward(self, x):
            return F.logsigmoid(self.run(x)[2])

    class SigmoidModule(Sigmoid):
        def __init__(self, num_classes=1):
            super().__init__(num_classes)
            self.last = nn.Sequential(self.main, nn.Sigmoid())

        def forward(self, x):
            low, deep, main = self.run(x)
            return self.last[1](main)

    class ResizedSigmoid(Sigmoid):
        '''U2-Net and others bring the probabilities to the image's size.'''

        def forward(self, x):
            return F.interpolate(F.hardsigmoid(self.run(x)[2]), size=x.shape[2:], mode="bilinear")

    class InPlaceModule(SigmoidModule):
        def __init__(self, num_classes=1):
            super().__init__(num_classes)
            self.last[1] = nn.Hardsigmoid(inplace=True)

    class InPlace(Sigmoid):
        def forward(self, x):
            return self.run(x)[2].sigmoid_().clamp(1e-6, 1 - 1e-6)

    class OnlyWhenEvaluated(Sigmoid):
        def forward(self, x):
            main = self.run(x)[2]
            return main if self.training else main.sigmoid()

    class SideOutputs(Sigmoid):
        '''U2-Net: the fused map first, then those of the levels, all behind a sigmoid.'''

        def forward(self, x):
            low, deep, main = self.run(x)
            return tuple(torch.sigmoid(each) for each in (main, self.auxiliary(low), self.boundary(low)))

    class Softmax(Base):
        def forward(self, x):
            return nn.Softmax2d()(self.run(x)[2])

    class DefaultSoftmax(Softmax):
        '''Without a dimension, which is that of the classes.'''

        def forward(self, x):
            return nn.Softmax()(self.run(x)[2])

    class NoBackground(Softmax):
        def forward(self, x):
            return super().forward(x)[:, 1:]

    class OneOfSoftmax(Base):
        '''Two classes; only the probability of the second is returned.'''

        def __init__(self, num_classes=2):
            super().__init__(num_classes)

        def forward(self, x):
            return self.run(x)[2].softmax(dim=1)[:, 1:]

    class OneOfLogSoftmax(OneOfSoftmax):
        def forward(self, x):
            return F.log_softmax(self.run(x)[2], 1)[:, 1:]

    class LogSoftmax(Softmax):
        def forward(self, x):
            return F.log_softmax(self.run(x)[2], dim=1)

    class ByHand(Sigmoid):
        def forward(self, x):
            return 1 / (1 + torch.exp(-self.run(x)[2]))
""")


def save_net(directory: Path, name: str) -> tuple[Path, str]:
    """The weights of a network, drawn under a seed, and its ``--arch``."""
    from equalize.checkpoint.user_code import load_factory

    (directory / "output_nets.py").write_text(CODE)
    arch = f"{directory / 'output_nets.py'}:{name}"
    torch.manual_seed(3)
    model = load_factory(arch)().eval()
    with torch.no_grad():  # both classes occur
        model.main.weight.mul_(10)
        model.main.bias.sub_(model.run(torch.randn(4, 3, 32, 32))[2].mean((0, 2, 3)))
    torch.save(model.state_dict(), directory / f"{name}.pth")
    return directory / f"{name}.pth", arch
