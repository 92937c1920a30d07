"""Flags in groups: a command takes one dataclass where it would repeat each of its fields."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from equalize.cli import options as o

if TYPE_CHECKING:
    from equalize.checkpoint import ModelName
    from equalize.commands.images import CalibrationConfig

__all__ = ["ArchFlags", "ImageFlags", "ModelFlags", "grouped"]


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Shows Typer the fields of every parameter that is a dataclass as parameters of the command itself.

    Args:
        command: its signature, Typer's annotations in it, is what the command line offers, in that order.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            parameters += _parameters_of(groups[name])
        else:
            keyword = inspect.Parameter.KEYWORD_ONLY
            parameters.append(parameter.replace(kind=keyword, annotation=hints[name]))

    @functools.wraps(command)
    def flat(**values: Any) -> None:
        made = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**values, **made)

    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {each.name: each.annotation for each in parameters}
    del flat.__wrapped__  # Typer would look through it
    return flat


def _parameters_of(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchFlags:
    """What builds the network of a state dict."""

    arch: o.Arch = None
    arch_arg: o.ArchArgs = None

    def name(self, source: str) -> "ModelName":
        """The model that `source` names, as these flags have it."""
        return o.read_name(source, arch=self.arch, arch_args=self.arch_arg)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFlags:
    """What builds the network, and what is drawn where the checkpoint lacks it."""

    arch: o.Arch = None
    arch_arg: o.ArchArgs = None
    init_missing: o.InitMissing = False
    num_classes: o.NumClasses = None
    seed: o.Seed = 0

    def name(self, source: str) -> "ModelName":
        """The model that `source` names, as these flags have it."""
        return o.read_name(
            source,
            arch=self.arch,
            arch_args=self.arch_arg,
            init_missing=self.init_missing,
            num_classes=self.num_classes,
            seed=self.seed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFlags:
    """Which images are measured, and how."""

    samples: o.Samples = None
    tolerance: o.Tolerance = None
    size: o.Size = None
    split: o.Split = None
    batch_size: o.MaybeBatchSize = None
    device: o.Device = "auto"
    precision: o.Precision = o.PrecisionName.FP32
    workers: o.MaybeWorkers = None
    skip_bad: o.SkipBad = 0.0

    def read(self, seed: int) -> "CalibrationConfig":
        """These flags, their values checked."""
        return o.read_calibration(seed=seed, **{field.name: getattr(self, field.name) for field in fields(self)})
