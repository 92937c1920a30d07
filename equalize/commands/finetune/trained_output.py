"""Finds, among what a network returns in training, the output that is scored, and the logits behind it."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from equalize.checkpoint.activations import Activations
from equalize.checkpoint.checkpoint import Checkpoint
from equalize.checkpoint.outputs import MAIN_NAMES, listed
from equalize.errors import InputError
from equalize.eval_mode import eval_mode, refusing, set_containers_training

_SAME = 1e-3  # of the range of an output: kernels on the same values agree far better, two heads never do so well


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedOutput:
    """Which of a network's outputs the loss is computed on."""

    name: str
    """See `Family.heads`."""
    auxiliary: tuple[str, ...] = ()
    """Others of as many classes, which carry the loss of auxiliary heads."""
    before_activation: bool = False
    """Whether it is a sigmoid's or softmax's, and the loss takes what that was given."""

    def of(self, checkpoint: Checkpoint, network: nn.Module, x_NCHW: Tensor) -> list[Tensor]:
        """The logits that carry a loss, each (N, classes, h, w), the scored ones first."""
        if not self.before_activation:
            found = checkpoint.adapter.heads(network, x_NCHW)
        else:
            with Activations() as seen:
                found = _logits(checkpoint.adapter.heads(network, x_NCHW), seen)
        return [found[name] for name in (self.name, *self.auxiliary)]


def _logits(found: Mapping[str, Tensor], seen: Activations) -> dict[str, Tensor]:
    """Outputs as they were before a sigmoid or softmax."""
    before = {name: seen.before(tensor) for name, tensor in found.items()}
    return {name: tensor if (given := before[name]) is None else given for name, tensor in found.items()}


def trained_output(checkpoint: Checkpoint, x_NCHW: Tensor) -> TrainedOutput:
    """Finds the output that a network gives in eval mode among those of its training mode, by its values.

    Some networks return auxiliary outputs in training alone, in any order. For the comparison, layers that compute
    something else in training stay in eval mode. An InputError if it cannot be found or trained.
    """
    network = checkpoint.model
    if "mask_labels" in inspect.signature(network.forward).parameters:
        what, expected = "is trained by matching masks, which is not supported yet", "logits for every pixel"
        raise InputError(checkpoint.architecture, what, expected=expected)
    with eval_mode(network), Activations() as seen:
        scored = checkpoint.scored(network(x_NCHW), x_NCHW)
        logits = seen.before(scored.tensor)
        found = _in_training(checkpoint, x_NCHW)
        same = [each for each, tensor in found.items() if _is(tensor, scored.tensor) or _is(tensor, logits)]
        possible = same or list(found)
        known = (*MAIN_NAMES, checkpoint.output, scored.name)
        name = next((each for each in known if each in possible), possible[0] if len(possible) == 1 else None)
        if name is None:
            what = "returns other outputs in training, and by their values none or several may be the scored one"
            remedy = "choose one with --output INDEX or NAME"
            raise InputError(checkpoint.architecture, what, got=listed(found), remedy=remedy)
        if not found[name].requires_grad:
            what = "cannot be trained: all its parameters are frozen, or it is run without gradients"
            raise InputError(
                checkpoint.architecture, what, remedy="take requires_grad_ and torch.no_grad out of its code"
            )
        before = seen.before(found[name])
        found = found if before is None else _logits(found, seen)
    if before is None and checkpoint.threshold and not _is(found[name], logits):
        what = "ends in probabilities, and no sigmoid or softmax that could be taken off for the loss was found"
        raise InputError(checkpoint.architecture, what, remedy="train it without its last activation")
    classes = found[name].shape[1]
    scored_classes = max(2, scored.tensor.shape[1])
    if before is not None and max(2, classes) != scored_classes:
        what = f"leaves out classes of its {seen.name(scored.tensor)}, and which labels they have is not known"
        got, remedy = f"{scored_classes} of {classes}", "train it without its last activation"
        raise InputError(checkpoint.architecture, what, got=got, remedy=remedy)
    auxiliary = tuple(each for each, tensor in found.items() if each != name and tensor.shape[1] == classes)
    return TrainedOutput(name=name, auxiliary=auxiliary, before_activation=before is not None)


def _in_training(checkpoint: Checkpoint, x_NCHW: Tensor) -> dict[str, Tensor]:
    """The outputs where the code of containers sees training mode; the caller restores the modes."""
    network = checkpoint.model
    set_containers_training(network)

    def refusal(why: str) -> InputError:  # of the network's code, which may want targets for example
        what = f"cannot be run in training mode on images alone ({why})"
        return InputError(checkpoint.architecture, what, expected="outputs that a loss can be computed on")

    with torch.enable_grad(), refusing(refusal):
        return checkpoint.adapter.heads(network, x_NCHW)


def _is(one: Tensor, other: Tensor | None) -> bool:
    """Whether two outputs have the same values, to rounding."""
    if other is None or one.shape != other.shape:
        return False
    one, other = one.detach(), other.detach()
    extent = float(other.max() - other.min())
    return float((one - other).abs().max()) <= _SAME * max(extent, 1e-6)
