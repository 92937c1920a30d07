"""What a network takes, found by trying it: how many channels, how many axes of space, and which sizes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from equalize.checkpoint.checkpoint import Checkpoint
from equalize.checkpoint.outputs import round_up
from equalize.checkpoint.preprocess import Preprocess
from equalize.data.bands import picture_size, read_picture
from equalize.data.images import Item
from equalize.errors import DataError, InputError
from equalize.eval_mode import eval_mode
from equalize.messages import Notify, ignore

Size = tuple[int, int]

_MULTIPLES = (1, 2, 4, 7, 8, 14, 16, 32, 64, 128)  # strides of U-Nets, patches of transformers
_SMALL = 64  # pixels a side of the images that sizes are tried with, at least
_ANY = (512, 512)
_LAYERS = {"linear", "batch_norm", "convolution", "conv1d", "conv2d", "conv3d"}
_GROUPS = {"convolution": 8}  # the place of that argument; 6 in the others
_AXES = {1: "sequences (N, C, L)", 3: "volumes (N, C, D, H, W)"}


@dataclass(frozen=True, slots=True, kw_only=True)
class InputAxes:
    """The axes of a network's input: `channels`, and how many of `space`."""

    channels: int = 3
    space: int = 2


class _Found(BaseException):
    """Raised at the first layer: the rest of the forward pass is not needed."""

    def __init__(self, axes: InputAxes) -> None:
        self.axes = axes


class _FirstLayer(TorchFunctionMode):
    """Ends a forward pass on three channels at its first layer, whose weight says how many it takes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        name = getattr(func, "__name__", "").split(".")[0]
        second = "running_mean" if name == "batch_norm" else "weight"
        data, weight = (
            args[place] if place < len(args) else given.get(key) for place, key in enumerate(("input", second))
        )
        if name in _LAYERS and isinstance(data, Tensor) and isinstance(weight, Tensor):
            place = _GROUPS.get(name, 6)
            raise _Found(_axes(name, data, weight, given.get("groups", args[place] if place < len(args) else 1)))
        return func(*args, **given)


def _axes(name: str, data: Tensor, weight: Tensor, groups: int) -> InputAxes:
    """The axes that a layer expects, whose input of three channels may have been rearranged on the way."""
    if name == "linear":  # over patches
        got, expected, space = data.shape[-1], weight.shape[-1], 2
    elif name == "batch_norm":
        got, expected, space = data.shape[1], len(weight), 2
    else:
        got, expected, space = data.shape[1], weight.shape[1] * groups, weight.ndim - 2
    return InputAxes(channels=expected if 3 * expected % got else 3 * expected // got, space=space)


def axes_of(model: nn.Module, size: Size | None) -> InputAxes:
    """The axes of a network's input: from the first layer that it calls, else from the first that it registers.

    It may be on the meta device, is run up to its first layer on an image of `size` (H, W), and left as it was.
    """
    device = next((tensor.device for tensor in nn.Module.parameters(model)), torch.device("cpu"))
    layers = [each for each in nn.Module.modules(model) if isinstance(each, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    first = InputAxes(channels=layers[0].in_channels, space=len(layers[0].kernel_size)) if layers else InputAxes()
    try:
        with eval_mode(model, attributes=True), _FirstLayer():
            model(torch.zeros(1, 3, *(size or _ANY), device=device))
    except _Found as found:
        return found.axes
    except Exception:  # the network's code may raise anything: transformers compares the channels before that
        return first
    return first


def fit_input(
    checkpoint: Checkpoint,
    images: Sequence[Item],
    size: Size | None,
    notify: Notify = ignore,
    *,
    skip_bad: float | None = None,
) -> Checkpoint:
    """The checkpoint with what its network takes: the channels, and a multiple that images are padded to.

    An InputError if it takes no images, or none of that size, or only those of one size.

    Args:
        images: that it is going to see; with `skip_bad` above 0 the first may be unreadable.
        size: (H, W) that they are brought to; the checkpoint's, else their own, if None.
    """
    size = size or checkpoint.preprocess.size
    axes = axes_of(checkpoint.model, size)
    if axes.space != 2:
        what = f"takes {_AXES.get(axes.space, 'no images')}, which the commands do not read"
        raise InputError(checkpoint.architecture, what, remedy="use equalize.calibrate() in Python")
    checkpoint = replace(checkpoint, preprocess=_for_channels(checkpoint.preprocess, axes.channels))
    multiple = _smallest_multiple(checkpoint)
    if multiple == 1 or (multiple and size and round_up(size, multiple) == size):
        return replace(checkpoint, multiple=multiple)
    own = size or _first_size(images, axes.channels, skip_bad)
    height, width = round_up(own, 64)
    refusal = _refusal(checkpoint, size or (height + 1, width - 1))  # odd on all levels, see `_smallest_multiple`
    if refusal is None:  # it refuses small images alone
        return replace(checkpoint, multiple=1)
    if multiple:
        what = f"{size[0]}x{size[1]} is" if size else "images of other sizes are"
        notify(
            f"{checkpoint.architecture} takes sides that are multiples of {multiple}: {what} padded on the right and "
            "below, and logits are cropped back"
        )
        return replace(checkpoint, multiple=multiple)
    _demand_one_size(checkpoint, images, own, refusal if size else _refusal(checkpoint, own))
    return checkpoint


def _for_channels(preprocess: Preprocess, channels: int) -> Preprocess:
    """The preprocessing for so many channels; a guess for three becomes one for all.

    Raises:
        InputError: the means or deviations are those of another number of channels.
    """

    def fitting(name: str, values: tuple[float, ...]) -> tuple[float, ...]:
        if len(values) in (1, channels):
            return values
        if name in preprocess.given or not preprocess.assumed:
            what = f"is not one number for each of {channels} channels ({preprocess.origin})"
            remedy = f"give {channels} numbers, or one for all, or none"
            raise InputError(f"--{name}", what, got=f"{len(values)} numbers", remedy=remedy)
        return (sum(values) / len(values),)

    if "channels" in preprocess.given and preprocess.channels == "BGR" and channels != 3:
        raise InputError("--channel-order", f"is that of three channels, and the network takes {channels}")
    mean, std = fitting("mean", preprocess.mean), fitting("std", preprocess.std)
    return replace(preprocess, mean=mean, std=std, bands=channels)


def _smallest_multiple(checkpoint: Checkpoint) -> int | None:
    """The smallest number whose multiples the network takes as sides, tried on small images; None if there is none.

    Sides are it times an odd number. Of one the halves stay odd however often they are rounded up, of the other where
    they are rounded down: a network that halves either way and needs even numbers on some level refuses one of them.
    """
    for multiple in _MULTIPLES:
        halvings = max(2, math.ceil(math.log2(_SMALL / multiple)))
        odd_up, odd_down = 2**halvings + 1, 2 ** (halvings + 1) - 1
        if _refusal(checkpoint, (odd_up * multiple, odd_down * multiple)) is None:
            return multiple
    return None


def _refusal(checkpoint: Checkpoint, size: Size) -> str | None:
    """Why the network takes no image of a size; None if it does."""
    model = checkpoint.model
    device = next((tensor.device for tensor in nn.Module.parameters(model)), torch.device("cpu"))
    try:
        with eval_mode(model, attributes=True):
            model(torch.zeros(1, checkpoint.preprocess.bands, *size, device=device))
    except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # smp refuses sizes that 32 does not divide, others fail at a concat or wherever they do
        if "allocate" in str(error):
            raise
        return " ".join(str(error).split())[:120] or type(error).__name__
    return None


def _demand_one_size(checkpoint: Checkpoint, images: Sequence[Item], own: Size, refusal: str | None) -> None:
    """Refuses images that the network does not take, of which nothing but one size is known that it does."""
    bands = checkpoint.preprocess.bands
    if refusal is None and checkpoint.preprocess.size is None:
        other = next((item for item in images if _first_size([item], bands, 1.0, own) != own), None)
        if other is None:
            return
        what = f"{checkpoint.architecture} takes {own[0]}x{own[1]} and few other sizes, and {other} has another"
        raise InputError("--size", what, remedy=f"bring all images to --size {own[0]}x{own[1]}")
    if refusal is None:
        return
    raise size_error(checkpoint, own, refusal)


def size_error(checkpoint: Checkpoint, size: Size, reason: str) -> InputError:
    """The error for images of a size that a network does not take."""
    near = tuple(max(1, round(side / 32)) * 32 for side in size)
    what = f"{checkpoint.architecture} takes no images of {size[0]}x{size[1]} ({reason})"
    if near == size:
        remedy = "where it is no matter of size, name a factory whose network takes images (N, C, H, W) alone"
        return InputError(checkpoint.source, what, remedy=remedy)
    return InputError("--size", what, remedy=f"try --size {near[0]}x{near[1]}")


def _first_size(images: Sequence[Item], channels: int, skip_bad: float | None, otherwise: Size = _ANY) -> Size:
    """(H, W) of the first image that can be read."""
    for item in images:
        try:
            return picture_size(read_picture(item, channels))
        except DataError:
            if not skip_bad:
                raise
    return otherwise
