"""The command that goes on from here, with the flags that were given, so that it can be copied and run."""

import json
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import typer

# What concerns one command's own run and output.
_OWN = {"json", "out", "overwrite", "dry_run", "resume", "report", "model"}
OF_A_PASS = {"batch_size", "device", "precision", "workers", "samples", "tolerance", "skip_bad", "split"}
"""Flags of measuring, which another command means otherwise."""
OF_DRAWING = {"init_missing", "num_classes", "seed", "strategy", "scale", "sites"}
"""Flags of what is written to OUT, where it need not be said again."""


def next_command(
    context: typer.Context,
    name: str,
    model: str,
    *,
    out: str | None = None,
    leave: Collection[str] = (),
    defaults: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """`next: equalize NAME MODEL ...`.

    Args:
        context: of the command that ran; its flags are carried over where NAME has them too.
        out: what NAME is to write. leave: parameters that are not carried over.
        defaults: words by parameter for what was not given, such as IMAGES; empty for a flag without a value.
        settings: values by parameter that were not given as flags, such as those of a file; None is no value.
    """
    group: Any = context.find_root().command  # Typer brings its own Click, or uses that of the environment
    command = group.commands[name]
    taken = {each.name: each for each in command.params if each.name not in _OWN | set(leave)}
    given = dict(defaults or {})
    words: list[str] = []
    typed = _typed(context)
    for parameter in typed:
        if parameter.name in taken:
            given.pop(parameter.name, None)
            words += _words(parameter, context.params[parameter.name])
    unsaid = taken.keys() - {each.name for each in typed}
    for key, value in (settings or {}).items():
        words += _words(taken[key], value) if key in unsaid and value is not None else []
    missing = [
        word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", *([value] if value else []))
    ]
    ends = ["-o", out] if out is not None else []
    return f"next: {shlex.join(['equalize', name, model, *missing, *words, *ends])}"


def command_line(context: typer.Context, **named: str) -> str:
    """The command that runs, to be recorded for others: as it was typed, but without the folders of local paths.

    Args:
        named: what is recorded in place of a parameter's value, such as OUT for its place.
    """
    from equalize.commands.push.files import without_folders
    from equalize.hub import HUB_ID

    words = ["equalize", str(context.command.name)]
    for parameter in _typed(context):
        if parameter.name == "json":
            continue
        value = named.get(parameter.name, context.params[parameter.name])
        given = _words(parameter, value)
        place = given[-1]
        if parameter.name not in ("model", "data") or not HUB_ID.fullmatch(place) or Path(place).exists():
            given = ["=".join(map(without_folders, word.split("=", 1))) for word in given]
        words += given
    return shlex.join(words)


def same_command(context: typer.Context, *more: str, leave: Collection[str]) -> str:
    """`next: equalize ...`, the command that runs, without parameters and with further flags."""
    kept = [each for each in _typed(context) if each.name not in leave and f"--{each.name}" not in more]
    words = [word for each in kept for word in _words(each, context.params[each.name])]
    return f"next: {shlex.join(['equalize', str(context.info_name), *words, *more])}"


def _typed(context: typer.Context) -> list[Any]:
    """The parameters that stand on the command line."""
    sources = {each: context.get_parameter_source(each.name or "") for each in context.command.params}
    return [each for each, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def _words(option: Any, value: Any) -> list[str]:
    """A parameter as it is typed."""
    if option.param_type_name == "argument":
        return [_text(value)]
    flag = "-o" if "-o" in option.opts else max(option.opts, key=len)
    if isinstance(value, bool):
        return [flag] if value else [max(option.secondary_opts, key=len)]
    if option.multiple:
        return [word for each in value for word in (flag, _text(each))]
    return [flag, _text(value)]


def _text(value: Any) -> str:
    """A value as it is typed: `all`, `512x768`, `key=value`."""
    match value:
        case None:
            return "all"
        case (str() as key, content):
            return f"{key}={content if isinstance(content, str) else json.dumps(content)}"
        case tuple() if all(isinstance(each, int) for each in value):
            return "x".join(map(str, dict.fromkeys(value) if len(set(value)) == 1 else value))
        case tuple():
            return ",".join(map(str, value))
        case _:
            return str(value)
