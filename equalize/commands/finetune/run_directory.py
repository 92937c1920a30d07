"""The directory OUT of a training: its files, how it is resumed, how a model is put into it.

OUT/                    the best model so far, in its own format
OUT/metrics.jsonl       one object a line
OUT/finetune.yaml       the resolved configuration, for --config
OUT/last/run.json       facts that a resumed run must share
OUT/last/commands.txt   the command line of each sitting, for the model card
OUT/curves.png          loss, mIoU and learning rate, written at the end as the two below
OUT/panels.png          what the best model makes of four images of the validation split
OUT/report.html         both, with scores and settings
OUT/last/checkpoint-N/  weights, optimizer, schedule, random numbers after step N: the newest one is for --resume
OUT/last/model/         the model of the last step, in its own format, where it is not the best
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from equalize.checkpoint.files.atomic import atomic_directory, check_target, demand_apart
from equalize.commands.training_record import SETTINGS_FILE
from equalize.errors import InputError, OutputError
from equalize.messages import Notify, ignore

_METRICS = "metrics.jsonl"
_STATE = "trainer_state.json"  # transformers writes it last, so a state with it is whole


class RunDirectory:
    """The directory of one training; an OutputError if it is there and neither to be resumed nor replaced.

    Args:
        source: MODEL; if it is a path, OUT may not touch it. None where nothing is written.
        read: the data and other places that are read; OUT may be or hold none, unless it is resumed.
    """

    def __init__(
        self,
        path: str | Path,
        source: str | Path | None,
        *,
        read: Iterable[str | Path | None] = (),
        resume: bool,
        overwrite: bool,
    ) -> None:
        self.path = Path(path).expanduser().absolute()
        self.last = self.path / "last"
        self._run = self.last / "run.json"
        self.resumed = resume and self._run.is_file()
        if self._run.is_file() and not (resume or overwrite):
            raise OutputError(self.path, "exists", remedy="--resume goes on with it, --overwrite replaces it")
        if not self.resumed:
            demand_apart(self.path, read, inside=True)
        check_target(self.path, overwrite or self.resumed, source)

    def prepare(self, run: Mapping[str, Any], config: str, notify: Notify = ignore) -> None:
        """Makes the directory in one step, in place of what is there, or checks that what is resumed is the same run.

        Of a run that is complete, more steps or epochs may be asked.

        Args:
            run: facts that a resumed run must share, as JSON.
            config: content of finetune.yaml.

        Raises:
            InputError: the run that is resumed had other settings, weights or data.
            ResourceError: it cannot be written.
        """
        if self.resumed:
            if self.demand_resumable(run, notify):
                write_whole(self.path / SETTINGS_FILE, config)
                write_whole(self._run, _text(run))
            for partial in set(self.last.glob("checkpoint-*")) - set(self._states()):
                shutil.rmtree(partial)
            return
        with atomic_directory(self.path, overwrite=True) as new:
            (new / self.last.name).mkdir()
            (new / _METRICS).touch()
            (new / SETTINGS_FILE).write_text(config, encoding="utf-8")
            (new / self._run.relative_to(self.path)).write_text(_text(run), encoding="utf-8")

    def demand_resumable(self, run: Mapping[str, Any], notify: Notify = ignore) -> bool:
        """Whether more steps or epochs are asked of the complete run that is there; an InputError for another run."""
        before = json.loads(self._run.read_text(encoding="utf-8"))
        newest = self.newest_state()
        more = _more_steps(before, run) if newest and was_stopped(newest) else {}
        remedy = "use the same flags, model and data; more steps can be asked of a training that is complete"
        recipe = {**before.get("recipe", {}), **more}
        demand_same({**before, "recipe": recipe}, run, self.path, "cannot be resumed as another run", remedy=remedy)
        for key, number in more.items():
            unit, was = "steps" if key == "max_steps" else "epochs", before["recipe"][key]
            notify(f"{key} was {was}, now {number}: the learning rate goes on as in one of {number} {unit}")
        return bool(more)

    def record(self, command: str) -> None:
        """Adds a command line to those of earlier sittings."""
        place = self.last / "commands.txt"
        known = place.read_text(encoding="utf-8").splitlines() if place.is_file() else []
        if command and command not in known:
            write_whole(place, "".join(f"{line}\n" for line in (*known, command)))

    def newest_state(self) -> Path | None:
        """The newest state that is whole."""
        return max(self._states(), key=_step, default=None)

    def newest_step(self) -> int:
        """That of the newest state; 0 where there is none."""
        newest = self.newest_state()
        return _step(newest) if newest else 0

    def state_of(self, step: int) -> Path:
        """Where the state after a step lies."""
        return self.last / f"checkpoint-{step}"

    def write_metrics(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Writes metrics.jsonl."""
        write_whole(self.path / _METRICS, "".join(json.dumps(line) + "\n" for line in lines))

    def put_model(self, save: Callable[[Path], None]) -> None:
        """Has a model saved in place of the one there: OUT holds the old or the new one, whole, at any moment."""
        with atomic_directory(self.path, overwrite=True) as new:
            model = new / ".model"
            save(model)
            for entry in model.iterdir():
                entry.rename(new / entry.name)
            model.rmdir()
            for entry in self.path.iterdir():
                if (new / entry.name).exists():
                    continue
                if entry.is_dir():
                    shutil.copytree(entry, new / entry.name, copy_function=_link)
                else:
                    _link(entry, new / entry.name)

    def _states(self) -> list[Path]:
        return [path for path in self.last.glob("checkpoint-*") if _is_json(path / _STATE)]


def _link(source: str | Path, place: str | Path) -> None:
    """Hard-links a file that is not being written; copies it where links are not supported."""
    try:
        os.link(source, place)
    except OSError:
        shutil.copy2(source, place)


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is the old one or the new one at any moment; several processes may write it."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(text, encoding="utf-8", errors="backslashreplace")  # paths may be no text
    os.replace(new, path)


def demand_same(before: Mapping[str, Any], now: Mapping[str, Any], where: Path, what: str, *, remedy: str) -> None:
    """Refuses facts that differ from those that were written, as JSON, by an InputError that says `what` and which."""
    before, now = _flat(before), _flat(json.loads(json.dumps(now)))
    differing = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if differing:
        facts = "; ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in differing[:3])
        raise InputError(where, f"{what}: {facts}", remedy=remedy)


def was_stopped(state: Path) -> bool:
    """Whether the training ended with this state: after its last step, or early."""
    content = json.loads((state / _STATE).read_text(encoding="utf-8"))
    return bool(content["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"])


def _more_steps(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, int]:
    """The length of a run, in the unit it was given in, if it is more than before."""
    for key in ("max_steps", "epochs"):
        was, asked = (run.get("recipe", {}).get(key) for run in (before, now))
        if was is not None and asked is not None and asked > was:
            return {key: asked}
    return {}


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts with those of an object in it, such as the settings, by their own names."""
    inner = [value for value in facts.values() if isinstance(value, dict)]
    flat = {key: value for key, value in facts.items() if not isinstance(value, dict)}
    return {**{key: value for each in inner for key, value in each.items()}, **flat}


def _text(run: Mapping[str, Any]) -> str:
    return json.dumps(run, indent=2) + "\n"


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])
