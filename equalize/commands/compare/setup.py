"""The setup of a comparison: arms, rates, seeds, and the settings that all runs share."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from equalize.checkpoint.loading import ModelName
from equalize.commands.compare.arms import Arm
from equalize.commands.finetune.config import TrainConfig
from equalize.commands.finetune.dry_run import steps_of
from equalize.commands.finetune.run_directory import demand_same
from equalize.commands.finetune.splits import open_splits
from equalize.data.dataset import DataSet, open_data
from equalize.errors import DataError, InputError
from equalize.messages import Notify, ignore

_OF_NAME = ("source", "arch", "arch_args", "key", "output", "init_missing", "num_classes")
_SET_BY_RUN = {"lr", "seed", "calibrate"}
_MAY_CHANGE = {"cache_dir", "workers", "report_to"}
_MAY_GROW = frozenset({"arms", "lrs", "seeds", "confirm_seeds"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training of a comparison."""

    arm: Arm
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.arm.name}_lr{self.rate:g}_seed{self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A comparison: one training for each arm, rate and seed."""

    name: ModelName
    """The seed is replaced by that of each run."""
    data: str
    config: TrainConfig
    """Of every run, except rate, seed and equalization; its length is in steps."""
    train: DataSet
    val: DataSet
    arms: tuple[Arm, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    """Of every arm and rate."""
    confirm_seeds: tuple[int, ...] = ()
    """Of every arm at its best rate alone; with them, those of `seeds` only choose rates."""
    test: DataSet | None = None
    """The split that the confirming runs are scored on."""

    @classmethod
    def make(
        cls,
        name: ModelName,
        data: str,
        config: TrainConfig,
        *,
        arms: tuple[Arm, ...],
        rates: tuple[float, ...] = (),
        seeds: int = 3,
        confirm_seeds: int = 0,
        test_split: str | None = None,
        evaluations: int = 10,
        notify: Notify = ignore,
    ) -> Self:
        """Opens the data, counts the steps, and settles when they are scored.

        Args:
            name, data, config, notify: see `finetune`.
            arms: from `read_arms`.
            rates: of the sweep; the config's own if empty. seeds: how many, from the config's own on.
            confirm_seeds, test_split: how many more confirm each arm's best rate, on a split that chose nothing.
            evaluations: of each run, evenly spaced; one more after the first tenth where it is not among them.

        Raises:
            DataError: there is no validation split. InputError: a setting that a comparison cannot have.
        """
        _refuse(config, rates, seeds, evaluations)
        train, val = open_splits(data, config, notify, notify)
        if val is None:
            raise DataError(data, "has no validation split: runs could not be compared", remedy="add one")
        if bool(confirm_seeds) != (test_split is not None):
            remedy = "give --tune-seeds, --confirm-seeds and --test-split, or none of them"
            raise InputError("--test-split" if confirm_seeds else "--confirm-seeds", "is missing", remedy=remedy)
        test = _third_split(data, test_split, train, val) if test_split else None
        config = config.resolved()
        steps = steps_of(config, train.pairs)
        every, first = max(1, round(steps / evaluations)), max(1, round(steps / 10))
        return cls(
            name=name,
            data=data,
            config=replace(config, epochs=None, max_steps=steps, eval_every=every, eval_first=first),
            train=train,
            val=val,
            arms=arms,
            rates=rates or (config.peak_lr,),
            seeds=tuple(range(config.seed, config.seed + seeds)),
            confirm_seeds=tuple(range(config.seed + seeds, config.seed + seeds + confirm_seeds)),
            test=test,
        )

    @property
    def runs(self) -> list[Run]:
        """Seed after seed, so that what is there of an unfinished comparison are whole pairs."""
        return [Run(arm=arm, rate=rate, seed=seed) for seed in self.seeds for rate in self.rates for arm in self.arms]

    def config_of(self, run: Run) -> TrainConfig:
        """How a run is trained; one that only tunes a rate is scored after its last step alone."""
        config = self.config
        if self.test is not None and run.seed in self.seeds and config.patience is None:
            config = replace(config, eval_every=config.max_steps, eval_first=config.max_steps)
        return replace(
            config,
            lr=run.rate,
            seed=run.seed,
            calibrate=run.arm.strategy,
            scale=run.arm.scale if run.arm.strategy else None,
            fusion_lr_mult=self.config.fusion_lr_mult * run.arm.fusion_lr_mult,
            train_as=run.arm.train_as or self.config.train_as,
        )

    def settings(self) -> dict[str, Any]:
        """What a comparison that goes on must have in common with this one."""
        return {
            **{key: getattr(self.name, key) for key in _OF_NAME},
            "preprocess": self.name.preprocess.given(),
            **{key: value for key, value in asdict(self.config).items() if key not in _SET_BY_RUN | _MAY_CHANGE},
            "train": self.train.fingerprint(),
            "val": self.val.fingerprint(),
            "arms": [arm.name for arm in self.arms],
            "lrs": list(self.rates),
            "seeds": list(self.seeds),
            **({"confirm_seeds": list(self.confirm_seeds), "test": self.test.fingerprint()} if self.test else {}),
        }

    def demand_same(self, place: Path) -> None:
        """Refuses settings other than those that were written there.

        Arms, rates and seeds may have become more; and rates fewer, as training may diverge at one.
        """
        before, now = json.loads(place.read_text(encoding="utf-8")), self.settings()
        growing = now.keys() & _MAY_GROW
        more = {key: now[key] for key in growing if set(before.get(key, ())) <= set(now[key])}
        if {*now["lrs"]} <= {*before.get("lrs", ())}:
            more["lrs"] = now["lrs"]
        what, remedy = "holds a comparison with other settings", "repeat them, or name another OUT"
        demand_same({**before, **more}, now, place.parent, what, remedy=remedy)


def _refuse(config: TrainConfig, rates: tuple[float, ...], seeds: int, evaluations: int) -> None:
    for field in ("calibrate", "patience", "eval_every", "eval_first"):
        if getattr(config, field) is not None:
            raise InputError(field, "cannot be set in a comparison", remedy="leave it out of the configuration")
    if len(set(rates)) < len(rates) or not all(0 < rate < float("inf") for rate in rates):
        raise InputError("--lrs", "are no different learning rates", got=rates, expected="such as 1e-4,3e-4,1e-3")
    if seeds < 1 or evaluations < 1:
        raise InputError("--seeds" if seeds < 1 else "--evaluations", "is too small", expected="at least 1")


def _third_split(data: str, name: str, *others: DataSet) -> DataSet:
    test = open_data(data, split=name, labels=True)
    if test.fingerprint() in [other.fingerprint() for other in others]:
        what = "is trained on or chooses the rates already"
        raise InputError("--test-split", what, got=name, expected="a third split")
    return test
