"""Features of a frozen ImageNet-trained encoder at sampled pixels of CamVid, brought to one grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from material import CLASSES, ENCODER, write_encoder
from torch import Tensor, nn

from equalize.checkpoint.preprocess import Preprocess
from equalize.data.dataset import open_data
from equalize.data.images import read_image
from equalize.data.masks import LabelRule, read_mask
from equalize.plan.indicator import Readout

SIZE = (192, 256)
COUNTS = {"train": 512, "val": 256, "test": 256}
"""Pixels of each image."""


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Features (N, P, C) and labels (N, P) at P pixels of N images."""

    u_NPC: Tensor
    y_NP: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, data: Path, split: str, encoder: nn.Module) -> "Pixels":
        """Runs the encoder over a split."""
        preprocess = Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3)
        rule = LabelRule(ignore_index=len(CLASSES))
        generator = torch.Generator().manual_seed(0)
        features, labels = [], []
        for image, mask in open_data(data, split=split, labels=True).with_masks():
            levels = encoder(preprocess(read_image(image), SIZE)[None])[2:]
            grid = levels[0].shape[2:]
            u_CL = torch.cat([F.interpolate(level, grid, mode="bilinear") for level in levels], dim=1)[0].flatten(1)
            y_L = F.interpolate(read_mask(mask, rule)[None, None].float(), grid, mode="nearest-exact").flatten().long()
            known = (y_L != rule.ignore_index).nonzero().flatten()
            drawn = known[torch.randint(len(known), (COUNTS[split],), generator=generator)]
            features.append(u_CL[:, drawn].T)
            labels.append(y_L[drawn])
        return cls(u_NPC=torch.stack(features), y_NP=torch.stack(labels))

    def branches(self, widths: Sequence[int]) -> tuple[Tensor, ...]:
        """The features of each level."""
        return self.u_NPC.split(list(widths), dim=2)

    @cached_property
    def readout(self) -> Readout:
        """Regression of the one-hot labels on the features."""
        u_LC, y_LK = self.u_NPC.flatten(0, 1).double(), F.one_hot(self.y_NP.flatten(), len(CLASSES)).double()
        u_LC, y_LK = u_LC - u_LC.mean(0), y_LK - y_LK.mean(0)
        variance = y_LK.square().sum(1).mean()
        weight_K = (1 / variance).expand(y_LK.shape[1])
        return Readout(sigma_CC=u_LC.T @ u_LC / len(u_LC), b_CK=u_LC.T @ y_LK / len(u_LC), weight_K=weight_K)


def read_splits(data: Path, out: Path) -> tuple[dict[str, Pixels], list[int]]:
    """The sampled pixels, and how many channels each level has."""
    write_encoder(out / "encoder.pth")
    encoder = smp.encoders.get_encoder(f"tu-{ENCODER}", weights=None).eval()
    missing, _ = encoder.model.load_state_dict(torch.load(out / "encoder.pth", weights_only=True), strict=False)
    assert not missing, missing
    return {split: Pixels.of(data, split, encoder) for split in COUNTS}, list(encoder.out_channels[2:])
