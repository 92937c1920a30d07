"""Verifies what can be verified of a model that was trained after it was calibrated.

Training changes every weight, so nothing is left to compare with what the plan makes of the original. What still holds
is that it is the same network: its keys and shapes, that its library loads it, and from which weights it was made.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from equalize.checkpoint.fill import check_finite, only_class_count
from equalize.checkpoint.loading import ModelName, reload
from equalize.commands.verify import as_planned
from equalize.errors import NumericsError
from equalize.messages import first_of
from equalize.plan.apply import demand_fit
from equalize.plan.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedCheck:
    """A trained model beside the one that it was made of."""

    source: str
    """What the training started from, as it was typed."""
    step: int | None
    """The step that the weights are of."""
    role: str
    """What the other model is: "calibrated" or "trained"; both where it was calibrated as the training began."""
    tensors: int
    changed: int
    """How many of the tensors have other values than in the other model."""
    new_classifier: tuple[str, ...]
    """Keys whose number of classes is another one."""

    def to_json(self) -> dict[str, Any]:
        """What stands under "trained" in the object of `verify --json`."""
        return asdict(self) | {"new_classifier": list(self.new_classifier)}


def verify_trained(out: str | Path, name: ModelName, plan: Plan) -> TrainedCheck:
    """Compares a trained model, as `finetune` wrote it to `out`, with what was calibrated or the training started from.

    A NumericsError if it is another network, or the other model is none that it was made of.
    """
    original = as_planned(name, plan).load()
    demand_fit(plan, original.model)
    finetuned = plan.facts["finetuned"] or {}
    roles = {"calibrated": plan.facts.get("sha256"), "trained": finetuned.get("sha256")}
    role = " and ".join(role for role, sha256 in roles.items() if sha256 == original.sha256)
    if not role:
        what = f"is not what {out} was made of: its weights have another sha256 than was recorded"
        remedy = "give the model that was calibrated, or the one that was trained"
        raise NumericsError(name.source, what, remedy=remedy)
    written = reload(out, name.arch, name.arch_args)
    check_finite(written.state_dict(), out)
    before, after = _tensors(original.model), _tensors(written)
    other = {key: (after[key].shape, tensor.shape) for key, tensor in before.items() if key in after}
    other = {key: shapes for key, shapes in other.items() if shapes[0] != shapes[1]}
    if before.keys() != after.keys() or not only_class_count(other, None):
        differing = sorted((before.keys() ^ after.keys()) or other)
        what = f"has other tensors or shapes than {name.source} ({first_of(differing)})"
        raise NumericsError(out, what, remedy="is it the model that was trained?")
    return TrainedCheck(
        source=str(finetuned.get("source")),
        step=finetuned.get("step"),
        role=role,
        tensors=len(before),
        changed=sum(key in other or not torch.equal(before[key], after[key]) for key in before),
        new_classifier=tuple(other),
    )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
