"""The runs of a comparison: one training for each arm, rate and seed; each finished one a file of its own.

OUT/settings.json            what all runs have in common, and which were asked for
OUT/plans/ARM_seedS.json     what was done to the network before the first step, measured once for all rates
OUT/runs/NAME/               a training that is not finished, as `finetune` leaves it
OUT/runs/NAME.npz            counts of the validation images: intersection and union by image and class
OUT/runs/NAME.json           a finished run; with it, NAME is never trained again
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from equalize.checkpoint import Checkpoint
from equalize.commands.compare.setup import Run, Setup, demand_same
from equalize.commands.compare.start import begin, digest, scales
from equalize.commands.evaluate import Evaluating, confusion
from equalize.commands.finetune.finetune import finetune
from equalize.commands.finetune.run_directory import write_whole
from equalize.commands.finetune.splits import check_splits, open_splits
from equalize.commands.images import Images, Measuring, Progress, device_of
from equalize.errors import InputError, OutputError, ResourceError
from equalize.eval_mode import eval_mode
from equalize.metrics import ConfusionMatrix, Score
from equalize.plan.apply import apply
from equalize.plan.plan import Plan

__all__ = ["Runs"]

Say = Callable[[str], None]


class Runs:
    """The directory of a comparison, and how its runs come into it.

    Args:
        out: the directory; made, or gone on with.
        setup: what is compared.

    Raises:
        OutputError: it holds something else. InputError: it holds a comparison with other settings.
        ResourceError: it cannot be written.
    """

    def __init__(self, out: str | Path, setup: Setup) -> None:
        self.path = Path(out).expanduser().absolute()
        self.setup = setup
        place = self.path / "settings.json"
        if place.is_file():
            demand_same(place, setup.settings())
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise OutputError(self.path, "exists and holds no comparison", remedy="name another directory")
        try:
            (self.path / "runs").mkdir(parents=True, exist_ok=True)
            (self.path / "plans").mkdir(exist_ok=True)
            write_whole(place, json.dumps(setup.settings(), indent=2) + "\n")
        except OSError as error:
            raise ResourceError(self.path, f"cannot be written ({error.strerror})") from error

    def finished(self, run: Run) -> bool:
        """Whether it need not be trained."""
        return self._result(run).is_file()

    def result(self, run: Run) -> dict[str, Any]:
        """What a finished run came to: the content of its file."""
        content: dict[str, Any] = json.loads(self._result(run).read_text(encoding="utf-8"))
        return content

    def counts(self, run: Run) -> NDArray[np.int64]:
        """(2, N, K): intersection and union of N validation images and K classes, in pixels."""
        with np.load(self._result(run).with_suffix(".npz")) as file:
            return np.stack([file["intersection"], file["union"]]).astype(np.int64)

    def train(
        self,
        run: Run,
        *,
        progress: Progress = lambda done, of: None,
        say: Say = lambda line: None,
        warn: Say = lambda line: None,
    ) -> None:
        """Trains one from its beginning, or from where it was interrupted, and files its result.

        Raises:
            InputError: it would not begin with the weights that the other arms of its seed began with.
        """
        started = time.monotonic()
        directory = self.path / "runs" / run.name
        begun: dict[str, Any] = {}

        def prepare(checkpoint: Checkpoint) -> Plan | None:
            begun["checkpoint"], begun["start"] = checkpoint, digest(checkpoint.model)
            self._demand_same_start(run, begun["start"])
            begun["plan"] = plan = self._plan(checkpoint, run)
            return plan if run.arm.strategy else None

        recipe = self.setup.recipe_of(run)
        name = replace(self.setup.name, seed=run.seed)
        done = finetune(
            name,
            self.setup.data,
            directory,
            recipe,
            resume=True,
            prepare=prepare,
            progress=progress,
            say=say,
            warn=warn,
        )
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        curve = [[line["step"], line["mIoU"]] for line in lines if "mIoU" in line]
        score = self._count(begun["checkpoint"], run)
        refusals = begun["plan"].refusals if run.arm.strategy else ()
        content = {
            "arm": run.arm.name,
            "lr": run.rate,
            "seed": run.seed,
            "train_as": done.train_as,
            "steps": done.steps,
            "mIoU": score.mIoU,
            "mAcc": score.mAcc,
            "aAcc": score.aAcc,
            "IoU": {row.name: row.IoU for row in score.classes},
            "early": {"step": curve[0][0], "mIoU": curve[0][1]},
            "curve": curve,
            "loss": [list(pair) for pair in done.losses],
            "sites": scales(begun["plan"], run.arm),
            "refusals": [asdict(refusal) for refusal in refusals],
            "start": begun["start"],
            "seconds": round(time.monotonic() - started, 1),
        }
        write_whole(self._result(run), json.dumps(content) + "\n")
        shutil.rmtree(directory)

    def withdraw(self) -> None:
        """Removes a directory of which nothing has come: what was asked for turned out to be impossible."""
        if not any(self.finished(run) for run in self.setup.runs):
            shutil.rmtree(self.path)

    def _result(self, run: Run) -> Path:
        return self.path / "runs" / f"{run.name}.json"

    def _demand_same_start(self, run: Run, start: str) -> None:
        for arm in self.setup.arms:
            for rate in self.setup.rates:
                other = replace(run, arm=arm, rate=rate)
                if self.finished(other) and self.result(other)["start"] != start:
                    raise InputError(
                        self.setup.name.source,
                        f"is no longer the model that {other.name} began with",
                        remedy="compare in a new OUT",
                    )

    def _plan(self, checkpoint: Checkpoint, run: Run) -> Plan:
        """What the arm does to the model, which is done to it: measured by the first run that needs it."""
        place = self.path / "plans" / f"{run.arm.name}_seed{run.seed}.json"
        if place.is_file():
            plan = Plan.read(place)
            apply(plan, checkpoint.model)
            return plan
        recipe = self.setup.recipe
        how = Measuring(
            samples=recipe.samples,
            size=recipe.size,
            split=self.setup.train.split,
            batch_size=recipe.batch_size,
            device=recipe.device,
            workers=recipe.workers,
            seed=run.seed,
        )
        plan = begin(checkpoint, Images(self.setup.data, checkpoint, how), run.arm, run.seed)
        write_whole(place, json.dumps(plan.to_json()))
        return plan

    def _count(self, checkpoint: Checkpoint, run: Run) -> Score:
        """Scores the model of the last step, image by image: no step is chosen by what it is then scored on."""
        recipe = self.setup.recipe_of(run)
        device = device_of(recipe.device)
        found = open_splits(self.setup.data, recipe, lambda line: None)
        labelled = check_splits(checkpoint, found, recipe, device, lambda line: None)[1].val
        assert labelled is not None
        each: list[ConfusionMatrix] = []
        how = Evaluating(
            size=recipe.size, batch_size=recipe.batch_size, precision=recipe.precision or "fp32", workers=recipe.workers
        )
        with eval_mode(checkpoint.model):
            total = confusion(checkpoint, labelled, how, device, each=lambda image, counted: each.append(counted))
        counts_NKK = torch.stack([matrix.counts_KK for matrix in each]).numpy()
        intersection_NK = np.diagonal(counts_NKK, axis1=1, axis2=2)
        union_NK = counts_NKK.sum(axis=1) + counts_NKK.sum(axis=2) - intersection_NK
        place = self._result(run).with_suffix(".npz")
        new = place.with_name(f".{run.name}.new.npz")
        np.savez_compressed(new, intersection=intersection_NK, union=union_NK)
        os.replace(new, place)
        return total.score(labelled.names)
