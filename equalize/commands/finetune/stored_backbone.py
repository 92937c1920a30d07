"""A frozen backbone that returns what it returned before, and which of that the network reads.

N images, F numbers an image: the tensors that are read, flattened and side by side.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from equalize.checkpoint.checkpoint import Checkpoint
from equalize.errors import InputError
from equalize.eval_mode import eval_mode

_FLAG = "--cache-backbone"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBackbone:
    """A backbone and the structure of what it returns."""

    module: nn.Module
    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    """What it returned for two images, flattened: tensors (2, ...) or plain values."""
    read: tuple[int, ...]
    """The places of the leaves that the network reads."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, path: str, images_2CHW: Tensor) -> "StoredBackbone":
        """Runs the network on two images, as in training with its backbone frozen, and as scored.

        An InputError if it does more with its images than running the backbone once.
        """
        model, module = checkpoint.model, checkpoint.model.get_submodule(path)
        read = set[int]()
        with eval_mode(model):
            for training in (True, False):
                model.train(training)
                module.eval()
                outputs, leaves, spec = _observe(checkpoint, module, images_2CHW)
                run = functools.partial(_run, checkpoint, torch.zeros_like(images_2CHW), module, spec)
                read |= _find_read(run, outputs, leaves)
        return cls(module=module, spec=spec, leaves=tuple(leaves), read=tuple(sorted(read)))

    @property
    def shapes(self) -> list[list[int]]:
        """Those of the leaves that are read, without the images' axis."""
        return [list(self.leaves[place].shape[1:]) for place in self.read]

    def run(self, model: nn.Module, images_NCHW: Tensor) -> Tensor:
        """What the network reads, (N, F) float32 on the CPU; the caller has it in eval mode."""
        with _recorded(self.module, stop=True) as returned, contextlib.suppress(_Done):
            model(images_NCHW)
        leaves = pytree.tree_leaves(returned[0])
        return torch.cat([leaves[place].float().flatten(1) for place in self.read], dim=1).cpu()

    @contextmanager
    def returning(self, features_NF: Tensor) -> Iterator[None]:
        """The backbone returns stored outputs, whatever it is called with; zeros in place of what is not read."""
        leaves = list(self.leaves)
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                leaves[place] = features_NF.new_zeros(()).expand(len(features_NF), *leaf.shape[1:])
        parts = torch.split(features_NF, [math.prod(shape) for shape in self.shapes], dim=1)
        for place, shape, part in zip(self.read, self.shapes, parts, strict=True):
            leaves[place] = part.reshape(-1, *shape)
        with _forward_of(self.module, lambda *_, **__: pytree.tree_unflatten(leaves, self.spec)):
            yield


class _Done(BaseException):
    """Raised when the backbone was run: the rest of the forward pass is not needed."""


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replaces `forward` of this instance, under the signature that it has, which transformers looks at."""
    before = vars(module).get("forward")
    module.__dict__["forward"] = functools.wraps(module.forward)(forward)
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


@contextmanager
def _recorded(module: nn.Module, *, stop: bool) -> Iterator[list[Any]]:
    """What the module returns, call by call."""
    returned: list[Any] = []
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        returned.append(original(*args, **kwargs))
        if stop:
            raise _Done
        return returned[-1]

    with _forward_of(module, forward):
        yield returned


def _heads(checkpoint: Checkpoint, images_NCHW: Tensor) -> list[Tensor]:
    torch.manual_seed(0)  # of dropout; `eval_mode` restores the random state
    return list(checkpoint.adapter.heads(checkpoint.model, images_NCHW).values())


def _observe(
    checkpoint: Checkpoint, module: nn.Module, images_2CHW: Tensor
) -> tuple[list[Tensor], list[Any], pytree.TreeSpec]:
    """The outputs that carry a loss, and what the backbone returns, flattened."""
    with _recorded(module, stop=False) as returned:
        outputs = _heads(checkpoint, images_2CHW)
    if len(returned) != 1:
        what = f"the network runs its backbone {len(returned)} times an image"
        raise InputError(_FLAG, what, expected="once", remedy="leave it away")
    leaves, spec = pytree.tree_flatten(returned[0])
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors or not all(each.ndim and len(each) == 2 and each.is_floating_point() for each in tensors):
        what = "the backbone returns something else than features of each image"
        raise InputError(_FLAG, what, got=type(returned[0]).__name__, remedy="leave it away")
    return outputs, leaves, spec


def _run(
    checkpoint: Checkpoint, blank_2CHW: Tensor, module: nn.Module, spec: pytree.TreeSpec, leaves: Sequence[Any]
) -> list[Tensor]:
    """The outputs that carry a loss where the backbone returns these leaves and the images are blank."""
    with _forward_of(module, lambda *_, **__: pytree.tree_unflatten(list(leaves), spec)):
        return _heads(checkpoint, blank_2CHW)


def _find_read(run: Callable[[Sequence[Any]], list[Tensor]], outputs: list[Tensor], leaves: list[Any]) -> set[int]:
    """The places of leaves with a gradient; of all tensors if others turn out to matter.

    Raises:
        InputError: outputs depend on the images as well.
    """
    tensors = {place: leaf for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    with torch.enable_grad():
        given = {place: leaf.detach().requires_grad_() for place, leaf in tensors.items()}
        outputs_of_given = run([given[place].clone() if place in given else leaf for place, leaf in enumerate(leaves)])
        total = torch.stack([each.sum() for each in outputs_of_given]).sum()
        gradients = torch.autograd.grad(total, list(given.values()), allow_unused=True)
    reached = {place for place, gradient in zip(given, gradients, strict=True) if gradient is not None}
    for read in (reached, set(tensors)):
        others = tensors.keys() - read
        again = run(
            [torch.full_like(leaf, torch.nan) if place in others else leaf for place, leaf in enumerate(leaves)]
        )
        if all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(again, outputs, strict=True)):
            return read
    raise InputError(_FLAG, "the network reads its images outside its backbone as well", remedy="leave it away")
