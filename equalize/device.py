"""Devices and precisions by name."""

import torch

from equalize.errors import InputError, ResourceError

_PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def device_of(name: str) -> torch.device:
    """The device of that name; "auto" is the accelerator if there is one.

    An InputError if no device has that name, a ResourceError if it is not available.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError("--device", "is no device", got=name, expected="auto, cpu, cuda, cuda:0, mps") from error
    if device.type not in {"cpu", getattr(accelerator, "type", "cpu")}:
        raise ResourceError("--device", f"there is no {device.type} device here", remedy="use --device cpu")
    return device


def precision_of(name: str, device: torch.device) -> torch.autocast:
    """A context for forward passes in that precision; moments are float32 and float64 in any.

    Raises:
        InputError: no precision has that name.
    """
    if name not in _PRECISIONS:
        raise InputError("--precision", "is unknown", got=name, expected=" or ".join(_PRECISIONS))
    dtype = _PRECISIONS[name]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
