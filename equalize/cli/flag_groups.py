"""Flags in groups: a command takes one dataclass where it would repeat each of its fields."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from equalize.cli import options as o

if TYPE_CHECKING:
    from equalize.checkpoint.loading import ModelName
    from equalize.checkpoint.preprocess import Override
    from equalize.commands.calibration_config import CalibrationConfig


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Shows Typer the fields of every parameter that is a dataclass as parameters of the command itself."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(kind=keyword, annotation=hints[name]))
            continue
        inside = get_type_hints(groups[name], include_extras=True)
        parameters += [
            inspect.Parameter(field.name, keyword, default=field.default, annotation=inside[field.name])
            for field in fields(groups[name])
        ]

    @functools.wraps(command)
    def flat(**values: Any) -> None:
        made = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**values, **made)

    del flat.__wrapped__  # Typer would unwrap it
    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {each.name: each.annotation for each in parameters}
    return flat


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchFlags:
    """Flags that define the network of a state dict."""

    arch: o.Arch = None
    arch_args: o.ArchArgs = None
    key: o.Key = None
    output: o.Output = None

    def name(self, source: str, **others: Any) -> "ModelName":
        """A `ModelName` of `source`, these flags and further fields."""
        from equalize.checkpoint.loading import ModelName

        return ModelName(source=source, **{**asdict(self), "arch_args": dict(self.arch_args or ())}, **others)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFlags(ArchFlags):
    """Flags that define the network, and whether missing parts are initialized."""

    init_missing: o.InitMissing = False
    num_classes: o.NumClasses = None
    seed: o.Seed = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessFlags:
    """Flags that say how images become the network's input."""

    mean: o.Mean = None
    std: o.Std = None
    rescale: o.Rescale = None
    channel_order: o.ChannelOrder = None

    def override(self) -> "Override":
        """The flags as an `Override` of the checkpoint's preprocessing."""
        from equalize.checkpoint.preprocess import Override

        orders: dict[str | None, Literal["RGB", "BGR"]] = {"rgb": "RGB", "bgr": "BGR"}
        return Override(mean=self.mean, std=self.std, rescale=self.rescale, channels=orders.get(self.channel_order))


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardFlags:
    """The fields of `ForwardConfig`."""

    size: o.Size = None
    sliding_window: o.SlidingWindow = False
    batch_size: o.ForwardBatchSize = 8
    device: o.Device = "auto"
    precision: o.Precision = "fp32"
    workers: o.Workers = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFlags:
    """Flags of the images that are measured."""

    samples: o.Samples = "256"
    tolerance: o.Tolerance = 0.05
    size: o.Size = None
    split: o.Split = None
    batch_size: o.BatchSize = None
    device: o.Device = "auto"
    precision: o.Precision = "fp32"
    workers: o.Workers = None
    skip_bad: o.SkipBad = 0.0
    ignore_index: o.IgnoreIndex = None
    reduce_labels: o.ReduceLabels = "auto"
    colors: o.Colors = None
    masks_drawn_on: o.DrawnOn = "auto"
    optimizer: o.Optimizer = "adamw"
    max_pixels: o.MaxPixels = None

    def config(self, seed: int) -> "CalibrationConfig":
        """The flags as a `CalibrationConfig`."""
        from equalize.commands.calibration_config import CalibrationConfig

        given = asdict(self)
        del given["max_pixels"]  # in effect by itself
        return CalibrationConfig(**given, seed=seed)
