"""Make the checkpoint and the pictures behind `equalize demo`.

    python examples/make_demo.py [--out equalize/demo] [--scenes 600] [--epochs 16] [--seed 0]

Draws street scenes, trains a small UPerNet (ConvNeXt backbone, BatchNorm decoder) on them from scratch, and writes
OUT/model (a transformers directory) and OUT/data (held-out scenes and their masks). One CPU thread, some minutes.
The scenes depend on the seed alone; the weights also on the version of torch and on the processor.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import nn
from torch.nn import functional as F
from transformers import ConvNextConfig, SegformerImageProcessor, UperNetConfig, UperNetForSemanticSegmentation

CLASSES = ("sky", "grass", "road", "building", "tree", "pole", "sign", "car")
SKY, GRASS, ROAD, BUILDING, TREE, POLE, SIGN, CAR = range(len(CLASSES))
TEXTURE = (2, 14, 6, 8, 18, 5, 4, 5)  # standard deviation of the grain of each class, in gray levels
WIDTH, HEIGHT = 256, 192  # the last level of the backbone is 8 x 6, so that no pyramid pooling (1, 2, 3, 6) enlarges
HELD_OUT = 24
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class Scene:
    """A picture and its mask, painted together so that they cannot disagree."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.horizon = int(rng.uniform(0.40, 0.58) * HEIGHT)
        self.image = Image.new("RGB", (WIDTH, HEIGHT))
        self.mask = Image.new("L", (WIDTH, HEIGHT), SKY)
        self._on_image, self._on_mask = ImageDraw.Draw(self.image), ImageDraw.Draw(self.mask)

    def paint(self, shape: str, xy: list, color: tuple, label: int) -> None:
        """Draw one `ImageDraw` shape on both."""
        getattr(self._on_image, shape)(xy, fill=tuple(int(c) for c in np.clip(color, 0, 255)))
        getattr(self._on_mask, shape)(xy, fill=label)

    def color(self, *center: float, spread: float = 18) -> tuple:
        """A color near `center`: one step in brightness, small ones in hue."""
        return tuple(np.array(center) + self.rng.normal(0, spread) + self.rng.normal(0, spread / 2, 3))

    def base(self, depth: float) -> float:
        """Row where a thing stands on the ground: depth 0 is the horizon, depth 1 the lower edge."""
        return self.horizon + depth * (HEIGHT - self.horizon)

    def sky_and_ground(self) -> None:
        top, low = np.array(self.color(95, 150, 220)), np.array(self.color(190, 210, 230))
        for y in range(self.horizon):
            self.paint("line", [(0, y), (WIDTH, y)], top + (low - top) * y / self.horizon, SKY)
        for _ in range(self.rng.integers(0, 5)):
            x, y, w = self.rng.uniform(0, WIDTH), self.rng.uniform(0, self.horizon), self.rng.uniform(15, 50)
            self.paint("ellipse", [x - w, y - w / 4, x + w, y + w / 4], self.color(230, 232, 236, spread=8), SKY)
        self.paint("rectangle", [0, self.horizon, WIDTH, HEIGHT], self.color(95, 130, 60), GRASS)

    def road(self) -> None:
        far, near = self.rng.uniform(0.25, 0.75) * WIDTH, self.rng.uniform(0.3, 0.7) * WIDTH
        half, y = self.rng.uniform(0.22, 0.55) * WIDTH, self.horizon
        edge = [(far - 4, y), (far + 4, y), (near + half, HEIGHT), (near - half, HEIGHT)]
        self.paint("polygon", edge, self.color(105, 105, 110), ROAD)
        for t in np.arange(0.1, 1.0, 0.18):  # the lane marks belong to the road
            x0, x1 = far + (near - far) * t, far + (near - far) * (t + 0.08)
            y0, y1, w = self.base(t), self.base(t + 0.08), 1 + 3 * t
            mark = [(x0 - w, y0), (x0 + w, y0), (x1 + w, y1), (x1 - w, y1)]
            self.paint("polygon", mark, (215, 215, 205), ROAD)

    def building(self) -> None:
        w, x = self.rng.uniform(25, 75), self.rng.uniform(-20, WIDTH)
        low, high = self.base(self.rng.uniform(0.02, 0.15)), self.horizon * self.rng.uniform(0.1, 0.75)
        walls = [(165, 110, 90), (175, 165, 145), (130, 130, 140)]  # the last is gray like a road: place must decide
        self.paint("rectangle", [x, high, x + w, low], self.color(*walls[self.rng.integers(3)]), BUILDING)
        glass, step = self.color(70, 85, 105), self.rng.uniform(9, 14)
        for wx in np.arange(x + 4, x + w - 6, step):
            for wy in np.arange(high + 5, low - 9, step):
                self.paint("rectangle", [wx, wy, wx + step * 0.45, wy + step * 0.5], glass, BUILDING)

    def tree(self, depth: float) -> None:
        size, x, y = 10 + 34 * depth + self.rng.uniform(0, 10), self.rng.uniform(0, WIDTH), self.base(depth)
        self.paint("rectangle", [x - size / 9, y - size, x + size / 9, y], self.color(95, 70, 50, spread=8), TREE)
        green = np.array(self.color(60, 105, 50))
        for _ in range(9):
            cx, cy, r = x + self.rng.normal(0, size / 3), y - size * self.rng.uniform(1, 1.9), size / 2.6
            self.paint("ellipse", [cx - r, cy - r, cx + r, cy + r], green + self.rng.normal(0, 8), TREE)

    def pole(self, depth: float) -> None:
        tall, x, y = 25 + 75 * depth + self.rng.uniform(0, 15), self.rng.uniform(5, WIDTH - 5), self.base(depth)
        half = 1 + 1.5 * depth
        self.paint("rectangle", [x - half, y - tall, x + half, y], self.color(95, 95, 95), POLE)
        if self.rng.random() < 0.7:
            r, faces = 5 + 8 * depth, [(200, 40, 40), (40, 70, 190), (225, 190, 40)]
            disc = [x - r, y - tall - r, x + r, y - tall + r]
            self.paint("ellipse", disc, self.color(*faces[self.rng.integers(3)]), SIGN)

    def car(self, depth: float) -> None:
        w, y = 14 + 55 * depth, self.base(depth)
        x, h = self.rng.uniform(0, WIDTH - w), 0.3 * w
        paints = [(190, 30, 30), (225, 225, 225), (40, 60, 140), (45, 45, 50)]
        body = self.color(*paints[self.rng.integers(4)])
        roof = [(x + 0.2 * w, y - h), (x + 0.3 * w, y - 1.6 * h), (x + 0.7 * w, y - 1.6 * h), (x + 0.85 * w, y - h)]
        self.paint("polygon", roof, self.color(75, 90, 105, spread=8), CAR)
        self.paint("rectangle", [x, y - h, x + w, y - 0.15 * h], body, CAR)
        for cx in (x + 0.22 * w, x + 0.78 * w):
            self.paint("ellipse", [cx - 0.1 * w, y - 0.2 * w, cx + 0.1 * w, y], (25, 25, 28), CAR)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Grain, light from one side, tint, exposure, a soft lens, and noise: (H, W, 3) and (H, W), uint8."""
        rng, mask_HW = self.rng, np.array(self.mask)
        x_HWC = np.array(self.image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))).astype(np.float32)
        x_HWC += (rng.normal(0, 1, (HEIGHT, WIDTH)) * np.take(TEXTURE, mask_HW))[..., None]
        light_W = 1 + rng.uniform(-0.3, 0.3) * np.linspace(-1, 1, WIDTH)
        x_HWC *= light_W[None, :, None] * rng.uniform(0.65, 1.2) * rng.normal(1, 0.05, 3)
        x_HWC += rng.normal(0, rng.uniform(2, 9), x_HWC.shape)
        return np.clip(x_HWC, 0, 255).astype(np.uint8), mask_HW


def draw_scene(seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Scene `index` of a seed: image (H, W, 3) and mask (H, W), both uint8. Painted from far to near."""
    rng = np.random.default_rng([seed, index])
    scene = Scene(rng)
    scene.sky_and_ground()
    for _ in range(rng.integers(1, 6)):
        scene.building()
    scene.road()
    things = [scene.tree] * rng.integers(1, 4) + [scene.pole] * rng.integers(1, 5) + [scene.car] * rng.integers(1, 4)
    depths = np.sort(rng.uniform(0.08, 0.9, len(things)))
    for depth, which in zip(depths, rng.permutation(len(things)), strict=True):
        things[which](depth)
    return scene.finish()


def write_data(folder: Path, seed: int) -> None:
    """The held-out scenes: JPEG, as photographs come, and PNG masks. Their indices come before all training scenes."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(HELD_OUT):
        image, mask = draw_scene(seed, index)
        Image.fromarray(image).save(folder / "images" / f"scene_{index:02d}.jpg", quality=85)
        Image.fromarray(mask).save(folder / "masks" / f"scene_{index:02d}.png", optimize=True)


def read_data(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, H, W) uint8 and masks (N, H, W) int64, from the files that `write_data` wrote."""
    images = [np.array(Image.open(path)) for path in sorted((folder / "images").iterdir())]
    masks = [np.array(Image.open(path)) for path in sorted((folder / "masks").iterdir())]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(masks)).long()


def build_model() -> UperNetForSemanticSegmentation:
    """About 246 000 weights: small enough to be shipped in float32."""
    backbone = ConvNextConfig(
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 2, 1],
        layer_scale_init_value=0.1,  # the usual 1e-6 is meant for deep networks and long training
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    names = dict(enumerate(CLASSES))
    config = UperNetConfig(
        backbone_config=backbone,
        hidden_size=32,
        pool_scales=[1, 2, 3, 6],
        use_auxiliary_head=False,
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    return UperNetForSemanticSegmentation(config)


def normalize(x_NCHW: torch.Tensor) -> torch.Tensor:
    return (x_NCHW.float() / 255 - MEAN) / STD


def train(model: nn.Module, seed: int, scenes: int, epochs: int, batch_size: int = 8) -> None:
    """AdamW, linear warm-up, cosine decay; the only augmentation is the mirror, the scenes bring their own light."""
    drawn = [draw_scene(seed, HELD_OUT + index) for index in range(scenes)]
    x_NCHW = torch.from_numpy(np.stack([image for image, _ in drawn])).permute(0, 3, 1, 2)
    y_NHW = torch.from_numpy(np.stack([mask for _, mask in drawn])).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    steps, warm_up = epochs * (scenes // batch_size), 50
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    model.train()
    for epoch in range(1, epochs + 1):
        start, total = time.perf_counter(), 0.0
        for index in torch.randperm(scenes)[: steps // epochs * batch_size].split(batch_size):
            x, y = normalize(x_NCHW[index]), y_NHW[index]
            if torch.rand(()) < 0.5:
                x, y = x.flip(-1), y.flip(-1)
            loss = F.cross_entropy(model(pixel_values=x).logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch:2d}  loss {total * epochs / steps:.4f}  {time.perf_counter() - start:.0f} s", flush=True)


@torch.no_grad()
def mean_iou(model: nn.Module, images: torch.Tensor, masks: torch.Tensor) -> tuple[float, dict[str, float]]:
    """Mean intersection over union in percent, and that of every class."""
    model.eval()
    n = len(CLASSES)
    confusion = torch.zeros(n * n, dtype=torch.int64)
    for x, y in zip(images.split(8), masks.split(8), strict=True):
        predicted = model(pixel_values=normalize(x)).logits.argmax(1)
        confusion += torch.bincount((y * n + predicted).flatten(), minlength=n * n)
    table = confusion.view(n, n)
    iou = 100 * table.diag() / (table.sum(0) + table.sum(1) - table.diag())
    return iou.mean().item(), dict(zip(CLASSES, iou.tolist(), strict=True))


@torch.no_grad()
def branch_scales(model: UperNetForSemanticSegmentation, images: torch.Tensor) -> dict[str, list[float]]:
    """Standard deviation of each branch in front of the two fusion layers, by hooks: a check that they are unequal."""
    head, width = model.decode_head, model.config.hidden_size
    seen: dict[str, torch.Tensor] = {}
    layers = {"bottleneck.conv": head.bottleneck.conv, "fpn_bottleneck.conv": head.fpn_bottleneck.conv}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
        for name, layer in layers.items()
    ]
    try:
        model.eval()(pixel_values=normalize(images))
    finally:
        for handle in handles:
            handle.remove()
    pooled = len(model.config.pool_scales)
    channels = {
        "bottleneck.conv": [head.in_channels[-1]] + [width] * pooled,
        "fpn_bottleneck.conv": [width] * len(head.in_channels),
    }
    return {name: [u.std().item() for u in seen[name].split(channels[name], dim=1)] for name in layers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "equalize" / "demo")
    parser.add_argument("--scenes", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # sums over several threads may round differently
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(arguments.seed)
    write_data(arguments.out / "data", arguments.seed)
    model = build_model()
    train(model, arguments.seed, arguments.scenes, arguments.epochs)
    model.save_pretrained(arguments.out / "model")
    SegformerImageProcessor(size={"height": HEIGHT, "width": WIDTH}).save_pretrained(arguments.out / "model")

    # What was written is what is measured.
    model, info = UperNetForSemanticSegmentation.from_pretrained(arguments.out / "model", output_loading_info=True)
    assert not any(info.values()), info
    images, masks = read_data(arguments.out / "data")
    score, classes = mean_iou(model, images, masks)
    print(f"mIoU {score:.1f}  " + "  ".join(f"{name} {iou:.1f}" for name, iou in classes.items()))
    for name, scales in branch_scales(model, images).items():
        print(f"{name}: std " + " ".join(f"{scale:.3f}" for scale in scales), f"ratio {max(scales) / min(scales):.2f}")


if __name__ == "__main__":
    main()
