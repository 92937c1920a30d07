"""Images a second of `equalize finetune` and `equalize evaluate` beside those of a bare torch loop.

    python examples/bench_training.py [--data CAMVID] [--networks unet segformer] [--size 192x256] [--batch 4]
        [--steps 10] [--rounds 5] [--threads 1] [--device cpu] [--profile]

The bare loop has what any such loop must have and nothing else: a DataLoader over the same pictures with the same
augmentation, the same network, cross entropy at the masks' resolution, AdamW, clipped gradients, a schedule; for
scoring, logits brought to the masks' size and a confusion matrix. Every round runs each once; medians over rounds.
Networks have drawn weights: nothing is downloaded. Without --data, the pictures are those of `equalize demo`.
"""

import argparse
import contextlib
import cProfile
import os
import pstats
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from equalize.checkpoint.checkpoint import Checkpoint
from equalize.checkpoint.loading import ModelName
from equalize.commands.evaluate import EvalConfig, evaluate
from equalize.commands.finetune.config import TrainConfig
from equalize.commands.finetune.finetune import finetune
from equalize.data.dataset import open_data
from equalize.demo import DATA
from equalize.messages import TrainingMonitor

WARM_UP = 2  # steps, or batches, before the clock starts
CLASSES = 11
IGNORED = 255


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Pictures and masks; for training resized, cropped, flipped and recolored as `TrainConfig` does by default."""

    def __init__(self, paths: list[tuple[Any, Any]], checkpoint: Checkpoint, size: tuple[int, int], *, train: bool):
        self.paths, self.size, self.train = paths, size, train
        self.normalize = v2.Normalize(checkpoint.preprocess.mean, checkpoint.preprocess.std)
        jitter = {"brightness": 32 / 255, "contrast": (0.5, 1.5), "saturation": (0.5, 1.5), "hue": 18 / 360}
        self.recolor = v2.Compose([v2.RandomApply([v2.ColorJitter(**{name: by})]) for name, by in jitter.items()])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image_path, mask_path = self.paths[index]
        picture = tv_tensors.Image(Image.open(image_path).convert("RGB"))
        labels = tv_tensors.Mask(torch.from_numpy(numpy.array(Image.open(mask_path))).long())
        labels = labels.masked_fill(labels >= CLASSES, IGNORED)
        if self.train:
            picture, labels = self.augmented(picture, tv_tensors.Mask(labels))
        else:
            picture = v2.functional.resize(picture, list(self.size), antialias=True)
        image = self.normalize(v2.functional.to_dtype(picture, torch.float32, scale=True))
        return image.as_subclass(Tensor), labels.as_subclass(Tensor)

    def augmented(self, picture: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """mmsegmentation's pipeline."""
        factor = float(torch.empty(()).uniform_(0.5, 2))
        scaled = [round(side * factor) for side in self.size]
        picture, labels = (v2.functional.resize(each, scaled) for each in (picture, labels))
        sides = [min(pair) for pair in zip(self.size, scaled, strict=True)]
        for _ in range(10):
            top, left = (int(torch.randint(whole - part + 1, ())) for whole, part in zip(scaled, sides, strict=True))
            counts = torch.unique(labels[top : top + sides[0], left : left + sides[1]], return_counts=True)[1]
            if len(counts) > 1 and counts.max() < 0.75 * counts.sum():
                break
        picture, labels = (v2.functional.crop(each, top, left, *sides) for each in (picture, labels))
        if torch.rand(()) < 0.5:
            picture, labels = (v2.functional.horizontal_flip(each) for each in (picture, labels))
        border = [0, 0, self.size[1] - sides[1], self.size[0] - sides[0]]
        return v2.functional.pad(self.recolor(picture), border), v2.functional.pad(labels, border, fill=IGNORED)


class Finished(Exception):  # noqa: N818 - no error
    """Raised to end what is timed."""


class Clock(TrainingMonitor):
    """A `Progress`, and a monitor of trainings, that notes when images were done; raises `Finished` after `most`.

    On a CPU it reads the processor time of this process, which other work on the machine does not disturb.
    """

    def __init__(self, device: str, batch: int, most: int) -> None:
        self.device, self.batch, self.most = device, batch, most
        self.times: list[tuple[int, float]] = []

    def __call__(self, done: int, total: int) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.times.append((done, time.perf_counter() if self.device == "cuda" else time.process_time()))
        if done >= self.most:
            raise Finished

    def stepped(self, step: int, of: int) -> None:
        """The same, of a training."""
        self(step * self.batch, of * self.batch)

    def rate(self, after: int) -> float:
        """Images a second, from the first call on at which as many as `after` were done."""
        (first, start), (last, end) = next(each for each in self.times if each[0] >= after), self.times[-1]
        return (last - first) / (end - start)


def bare_training(checkpoint: Checkpoint, pairs: Pairs, settings: argparse.Namespace, clock: Clock) -> None:
    """The loop of a textbook."""
    model = checkpoint.model.to(settings.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    steps = settings.steps + WARM_UP
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    batches = forever(DataLoader(pairs, settings.batch, shuffle=True, drop_last=True))
    for step in range(steps):
        images, labels = (each.to(settings.device) for each in next(batches))
        loss = F.cross_entropy(upsampled(model(images), labels), labels, ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        clock.stepped(step + 1, steps)


def bare_scoring(checkpoint: Checkpoint, pairs: Pairs, settings: argparse.Namespace, clock: Clock) -> None:
    """Logits at the masks' size, and a confusion matrix."""
    model, total = checkpoint.model.to(settings.device).eval(), torch.zeros(CLASSES**2, dtype=torch.int64)
    with torch.no_grad():
        done = 0
        for images, labels in DataLoader(pairs, settings.batch):
            predicted = upsampled(model(images.to(settings.device)), labels).argmax(1).cpu()
            counted = labels != IGNORED
            total += torch.bincount(labels[counted] * CLASSES + predicted[counted], minlength=CLASSES**2)
            done += len(images)
            clock(done, 0)


def upsampled(output: Any, labels: Tensor) -> Tensor:
    """The logits of a network of transformers or smp at the labels' size."""
    logits: Tensor = getattr(output, "logits", output)
    return F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)


def forever(loader: DataLoader[Any]) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from loader


def equalize_training(source: str, settings: argparse.Namespace, clock: Clock, *, attached: bool) -> None:
    """`equalize finetune`, with its default augmentation and log; perhaps with V in place of the fusion weights."""
    config = TrainConfig(
        max_steps=settings.steps + WARM_UP,
        batch_size=settings.batch,
        size=settings.size,
        ignore_index=settings.ignored,
        device=settings.device,
        calibrate="preserve" if attached else None,
        samples=2,
    )
    with tempfile.TemporaryDirectory() as out:
        finetune(ModelName(source=source), settings.data, f"{out}/out", config, monitor=clock, models=False)


def equalize_scoring(source: str, settings: argparse.Namespace, clock: Clock) -> None:
    """`equalize evaluate`."""
    config = EvalConfig(
        size=settings.size, batch_size=settings.batch, ignore_index=settings.ignored, device=settings.device
    )
    evaluate(ModelName(source=source), settings.data, config, progress=clock)


def ways(source: str, settings: argparse.Namespace) -> dict[str, Callable[[Clock], object]]:
    """What is timed, by name."""
    name = ModelName(source=source)
    has_splits = open_data(settings.data).split is not None
    trained, scored = (
        open_data(settings.data, split=split if has_splits else None, labels=True).with_masks()
        for split in ("train", "val")
    )

    def bare(run: Callable[..., None], paths: list[tuple[Any, Any]]) -> Callable[[Clock], object]:
        def go(clock: Clock) -> None:
            checkpoint = name.load()
            run(checkpoint, Pairs(paths, checkpoint, settings.size, train=paths is trained), settings, clock)

        return go

    return {
        "bare training": bare(bare_training, trained),
        "finetune": lambda clock: equalize_training(source, settings, clock, attached=False),
        "finetune, equalized": lambda clock: equalize_training(source, settings, clock, attached=True),
        "bare scoring": bare(bare_scoring, scored),
        "evaluate": lambda clock: equalize_scoring(source, settings, clock),
    }


def write_network(kind: str, folder: Path) -> str:
    """A network with drawn weights, as a directory of its own library."""
    out = str(folder / kind)
    torch.manual_seed(0)
    if kind == "segformer":
        from transformers import SegformerConfig, SegformerForSemanticSegmentation

        SegformerForSemanticSegmentation(SegformerConfig(num_labels=CLASSES)).save_pretrained(out)
    else:
        import segmentation_models_pytorch as smp

        smp.create_model(kind, "resnet18", encoder_weights=None, classes=CLASSES).save_pretrained(out)
    return out


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(DATA))
    parser.add_argument("--ignored", type=int, help="label that does not count; 11 for CamVid")
    parser.add_argument("--networks", nargs="+", default=["unet", "segformer"], help="segformer, or smp's names")
    parser.add_argument("--only", nargs="+", metavar="WAY", help="of the ways that are timed")
    parser.add_argument("--size", default="192x256")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--profile", action="store_true", help="print where the time of each way goes (cProfile)")
    arguments = parser.parse_args()
    height, _, width = arguments.size.partition("x")
    arguments.size = (int(height), int(width))
    return arguments


def main() -> None:
    """Times everything and prints a table for each network."""
    warnings.simplefilter("ignore")
    settings = read_arguments()
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        for kind in settings.networks:
            rates: dict[str, list[float]] = {}
            timed = ways(write_network(kind, Path(folder)), settings)
            for _ in range(settings.rounds):
                for name in settings.only or timed:
                    clock = Clock(settings.device, settings.batch, (WARM_UP + settings.steps) * settings.batch)
                    profiling = cProfile.Profile() if settings.profile else contextlib.nullcontext()
                    with profiling as profile, contextlib.suppress(Finished):
                        timed[name](clock)
                    rates.setdefault(name, []).append(clock.rate(WARM_UP * settings.batch))
                    if profile:
                        print(f"{kind}, {name}")
                        pstats.Stats(profile).sort_stats("cumulative").print_stats(70)
            print(f"{kind}, {settings.size[0]}x{settings.size[1]}, batches of {settings.batch}, {settings.device}")
            for name, found in rates.items():
                beside = rates.get("bare scoring" if name in ("evaluate", "bare scoring") else "bare training", found)
                ratio = statistics.median(ours / bare for ours, bare in zip(found, beside, strict=True))
                print(f"  {name:20} {statistics.median(found):8.2f} images/s   {ratio:5.2f} of the bare loop's")


if __name__ == "__main__":
    main()
