"""`TrainConfig`: all settings of a training."""

import math
import os
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from equalize.commands.calibration_config import CalibrationConfig
from equalize.commands.evaluate import EvalConfig
from equalize.errors import InputError
from equalize.plan.indicator import Optimizer
from equalize.plan.plan import ScaleTo, Strategy

TrainAs = Literal["explicit", "folded"]
Precision = Literal["fp32", "bf16", "fp16"]

_DEFAULTS = {"adamw": (1e-4, 0.01), "sgd": (0.01, 5e-4)}  # learning rate, weight decay
_EPOCHS = 20
_RESIZE = (0.5, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The settings of a training; an InputError if one is out of range.

    Fields that are None get the default in their description.
    """

    epochs: int | None = None
    """Passes over the training split; 20 where `max_steps` is None too."""
    max_steps: int | None = None
    """Optimizer steps, instead of epochs."""
    batch_size: int = 8
    """Pairs a step, in each process."""
    accumulate: int = 1
    """Batches whose gradients make one step."""
    optimizer: Optimizer = "adamw"
    """SGD has momentum 0.9."""
    lr: float | None = None
    """Of the backbone, at its peak; 1e-4 for AdamW, 0.01 for SGD."""
    head_lr_mult: float = 1.0
    """The learning rate of all but the backbone is this many times `lr`."""
    fusion_lr_mult: float = 1.0
    """The learning rate of the fusion layers' weights is this many times that of their part."""
    weight_decay: float | None = None
    """0.01 for AdamW, 5e-4 for SGD; never on biases and norms."""
    power: float = 0.9
    """Of the polynomial decay to 0."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises linearly."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    precision: Precision | None = None
    """That of Accelerate's configuration, else fp32, if None."""
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    """Of the loss, one a class."""
    aux_weight: float = 0.4
    """Of the auxiliary head's loss, where the network has one."""
    freeze_backbone: bool = False
    cache_backbone: bool = False
    """Compute what the frozen backbone gives once for each image and its mirror image, and read it back; the only
    augmentation is then `flip`, at `size`."""
    cache_dir: str | None = None
    """Where that is kept, for any number of trainings; with the training if None."""
    freeze_norms: bool = False
    """Neither the statistics nor the weights of normalizations move."""
    size: tuple[int, int] | None = None
    """(H, W) that images are brought to; the checkpoint's, else their own, if None."""
    crop: tuple[int, int] | None = None
    """(H, W) that training sees; `size`, the checkpoint's, else 512 x 512, if None."""
    random_resize: tuple[float, float] = _RESIZE
    """Smallest and largest factor."""
    cat_max_ratio: float = 0.75
    """Crops in which one class has a larger share are drawn again."""
    flip: float = 0.5
    photometric: bool = True
    num_classes: int | None = None
    """As many as the data set names, else as the checkpoint has, if None."""
    class_names: str | None = None
    """A file with names of the classes."""
    ignore_index: int | None = None
    """255 if None, unless labels are 0 and 255 alone and the network has two classes."""
    reduce_labels: Literal["auto", "yes", "no"] = "auto"
    colors: str | None = None
    """A file with the colors of classes, or ``none``; one in the data if None."""
    masks_drawn_on: Literal["auto", "upright", "stored"] = "auto"
    """Which way up masks are whose images alone have an EXIF orientation."""
    train_split: str = "train"
    val_split: str = "val"
    """Scored during training where the data set has it."""
    eval_every: int | None = None
    """Steps between evaluations and saves; an epoch if None. The last step always counts."""
    eval_first: int | None = None
    """One more evaluation, after that many steps."""
    log_every: int | None = None
    """Steps between lines of metrics.jsonl; a hundredth of the training if None."""
    patience: int | None = None
    """Stop after that many evaluations without a better mIoU."""
    calibrate: Strategy | None = None
    """Equalize first, on the training split, with this strategy."""
    scale: ScaleTo | None = None
    """What that calibration equalizes to; "step" if None."""
    samples: int = 256
    """Images of that calibration, at most."""
    train_as: TrainAs | None = None
    """Whether the optimizer sees the equalized weights V or the plain ones; None: V wherever a plan is in effect."""
    seed: int = 0
    workers: int | None = None
    """Processes that read images; by the device if None."""
    device: str = "auto"
    report_to: tuple[str, ...] = ()
    """tensorboard, trackio, or what else transformers reports to."""

    def __post_init__(self) -> None:
        for name, smallest in _SMALLEST.items():
            value = getattr(self, name)
            if value is not None and not smallest <= value < math.inf:
                what = "is too small" if value < smallest else "is no number"
                raise InputError(_flag(name), what, got=value, expected=f"at least {smallest}")
        for name in ("warmup", "flip", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(_flag(name), "is no share", got=getattr(self, name), expected="0 to 1")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise InputError("--lr", "is no learning rate", got=self.lr, expected="above 0")
        if self.epochs is not None and self.max_steps is not None:
            raise InputError("--epochs", "cannot stand with --max-steps")
        weights = self.class_weights
        if weights is not None and not (all(0 <= each < math.inf for each in weights) and any(weights)):
            raise InputError("--class-weights", "are no weights", got=weights, expected="0 or more, not all 0")
        low, high = self.random_resize
        if not 0 < low <= high < math.inf:
            what, expected = "is no range", "smallest and largest factor"
            raise InputError("--random-resize", what, got=self.random_resize, expected=expected)
        if self.scale is not None and self.calibrate is None:
            raise InputError("--scale", "needs --calibrate", remedy="a plan that is there already has its own")

        if self.cache_backbone:
            self._check_cache()

    def _check_cache(self) -> None:
        flag = "--cache-backbone"
        if not self.freeze_backbone:
            raise InputError(flag, "needs a backbone that stays as it is", remedy="add --freeze-backbone")
        if self.crop not in (None, self.size):
            raise InputError("--crop", f"cannot stand with {flag}: whole images are stored", remedy="leave it away")
        if self.random_resize not in (_RESIZE, (1.0, 1.0)):
            what = f"cannot stand with {flag}: one size is stored"
            raise InputError("--random-resize", what, remedy="leave it away")

    @property
    def ignored(self) -> int:
        """The value of pixels without a class, once labels are classes."""
        return 255 if self.ignore_index is None else self.ignore_index

    @property
    def peak_lr(self) -> float:
        """`lr`, or the optimizer's default."""
        return _DEFAULTS[self.optimizer][0] if self.lr is None else self.lr

    @property
    def decay(self) -> float:
        """`weight_decay`, or the optimizer's default."""
        return _DEFAULTS[self.optimizer][1] if self.weight_decay is None else self.weight_decay

    def resolved(self) -> Self:
        """The same with numbers where defaults depend on other fields: rate, decay, precision, length, augmentation."""
        whole: dict[str, Any] = {"random_resize": (1.0, 1.0), "photometric": False, "cat_max_ratio": 1.0}
        return replace(
            self,
            **whole if self.cache_backbone else {},
            lr=self.peak_lr,
            weight_decay=self.decay,
            precision=self.precision or _launched_precision(),
            epochs=_EPOCHS if self.epochs is None and self.max_steps is None else self.epochs,
        )

    def scoring(self) -> EvalConfig:
        """How the validation split is scored."""
        return EvalConfig(
            size=self.size, batch_size=self.batch_size, precision=self.precision or "fp32", workers=self.workers
        )

    def calibration(self, split: str | None) -> CalibrationConfig:
        """How the images of a split are measured before the training."""
        return CalibrationConfig(
            samples=self.samples,
            size=self.size,
            split=split,
            batch_size=self.batch_size,
            device=self.device,
            workers=self.workers,
            ignore_index=self.ignore_index,
            reduce_labels=self.reduce_labels,
            colors=self.colors,
            masks_drawn_on=self.masks_drawn_on,
            optimizer=self.optimizer,
            seed=self.seed,
        )


_SMALLEST: dict[str, float] = {
    **dict.fromkeys(("epochs", "max_steps", "batch_size", "accumulate", "num_classes", "samples"), 1),
    **dict.fromkeys(("eval_every", "eval_first", "log_every", "patience"), 1),
    **dict.fromkeys(
        ("weight_decay", "power", "clip", "aux_weight", "seed", "workers", "head_lr_mult", "fusion_lr_mult"), 0
    ),
}


def _launched_precision() -> Precision:
    """What `accelerate launch` was configured with."""
    name = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    known: dict[str, Precision] = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
    if name not in known:
        raise InputError("mixed_precision", "is not served", got=name, expected=", ".join(known))
    return known[name]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
