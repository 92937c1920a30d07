"""OUT while and after a training: what lies where, how it is taken up again, how a model gets into it.

OUT/                    the best model so far, in its own format
OUT/metrics.jsonl       one object a line
OUT/finetune.yaml       the resolved configuration, for --config
OUT/last/run.json       what the run is of: refuses to be resumed as another
OUT/last/checkpoint-N/  weights, optimizer, schedule, random numbers after step N: for --resume
OUT/last/model/         the model of the last step, in its own format, where it is not the best
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from equalize.checkpoint.files.atomic import check_target, take_place
from equalize.errors import InputError, OutputError, ResourceError

__all__ = ["LAST", "RunDirectory", "write_whole"]

LAST = "last"
_METRICS = "metrics.jsonl"
_CONFIG = "finetune.yaml"
_KEPT = {LAST, _METRICS, _CONFIG}
_STATE = "trainer_state.json"  # transformers writes it last, so a checkpoint with it is whole


class RunDirectory:
    """The directory of one training.

    Args:
        path: OUT.
        source: MODEL, if it is a path; OUT may not touch it.
        resume: go on with what is there, if anything is.
        overwrite: throw away what is there.

    Raises:
        OutputError: it exists and is neither to be resumed nor overwritten, or is no directory.
    """

    def __init__(self, path: str | Path, source: Path | None, *, resume: bool, overwrite: bool) -> None:
        self.path = Path(path).expanduser().absolute()
        self.last = self.path / LAST
        self.metrics = self.path / _METRICS
        begun = (self.last / "run.json").is_file()
        if resume and self.path.is_dir() and not begun and any(self.path.iterdir()) and not overwrite:
            raise OutputError(self.path, "holds no training to resume", remedy="--overwrite replaces it")
        check_target(self.path, overwrite or resume, source)
        if self.path.is_mount():
            raise OutputError(self.path, "is where a disk is mounted", remedy="name a directory below it")
        self.resumed = resume and begun

    def begin(self, run: Mapping[str, Any], config: str) -> None:
        """Makes the directory in one step, in place of what is there, or checks that what is resumed is the same run.

        Args:
            run: what the run is of, as JSON.
            config: content of finetune.yaml.

        Raises:
            InputError: the run that is resumed had other settings, weights or data.
            ResourceError: it cannot be written.
        """
        if self.resumed:
            _demand_same(json.loads((self.last / "run.json").read_text(encoding="utf-8")), run, self.path)
            for partial in {*self.last.glob("checkpoint-*"), *self.last.glob(".*.tmp-*")} - set(self._whole()):
                shutil.rmtree(partial)
            shutil.rmtree(self._sibling("new"), ignore_errors=True)
            self._cut_metrics()
            return
        try:
            new = self._sibling("new")
            shutil.rmtree(new, ignore_errors=True)
            (new / LAST).mkdir(parents=True)
            (new / _METRICS).write_text("", encoding="utf-8")
            (new / _CONFIG).write_text(config, encoding="utf-8")
            write_whole(new / LAST / "run.json", json.dumps(run, indent=2) + "\n")
            take_place(new, self.path)
            shutil.rmtree(new, ignore_errors=True)  # by now what was there before
        except OSError as error:
            raise ResourceError(self.path, f"cannot be written ({error.strerror})") from error

    def checkpoint(self) -> Path | None:
        """The newest state that is whole."""
        return max(self._whole(), key=_step, default=None)

    def record(self, line: Mapping[str, Any]) -> None:
        """Adds a line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """What metrics.jsonl says; a line that was cut off while it was written does not count."""
        found = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found

    def put_model(self, save: Callable[[Path], None]) -> None:
        """Has a model saved in place of the one that is there: OUT holds the old or the new one, whole, at any moment.

        Args:
            save: writes a directory that does not exist yet.
        """
        new = self._sibling("new")
        shutil.rmtree(new, ignore_errors=True)
        save(new)
        for entry in self.path.iterdir():
            if entry.name in _KEPT or not (new / entry.name).exists():
                _share(entry, new / entry.name)
        take_place(new, self.path)
        shutil.rmtree(new, ignore_errors=True)  # by now the old

    def _sibling(self, name: str) -> Path:
        return self.path.with_name(f".{self.path.name}.{name}")

    def _whole(self) -> list[Path]:
        return [path for path in self.last.glob("checkpoint-*") if _is_json(path / _STATE)]

    def _cut_metrics(self) -> None:
        """Drops what was recorded after the state that is resumed: it will be recorded again."""
        newest = self.checkpoint()
        reached = _step(newest) if newest else 0
        kept = [line for line in self.lines() if line["step"] <= reached] if newest else []
        write_whole(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))


def _share(source: Path, place: Path) -> None:
    """Gives files, which nobody writes to at this moment, a second name; copies them where a disk has no such thing."""
    if not source.is_dir():
        _link(source, place)
    else:
        shutil.copytree(source, place, copy_function=_link)


def _link(source: str | Path, place: str | Path) -> None:
    try:
        os.link(source, place)
    except OSError:
        shutil.copy2(source, place)


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is the old one or the new one at any moment."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def _demand_same(before: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    now = json.loads(json.dumps(now))
    differing = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if differing:
        facts = "; ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in differing[:3])
        raise InputError(
            where, f"cannot be resumed as another run: {facts}", remedy="use the same flags, model and data"
        )


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])
