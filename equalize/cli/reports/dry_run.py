"""What a training or a comparison would do, before it does it."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import ConsoleRenderable
from rich.text import Text

from equalize.cli.tables import indented
from equalize.commands.compare.dry_run import ComparisonForecast
from equalize.commands.finetune.dry_run import TrainingForecast
from equalize.commands.finetune.pace import TIMED, Pace
from equalize.messages import first_of

_NAMED = 12  # classes and runs; JSON has them all


def training_forecast(found: TrainingForecast) -> Iterator[ConsoleRenderable]:
    """Model, data, steps and time of `finetune --dry-run`."""
    config, facts = found.task.config, found.to_json()
    yield from _subject(facts)
    if found.strategy is None:
        equalized = "none (see equalize calibrate, or --calibrate)"
    else:
        seen = (
            "trains the equalized weights" if found.train_as == "explicit" else "trains the weights as they are stored"
        )
        equalized = (
            f"{found.strategy}; the optimizer {seen}" if found.train_as else f"{found.strategy}: trained as it is"
        )
    yield _line("equalization", equalized)
    going = f", going on after step {found.first_step}" if found.first_step else ""
    yield _line("steps", f"{found.steps} ({found.epochs:g} epochs){going}; {_batch(facts)}")
    yield _line("optimizer", f"{config.optimizer}, learning rate {config.peak_lr:g}, seed {config.seed}")
    yield _line("scored", f"{found.evaluations} times" if found.evaluations else "never: there is no validation split")
    if found.measured:
        yield _line("measured", f"at most {found.measured} images, before the first step")
    yield from _time(found.seconds, found.pace, facts)
    yield Text(f"Nothing was written to {found.output} (--dry-run).")


def comparison_forecast(found: ComparisonForecast) -> Iterator[ConsoleRenderable]:
    """Model, data, runs and time of `compare --dry-run`."""
    setup, facts = found.setup, found.to_json()
    yield from _subject(facts)
    yield _line("arms", ", ".join(facts["arms"]))
    yield _line("learning rates", ", ".join(f"{rate:g}" for rate in setup.rates))
    yield _line("seeds", ", ".join(map(str, setup.seeds)))
    there = f"; there already: {first_of([run.name for run in found.finished], _NAMED)}" if found.finished else ""
    yield _line("runs", f"{len(setup.runs)}, of which {len(found.missing)} are to be trained{there}")
    if found.begun:
        yield _line("interrupted", f"{first_of(found.begun, _NAMED)}: they go on from the last state saved")
    if setup.test is not None:
        seeds = ", ".join(map(str, setup.confirm_seeds))
        yield _line(
            "confirmed",
            f"{found.confirming} more runs, each arm at its best rate, seeds {seeds}, split {setup.test.split}",
        )
        yield _line(
            "perhaps", "rates beyond those given, where an arm's best lies at an edge, and a tenth of each best"
        )
    yield _line("each run", f"{found.steps} steps, scored {found.evaluations} times; {_batch(facts)}")
    yield _line("measured", f"{found.measurements} times at most {min(setup.config.samples, setup.train.pairs)} images")
    yield from _time(found.seconds, found.pace, facts, least=setup.test is not None)
    yield Text(f"Nothing was written to {found.output} (--dry-run).")


def _subject(facts: Mapping[str, Any]) -> Iterator[ConsoleRenderable]:
    yield Text()
    drawn = f"; {len(facts['drawn'])} tensors drawn anew" if facts["drawn"] else ""
    yield _line("model", f"{facts['source']} ({facts['architecture']}){drawn}")
    train, val = facts["train"], facts["val"]
    yield _line("data", f"{facts['data']}: {train['pairs']} pairs to train on{_split(train)}")
    if val:
        yield _line("validation", f"{val['images']} images{_split(val)}")
    names = f" ({first_of(facts['class_names'], _NAMED)})" if facts["class_names"] else ""
    yield _line("classes", f"{facts['classes']}{names}")


def _split(facts: Mapping[str, Any]) -> str:
    return f", split {facts['split']}" if facts["split"] else ""


def _batch(facts: Mapping[str, Any]) -> str:
    accumulated = f" times {facts['accumulate']}" if facts["accumulate"] > 1 else ""
    return f"{facts['batch_size']}{accumulated} images of {'x'.join(map(str, facts['crop']))} a step"


def _time(seconds: float, pace: Pace, facts: Mapping[str, Any], *, least: bool = False) -> Iterator[ConsoleRenderable]:
    how = f"{TIMED} steps timed: {pace.step:.2g} s each; {pace.image:.2g} s to score an image"
    yield _line("time", f"{'at least' if least else 'about'} {_duration(seconds)} on {facts['device']} ({how})")
    if pace.memory is not None:
        yield _line("memory", f"about {pace.memory / 1e9:.2g} GB at the peak")


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.0f} s"


def _line(what: str, text: str) -> ConsoleRenderable:
    return indented(Text.assemble((f"{what}: ", "bold"), text))
