"""What is compared on what, settled before the first run: arms, rates, seeds, and the settings they share."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from equalize.checkpoint.load import ModelName
from equalize.commands.compare.arms import Arm
from equalize.commands.finetune.config import Recipe
from equalize.commands.finetune.splits import open_splits
from equalize.data import DataSet
from equalize.errors import DataError, InputError

__all__ = ["Run", "Setup", "demand_same"]

_OF_A_RUN = {"lr", "seed", "calibrate", "keep_norm"}
_ANY_VALUE_RESUMES = {"workers", "report_to"}
_EXTENDED = ("arms", "lrs", "seeds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training of a comparison."""

    arm: Arm
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.arm.name}_lr{self.rate:g}_seed{self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A comparison.

    Attributes:
        name: the model; its seed is that of the run.
        data: a data set with masks.
        recipe: of every run, but for its rate, its seed and its equalization; counts steps.
        train, val: the splits.
        arms, rates, seeds: one training for each combination.
    """

    name: ModelName
    data: str
    recipe: Recipe
    train: DataSet
    val: DataSet
    arms: tuple[Arm, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]

    @classmethod
    def make(
        cls,
        name: ModelName,
        data: str,
        recipe: Recipe,
        *,
        arms: tuple[Arm, ...],
        rates: tuple[float, ...] = (),
        seeds: int = 3,
        evaluations: int = 10,
        say: Callable[[str], None] = lambda line: None,
    ) -> Self:
        """Opens the data, counts the steps, and says when they are scored.

        Args:
            name, data: see `finetune`.
            recipe: see `finetune`.
            arms: from `read_arms`.
            rates: of the sweep; the recipe's own if empty.
            seeds: how many, from the recipe's own on.
            evaluations: of each run, evenly spaced; one more after the first tenth where it is not among them.
            say: called with a line for the user.

        Raises:
            DataError: there is no validation split. InputError: a setting that a comparison cannot have.
        """
        for field in ("calibrate", "patience", "eval_every", "eval_first"):
            if getattr(recipe, field) is not None:
                raise InputError(field, "cannot be set in a comparison", remedy="leave it out of the configuration")
        if len(set(rates)) < len(rates) or not all(0 < rate < float("inf") for rate in rates):
            raise InputError("--lrs", "are no different learning rates", got=rates, expected="such as 1e-4,3e-4,1e-3")
        if seeds < 1 or evaluations < 1:
            raise InputError("--seeds" if seeds < 1 else "--evaluations", "is too small", expected="at least 1")
        found = open_splits(data, recipe, say)
        if found.val is None:
            raise DataError(data, "has no validation split: runs could not be compared", remedy="add one")
        recipe = recipe.resolved()
        batches = max(1, found.train.pairs // recipe.batch_size)  # as `trainer.arguments` has them
        steps = recipe.max_steps or (recipe.epochs or 1) * -(-batches // recipe.accumulate)
        assert recipe.lr is not None
        timed = replace(
            recipe,
            epochs=None,
            max_steps=steps,
            eval_every=max(1, round(steps / evaluations)),
            eval_first=max(1, round(steps / 10)),
        )
        return cls(
            name=name,
            data=data,
            recipe=timed,
            train=found.train,
            val=found.val,
            arms=arms,
            rates=rates or (recipe.lr,),
            seeds=tuple(range(recipe.seed, recipe.seed + seeds)),
        )

    @property
    def runs(self) -> list[Run]:
        """Seed after seed, so that what is there of an unfinished comparison are whole pairs."""
        return [Run(arm=arm, rate=rate, seed=seed) for seed in self.seeds for rate in self.rates for arm in self.arms]

    def recipe_of(self, run: Run) -> Recipe:
        """How a run is trained."""
        arm = run.arm
        return replace(
            self.recipe,
            lr=run.rate,
            seed=run.seed,
            calibrate=arm.strategy,
            keep_norm=arm.keep_norm,
            train_as=(arm.train_as or self.recipe.train_as) if arm.strategy else None,
        )

    def settings(self) -> dict[str, Any]:
        """What a comparison that goes on must have in common with this one; more arms, rates and seeds may come."""
        recipe = asdict(self.recipe)
        return {
            "source": self.name.source,
            "arch": self.name.arch,
            "arch_args": dict(self.name.arch_args),
            "init_missing": self.name.init_missing,
            "num_classes": self.name.num_classes,
            "train": self.train.fingerprint(),
            "val": self.val.fingerprint(),
            **{key: value for key, value in recipe.items() if key not in _OF_A_RUN | _ANY_VALUE_RESUMES},
            "arms": [arm.name for arm in self.arms],
            "lrs": list(self.rates),
            "seeds": list(self.seeds),
        }


def demand_same(place: Path, now: Mapping[str, Any]) -> None:
    """Compares with the settings that were written there.

    Raises:
        InputError: they differ, or an arm, a rate or a seed of theirs is no longer among these.
    """
    before = json.loads(place.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(now))
    differing = [key for key in now if key not in _EXTENDED and before.get(key) != now[key]]
    differing += [key for key in _EXTENDED if not set(before.get(key, ())) <= set(now[key])]
    if differing:
        facts = "; ".join(f"{key} was {before.get(key)!r}, now {now[key]!r}" for key in differing[:3])
        raise InputError(
            place.parent, f"holds a comparison with other settings: {facts}", remedy="repeat them, or name another OUT"
        )
