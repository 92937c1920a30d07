"""Finds the logits among the outputs of a segmentation network; pads images to sizes that it takes."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from equalize.errors import SiteError

MAIN_NAMES = ("out", "logits")
"""Keys under which libraries return what is scored: torchvision, transformers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredOutput:
    """The output of a network that is scored."""

    tensor: Tensor
    """(N, classes, h, w)."""
    name: str
    """Its key or index among several, with ``/`` where they are nested; empty if the network returns it alone."""
    reason: str
    """Why it was taken; empty where there was no choice."""


def named_outputs(output: Any, shape: Sequence[int], name: str = "") -> dict[str, Tensor]:
    """The tensors that can be logits in what a network returns, or a nest of it called ``name``, by key or index.

    Logits have as many axes as the input, of ``shape``, four at least; one axis more is several, stacked along axis 1.
    """
    rank = max(len(shape), 4)
    if isinstance(output, Tensor):
        if output.ndim == rank + 1 and name == "":
            return {str(index): each for index, each in enumerate(output.unbind(1))}
        return {name: output} if output.ndim == rank and output.is_floating_point() else {}
    if _classifies_masks(output):
        return {"logits": _of_masks(output, shape[2:])}
    found: dict[str, Tensor] = {}
    for key, inner in _parts(output):
        for inside, tensor in named_outputs(inner, shape, f"{name}/{key}" if name else key).items():
            if not any(tensor is other for other in found.values()):
                found[inside] = tensor
    return found


def _classifies_masks(output: Any) -> bool:
    """Whether it is of MaskFormer or a successor of it."""
    return getattr(output, "class_queries_logits", None) is not None


def _of_masks(output: Any, size: Sequence[int]) -> Tensor:
    """Scores (N, classes, h, w) of a network that classifies masks, by the rule of transformers' image processors.

    Those of Mask2Former and EoMT upsample masks before the sigmoid, the one to a fixed size, the other to its input's.
    """
    kind = type(output).__name__
    to = (384, 384) if kind.startswith("Mask2Former") else size if kind.startswith("Eomt") else None
    masks_NQhw = output.masks_queries_logits
    if to is not None:
        masks_NQhw = F.interpolate(masks_NQhw, size=tuple(to), mode="bilinear", align_corners=False)
    classes_NQC = output.class_queries_logits.softmax(-1)[..., :-1]
    return torch.einsum("nqc,nqhw->nchw", classes_NQC, masks_NQhw.sigmoid())


def _parts(output: Any) -> Sequence[tuple[str, Any]]:
    if isinstance(output, Mapping):
        return [(str(key), value) for key, value in output.items()]
    if hasattr(output, "_fields"):
        return list(zip(output._fields, output, strict=True))
    if isinstance(output, (tuple, list)):
        return [(str(index), value) for index, value in enumerate(output)]
    if is_dataclass(output):
        return [(field.name, getattr(output, field.name)) for field in fields(output)]
    logits = getattr(output, "logits", None)
    return [] if logits is None else [("logits", logits)]


def scored_output(
    output: Any, architecture: str, shape: Sequence[int], *, chosen: str | None = None, num_classes: int | None = None
) -> ScoredOutput:
    """The output that is scored, of all that a network returned for an input of shape (N, C, H, W).

    ``chosen`` is a key or an index, by ``--output``; ``num_classes`` the network's, if known. A SiteError if there are
    no logits, or several tensors that may be.
    """
    found = named_outputs(output, shape)
    if not found:
        what, expected = "returns no logits", "a tensor (N, classes, h, w)"
        got = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise SiteError(architecture, what, got=got, expected=expected)
    if "" in found:
        name, reason = "", ""
    elif chosen is not None:
        name, reason = _named(found, chosen, architecture), ""
    elif (evident := _evident(found, tuple(shape[2:]), num_classes)) is not None:
        name, reason = evident
    else:
        what, remedy = "returns several outputs that may be the logits", "choose one with --output INDEX or NAME"
        raise SiteError(architecture, what, got=listed(found), remedy=remedy)
    if not (_classifies_masks(output) or _is_of(found[name], shape)):
        what = f"returns logits whose axes are not (N, classes, h, w) for images {tuple(shape)}"
        raise SiteError(architecture, what, got=tuple(found[name].shape), remedy="permute them in its code")
    return ScoredOutput(tensor=found[name], name=name, reason=reason)


def _is_of(tensor: Tensor, shape: Sequence[int]) -> bool:
    """Whether an output can be of such an input: as many images, of about the same proportions."""
    factors = [there / max(1, here) for there, here in zip(shape[2:], tensor.shape[2:], strict=False)]
    return len(tensor) == shape[0] and max(factors, default=1) <= 2 * min(factors, default=1)


def _named(found: Mapping[str, Tensor], chosen: str, architecture: str) -> str:
    if chosen in found or len(found) == 1:
        return chosen if chosen in found else next(iter(found))
    if re.fullmatch(r"-?\d+", chosen) and -len(found) <= int(chosen) < len(found):
        return list(found)[int(chosen)]
    raise SiteError("--output", f"{architecture} returns none that is called {chosen}", expected=listed(found))


def _evident(found: Mapping[str, Tensor], size: tuple[int, ...], num_classes: int | None) -> tuple[str, str] | None:
    """The name of the logits, and why it is them; None where that cannot be known."""
    if len(found) == 1:
        return next(iter(found)), ""
    for name in MAIN_NAMES:
        if name in found:
            return name, ""
    others = [name for name in found if "aux" not in name.lower()]
    if len(others) == 1:
        return others[0], "the others are called auxiliary"
    possible = {name: tensor for name, tensor in found.items() if tensor.shape[1] == num_classes} or found
    if len(possible) == 1:
        return next(iter(possible)), f"the only one of {num_classes} classes"
    whole = [name for name, tensor in possible.items() if tuple(tensor.shape[2:]) == size]
    if len(whole) == 1 and len({tensor.shape[1] for tensor in possible.values()}) == 1:  # deep supervision
        return whole[0], "the only one of the image's size"
    return None


def listed(found: Mapping[str, Tensor]) -> str:
    """Outputs with their shapes, for errors."""
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in found.items())


def round_up(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """The smallest multiples that are no less than (H, W)."""
    height, width = (-(-side // multiple) * multiple for side in size)
    return height, width


def pad_images(x: Tensor, multiple: int, value: float = 0) -> Tensor:
    """Images (*, H, W) padded with 0, the normalized mean, at the right and bottom to sides that are multiples."""
    height, width = x.shape[-2:]
    return _padded_to(x, round_up((height, width), multiple), value)


def logits_of_padded(logits: Callable[[Tensor], Tensor], x_NCHW: Tensor, multiple: int) -> Tensor:
    """Logits (N, classes, h, w) of images (N, C, H, W) as the network gives them; (N, classes, H, W) of padded ones.

    Images whose sides are no multiples of ``multiple`` are padded, and their logits brought to their size and cropped.
    """
    height, width = x_NCHW.shape[2:]
    return logits_at_size(logits, x_NCHW, round_up((height, width), multiple))


def logits_at_size(logits: Callable[[Tensor], Tensor], x_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """As `logits_of_padded`, of images that are padded to ``size``, which is no smaller than they are."""
    padded = _padded_to(x_NCHW, size)
    scores = logits(padded)
    if padded is x_NCHW:
        return scores
    scores = F.interpolate(scores.float(), size=padded.shape[2:], mode="bilinear", align_corners=False)
    return scores[..., : x_NCHW.shape[2], : x_NCHW.shape[3]]


def _padded_to(x: Tensor, size: tuple[int, int], value: float = 0) -> Tensor:
    height, width = x.shape[-2:]
    return x if (height, width) == size else F.pad(x, (0, size[1] - width, 0, size[0] - height), value=value)
