"""The arms of a comparison: which effects each of them has, and which it shares with the others.

none       the model as it is
migrate    \
preserve    } equalized by that strategy, see `equalize.plan.strategies`; `auto` chooses for each site
rescale    /
redrawn    fusion layers drawn anew, not equalized
reinit     fusion layers drawn anew, the same draw, and equalized

An equalized arm may end in +keep-norm (the weights keep their norm: what is left is no larger or smaller effective
learning rate) and in +explicit or +folded (what the optimiser sees, see `equalize.plan.attach`).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from equalize.commands.finetune.config import TrainAs
from equalize.errors import InputError
from equalize.plan.plan import Strategy

__all__ = ["Arm", "baselines", "read_arms"]

_STRATEGIES: dict[str, Strategy] = {
    "auto": "auto",
    "migrate": "migrate",
    "preserve": "preserve",
    "rescale": "rescale",
    "reinit": "reinit",
}
_PLAIN = ("none", "redrawn")
_KEEP_NORM = "keep-norm"
_TRAIN_AS: dict[str, TrainAs] = {"explicit": "explicit", "folded": "folded"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to begin a training.

    Attributes:
        name: as typed, its endings in one order.
        strategy: of the equalization; None where there is none.
        redrawn: whether the fusion layers are drawn anew without being equalized.
        keep_norm: whether equalized weights keep their norm.
        train_as: what the optimiser sees; None leaves the choice to `finetune`.
    """

    name: str
    strategy: Strategy | None = None
    redrawn: bool = False
    keep_norm: bool = False
    train_as: TrainAs | None = None

    @classmethod
    def read(cls, text: str) -> Self:
        """`rescale+keep-norm+explicit`.

        Raises:
            InputError: there is no such arm.
        """
        base, *endings = text.strip().split("+")
        known = {*_TRAIN_AS, _KEEP_NORM}
        ways = [ending for ending in endings if ending in _TRAIN_AS]
        if base not in (*_PLAIN, *_STRATEGIES) or len(set(endings)) < len(endings) or set(endings) - known:
            raise InputError(
                "--arms",
                "has an arm that is unknown",
                got=repr(text),
                expected=f"some of {', '.join((*_PLAIN, *_STRATEGIES))}",
                remedy=f"+{', +'.join(sorted(known))} may stand behind the last five",
            )
        if (base in _PLAIN and endings) or len(ways) > 1:
            raise InputError(
                "--arms",
                f"{text!r} makes no sense",
                remedy="+explicit, +folded, +keep-norm are of one equalized arm, and explicit is not folded",
            )
        ordered = [base, *([_KEEP_NORM] if _KEEP_NORM in endings else []), *ways]
        return cls(
            name="+".join(ordered),
            strategy=_STRATEGIES.get(base),
            redrawn=base == "redrawn",
            keep_norm=_KEEP_NORM in endings,
            train_as=_TRAIN_AS[ways[0]] if ways else None,
        )


def read_arms(texts: Iterable[str]) -> tuple[Arm, ...]:
    """At least two arms, no two the same.

    Raises:
        InputError: there are fewer, or one twice.
    """
    arms = tuple(Arm.read(text) for text in texts)
    names = [arm.name for arm in arms]
    if len(arms) < 2 or len(set(names)) < len(names):
        raise InputError("--arms", "are no two different arms", got=",".join(names), expected="such as none,rescale")
    return arms


def baselines(arms: Iterable[Arm]) -> list[tuple[str, str]]:
    """(arm, what it is compared with): `none`, or else the first arm; and what is re-drawn with `redrawn`.

    An arm that is re-drawn and equalized against one that is not re-drawn shows both effects; against `redrawn` only
    that of equalization.
    """
    arms = list(arms)
    names = [arm.name for arm in arms]
    first = "none" if "none" in names else names[0]
    pairs = [(name, first) for name in names if name != first]
    if "redrawn" in names and first != "redrawn":
        pairs += [(arm.name, "redrawn") for arm in arms if arm.strategy == "reinit" and arm.name != first]
    return pairs
