"""The runs of a comparison: one training for each arm, rate and seed; each finished one a file of its own.

OUT/settings.json            what all runs have in common, and the arms, rates and seeds
OUT/plans/START_seedS.json   what was done to the network before the first step, measured once for all rates and arms
OUT/runs/NAME/               an unfinished training, as `finetune` writes it
OUT/runs/NAME.npz            counts of the validation images: intersection and union by image and class
OUT/runs/NAME.test.npz       those of the third split, for a run that confirms
OUT/features/                outputs of a frozen backbone, with `cache_backbone`
OUT/runs/NAME.json           a finished run; with it, NAME is never trained again
OUT/locks/NAME               held by the process that trains NAME: several may share a comparison
"""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from equalize.checkpoint.checkpoint import Checkpoint
from equalize.commands.compare.arms import prepare_arm, scales
from equalize.commands.compare.setup import Run, Setup
from equalize.commands.evaluate import count_images
from equalize.commands.finetune.backbone_cache import digest, open_cache
from equalize.commands.finetune.finetune import finetune
from equalize.commands.finetune.run_directory import write_whole
from equalize.commands.finetune.splits import Task
from equalize.commands.images import Images
from equalize.commands.labels import LabeledSplit, check_split
from equalize.errors import InputError, NumericsError, OutputError
from equalize.eval_mode import eval_mode
from equalize.messages import Notify, TrainingMonitor
from equalize.metrics import score_of
from equalize.plan.apply import apply
from equalize.plan.plan import Plan

_SETTINGS, _FOLDERS = "settings.json", ("runs", "plans", "locks")
_POLL = 1.0  # seconds between looks for what another process trains


def _is_foreign(path: Path) -> bool:
    """Whether it is none of what a comparison begins with, which another process may be writing at this moment."""
    return path.name not in _FOLDERS and not path.name.startswith(f".{_SETTINGS}")


class Runs:
    """The directory of a comparison, new or resumed, and the runs in it.

    Without `write` it is not made if it is not there, and can only be asked what is finished. An OutputError if it
    holds something else, an InputError if it holds a comparison with other settings.
    """

    def __init__(self, out: str | Path, setup: Setup, *, write: bool = True) -> None:
        self.path = Path(out).expanduser().absolute()
        self.setup = setup
        settings = self.path / _SETTINGS
        self._is_new = not settings.is_file()
        if not self._is_new:
            setup.demand_same(settings)
        elif self.path.exists() and (not self.path.is_dir() or any(map(_is_foreign, self.path.iterdir()))):
            raise OutputError(self.path, "exists and holds no comparison", remedy="name another directory")
        if not write:
            return
        for name in _FOLDERS:
            (self.path / name).mkdir(parents=True, exist_ok=True)
        write_whole(settings, json.dumps(setup.settings(), indent=2) + "\n")

    def finished(self, run: Run) -> bool:
        """Whether its result is there."""
        return self._result(run).is_file()

    def missing(self, every: Sequence[Run]) -> list[Run]:
        """Those that are not finished."""
        return [run for run in every if not self.finished(run)]

    def take_turns(self, every: Sequence[Run], notify: Notify) -> Iterator[Run]:
        """Yields each that is missing, while no other process can take it, until all are finished, by whomever."""
        waits = False
        while missing := self.missing(every):
            for run in missing:
                with self._locked(run) as locked:
                    if locked and not self.finished(run):
                        yield run
                        waits = False
                        break
            else:
                if not waits:
                    notify(f"waiting for {len(missing)} of {len(every)} runs, which another process trains")
                waits = True
                time.sleep(_POLL)

    def begun(self, run: Run) -> bool:
        """Whether it was interrupted and goes on from a saved state."""
        return any((self.path / "runs" / run.name / "last").glob("checkpoint-*"))

    def confirmed(self, seed: int) -> int:
        """How many runs with a seed that confirms are finished."""
        return len(list((self.path / "runs").glob(f"*_seed{seed}.json")))

    def has_start(self, run: Run) -> bool:
        """Whether what is done before its first step was measured."""
        return self._start(run).is_file()

    def result(self, run: Run) -> dict[str, Any]:
        """The result of a finished run: the content of its file."""
        content: dict[str, Any] = json.loads(self._result(run).read_text(encoding="utf-8"))
        return content

    def counts(self, run: Run, split: str = "val") -> NDArray[np.int64]:
        """(2, N, K): intersection and union of N images and K classes, in pixels; "test" is the third split."""
        with np.load(self._counts(run, split)) as file:
            return np.stack([file["intersection"], file["union"]]).astype(np.int64)

    def train(self, run: Run, *, monitor: TrainingMonitor, notify: Notify, warn: Notify) -> None:
        """Trains one from its first step, or from where it was interrupted, and files its result."""
        started = time.monotonic()
        directory, config = self.path / "runs" / run.name, self.setup.config_of(run)
        config = replace(config, cache_dir=config.cache_dir or str(self.path / "features"))
        prepared: list[tuple[Task, str, Plan]] = []

        def prepare(task: Task) -> Plan | None:
            start = digest(task.checkpoint.model)
            self._demand_same_start(run, start)
            plan = self._prepare(task.checkpoint, run)
            prepared.append((task, start, plan))
            return plan if run.arm.strategy else None

        try:
            done = finetune(
                *(replace(self.setup.name, seed=run.seed), self.setup.data, directory, config),
                resume=True,
                prepare=prepare,
                models=False,
                monitor=monitor,
                notify=notify,
                warn=warn,
            )
        except InputError:
            if not self.begun(run):
                shutil.rmtree(directory, ignore_errors=True)
            raise
        except NumericsError as error:
            if len(self.setup.rates) > 1:
                error.remedy = f"the others go on with --lrs without {run.rate:g}"
            raise
        ((task, start, plan),) = prepared
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        curve = [[line["step"], line["mIoU"]] for line in lines if "mIoU" in line]
        early = next((point for point in curve if point[0] == config.eval_first), curve[0])
        content = {
            "arm": run.arm.name,
            "lr": run.rate,
            "seed": run.seed,
            "train_as": done.train_as,
            "steps": done.steps,
            **_score(task, task.val, self._counts(run, "val")),
            **self._test(run, task),
            "early": {"step": early[0], "mIoU": early[1]},
            "curve": curve,
            "loss": [list(pair) for pair in done.losses],
            "sites": scales(plan, run.arm, config.train_as),
            "refusals": [refusal.to_json() for refusal in plan.refusals] if run.arm.strategy else [],
            "start": start,
            "seconds": round(time.monotonic() - started, 1),
        }
        write_whole(self._result(run), json.dumps(content) + "\n")
        shutil.rmtree(directory)

    def withdraw(self) -> None:
        """Removes what a new comparison begins with, if it turned out to be impossible and holds nothing else.

        The lock of a second run is another process's, which goes on.
        """
        folders = [self.path / name for name in _FOLDERS]
        files = [self.path / _SETTINGS, *self.path.glob("locks/*")]
        if self._is_new and len(files) <= 2 and {*self.path.rglob("*")} <= {*folders, *files}:
            with contextlib.suppress(OSError):  # whatever came just now stays
                for path in files:
                    path.unlink()
                for folder in (*folders, self.path):
                    folder.rmdir()

    @contextlib.contextmanager
    def _locked(self, run: Run) -> Iterator[bool]:
        """Whether this process may train it; the lock goes with the process, however that ends."""
        lock = FileLock(self.path / "locks" / run.name, blocking=False)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def _start(self, run: Run) -> Path:
        return self.path / "plans" / f"{run.arm.start}_seed{run.seed}.json"

    def _result(self, run: Run) -> Path:
        return self.path / "runs" / f"{run.name}.json"

    def _counts(self, run: Run, split: str) -> Path:
        return self.path / "runs" / f"{run.name}{'' if split == 'val' else f'.{split}'}.npz"

    def _test(self, run: Run, task: Task) -> dict[str, Any]:
        """The score of a confirming run on the third split."""
        if self.setup.test is None or run.seed not in self.setup.confirm_seeds:
            return {}
        assert task.val is not None
        bands = task.checkpoint.preprocess.bands
        labeled = check_split(self.setup.test, task.val.num_classes, task.val.names, task.val.rule, channels=bands)
        return {"test": _score(task, labeled, self._counts(run, "test"))}

    def _demand_same_start(self, run: Run, start: str) -> None:
        for path in sorted((self.path / "runs").glob(f"*_seed{run.seed}.json")):
            if json.loads(path.read_text(encoding="utf-8"))["start"] != start:
                what = f"is no longer the model that {path.stem} started from"
                raise InputError(self.setup.name.source, what, remedy="compare in a new OUT")

    def _prepare(self, checkpoint: Checkpoint, run: Run) -> Plan:
        """The plan of the start, applied to the model; measured by the first run that needs it."""
        place = self._start(run)
        if place.is_file():
            plan = Plan.read(place)
            apply(plan, checkpoint.model)
            return plan
        config = self.setup.config_of(run).calibration(self.setup.train.split)
        images = Images(self.setup.train, checkpoint, config, labels=run.arm.strategy == "auto")
        plan = prepare_arm(checkpoint, images, run.arm, run.seed, config.optimizer)
        write_whole(place, json.dumps(plan.to_json()))
        return plan


def _score(task: Task, labeled: LabeledSplit | None, counts: Path) -> dict[str, Any]:
    """Scores the model of the last step, image by image: no step is chosen by what it is then scored on."""
    assert labeled is not None
    cache = open_cache(task, counts.parent)
    inputs = cache.inputs(labeled) if cache else None
    with eval_mode(task.checkpoint.model):
        found = count_images(task.checkpoint, labeled, task.config.scoring(), task.device, inputs=inputs)
        counts_NKK = torch.stack(list(found))
    intersection_NK = counts_NKK.diagonal(dim1=1, dim2=2)
    union_NK = counts_NKK.sum(dim=1) + counts_NKK.sum(dim=2) - intersection_NK
    if labeled.left_out is not None:
        union_NK[:, labeled.left_out] = 0
    np.savez_compressed(counts, intersection=intersection_NK.numpy(), union=union_NK.numpy())
    score = score_of(counts_NKK.sum(dim=0), len(counts_NKK), labeled.names, labeled.left_out)
    by_class = {row.name: row.IoU for row in score.classes}
    return {"mIoU": score.mIoU, "mAcc": score.mAcc, "aAcc": score.aAcc, "IoU": by_class}
