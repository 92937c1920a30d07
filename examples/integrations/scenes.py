"""The demo's street scenes as tensors, for the examples beside this file, and the score that they print."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms

from equalize import demo

CLASSES = ("sky", "grass", "road", "building", "tree", "pole", "sign", "car")
SIZE = (96, 128)
"""Height and width, half of the pictures': the examples are to take a minute."""
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Scenes(Dataset):
    """(image (3, H, W), labels (H, W)): the first 18 scenes for training, or the last 6."""

    def __init__(self, split: str, size: tuple[int, int] = SIZE) -> None:
        self.images = sorted((demo.DATA / "images").iterdir())
        self.images = self.images[:18] if split == "train" else self.images[18:]
        self.size = size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path = self.images[index]
        image = transforms.pil_to_tensor(Image.open(path).convert("RGB").resize(self.size[::-1]))
        labels = Image.open(demo.DATA / "masks" / f"{path.stem}.png").resize(self.size[::-1], Image.Resampling.NEAREST)
        pixels = transforms.normalize(image / 255, MEAN, STD)
        return pixels, torch.from_numpy(np.asarray(labels, dtype=np.int64))


def batches(size: int = 6) -> list[Tensor]:
    """The training images, for `equalize.calibrate`."""
    return list(torch.stack([image for image, _ in Scenes("train")]).split(size))


@torch.no_grad()
def mean_iou(model: nn.Module, logits=lambda output: output) -> float:
    """mIoU in percent on the last scenes; `logits` takes them out of what the model returns."""
    model.eval()
    images, labels = (torch.stack(each) for each in zip(*Scenes("val"), strict=True))
    scores = nn.functional.interpolate(logits(model(images)), labels.shape[1:], mode="bilinear")
    pairs = len(CLASSES) * labels + scores.argmax(1)
    counts = torch.bincount(pairs.flatten(), minlength=len(CLASSES) ** 2).view(len(CLASSES), -1)
    union = counts.sum(0) + counts.sum(1) - counts.diag()
    return float(100 * (counts.diag() / union)[union > 0].mean())
