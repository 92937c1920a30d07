"""Whether a network gets the input that it was trained on, as far as its BatchNorms can tell."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from equalize.checkpoint.checkpoint import Checkpoint
from equalize.checkpoint.preprocess import PREPROCESS_FLAGS
from equalize.errors import InputError
from equalize.messages import Notify
from equalize.moments.input_variances import VarianceCheck, check_variances


@dataclass(frozen=True, slots=True, kw_only=True)
class InputCheck:
    """What the BatchNorms say of a checkpoint's input."""

    checkpoint: Checkpoint
    found: VarianceCheck

    def to_json(self) -> dict[str, Any] | None:
        """The check in a plan; None where no BatchNorm could tell."""
        return asdict(self.found) if self.found.norms else None

    def report(self, notify: Notify, warn: Notify) -> None:
        """A line about the input: a note, or a warning that it is wrong."""
        if self.found.is_wrong:
            warn(f"{self.checkpoint.source}: {self._what()}; say how it was trained: {PREPROCESS_FLAGS}")
        elif not self.found.norms:
            notify("input: not checked, for no BatchNorm remembers the values of its training")
        else:
            notify(f"input: as in training; {self._figures()}")

    def demand_right(self) -> None:
        """Refuses an input that is not the one that the network was trained on, by an InputError."""
        if self.found.is_wrong:
            remedy = f"say how it was trained, {PREPROCESS_FLAGS}, or go on with --force-preprocessing"
            raise InputError(self.checkpoint.source, self._what(), remedy=remedy)

    def _what(self) -> str:
        return (
            f"does not get the input that it was trained on ({self.checkpoint.preprocess.numbers}): {self._figures()}"
        )

    def _figures(self) -> str:
        typical, first = (10**each for each in (self.found.deviation, self.found.first))
        return (
            f"variances at {self.found.norms} BatchNorms differ by a factor of {typical:.3g} from those of training "
            f"(usual: up to 10), at the first by {first:.3g} (usual: up to 100)"
        )


def check_input(checkpoint: Checkpoint, images: Sequence[Tensor]) -> InputCheck:
    """Compares what the BatchNorms of a checkpoint see in a few images (N, C, H, W) with what they were trained on."""
    return InputCheck(checkpoint=checkpoint, found=check_variances(checkpoint.model, images))
