"""segmentation_models_pytorch, recognised: decoder and its widths from the keys, the encoder by building candidates.

A candidate counts when its keys and shapes are exactly those on disk; it is built on the meta device, without memory.
"""

import inspect
import json
import shlex
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product

from equalize.checkpoint.families.smp import family as smp_family
from equalize.checkpoint.families.smp.decoders import DECODERS, HEADS, Options, Shapes, told
from equalize.checkpoint.families.smp.encoders import COUNTER, candidates, input_channels, shapes_of
from equalize.checkpoint.keys import strippings
from equalize.errors import CheckpointError

__all__ = ["completed", "looks_like_smp", "recognise"]

Arguments = dict[str, object]

_PARTS = {"encoder", "decoder", "segmentation_head"}
_UNTOLD = ("encoder_output_stride", "decoder_atrous_rates", "decoder_interpolation", "upsampling", "activation")
"""Arguments that change what a network computes and leave its keys and shapes as they are."""


def looks_like_smp(shapes: Shapes) -> bool:
    """Whether the keys are divided as in every network of smp."""
    return _bare(shapes) is not None


def recognise(shapes: Shapes, where: object) -> tuple[str, Arguments, tuple[str, ...]]:
    """The class and arguments of the network that a state dict belongs to, and notes on what shapes do not tell.

    Args:
        shapes: key -> shape, as they lie on disk.
        where: the file, for errors.

    Raises:
        CheckpointError: no candidate fits, or several do.
        ResourceError: smp is not installed.
    """
    bare = _bare(shapes)
    assert bare is not None
    name = _decoder(bare)
    if name is None:
        raise CheckpointError(
            where,
            "is of smp, but no known decoder of it",
            expected=", ".join(DECODERS),
            remedy="say what: --arch smp:NAME --arch-arg encoder_name=…",
        )
    smp_family.library()
    flags = f"--arch smp:{name} --arch-arg encoder_name=…"
    try:
        options = told(name, bare)
    except (KeyError, IndexError) as error:
        what, got = f"has the keys of an smp:{name}, but not all of them", f"no {error}"
        raise CheckpointError(where, what, got=got, remedy=f"say what it is: {flags}") from error
    arguments = _search(name, bare, options, where)
    if arguments is None:
        what = f"is an smp:{name} over an encoder that is not known here"
        raise CheckpointError(where, what, remedy=f"name it: {flags}")
    return name, arguments, (_note(where, name, arguments, {}),)


def completed(
    name: str, shapes: Shapes, given: Mapping[str, object], where: object
) -> tuple[Arguments, tuple[str, ...]]:
    """The arguments of a class that the user named, those that he left away as keys and shapes tell them, and a note.

    Where smp's defaults fit they hold; where nothing fits, comparing the keys will say why.

    Args:
        name: the class.
        shapes: key -> shape, as they lie on disk.
        given: its arguments as far as the user gave them.
        where: the file, for errors.

    Raises:
        CheckpointError: several sets of arguments fit.
    """
    bare, name = _bare(shapes), smp_family.builder(name).__name__
    if bare is None or _decoder(bare) != name:
        return dict(given), ()
    try:
        options = told(name, bare)
    except (KeyError, IndexError):
        return dict(given), ()
    if given.keys() >= {"encoder_name", *options} or _fits(name, given, bare):
        return dict(given), ()
    found = _search(name, bare, options | {key: [value] for key, value in given.items()}, where)
    return (dict(given), ()) if found is None else (found, (_note(where, name, found, given),))


def _bare(shapes: Shapes) -> Shapes | None:
    """The shapes under the keys that smp gives them, if it does."""
    for reading in strippings(shapes):
        if {key.partition(".")[0] for key in reading} >= _PARTS and any(head in reading for head in HEADS):
            return {key: shapes[disk] for key, disk in reading.items()}
    return None


def _decoder(bare: Shapes) -> str | None:
    return next((name for name, (mark, _) in DECODERS.items() if mark in bare), None)


def _note(where: object, name: str, arguments: Arguments, given: Mapping[str, object]) -> str:
    known = inspect.signature(smp_family.builder(name)).parameters
    untold = [argument for argument in _UNTOLD if argument in known and argument not in given]
    return (
        f"{where}: recognised as smp:{name} over {arguments['encoder_name']}; weights do not tell "
        f"{', '.join(untold)}: as smp has them by default, unless --arch smp:{name} --arch-arg {untold[0]}=… says else"
    )


def _search(name: str, bare: Shapes, options: Options, where: object) -> Arguments | None:
    """The one set of arguments that makes a network with these keys and shapes.

    Raises:
        CheckpointError: several do.
    """
    named = options.get("encoder_name")
    for names in candidates(bare) if named is None else [[str(encoder) for encoder in named]]:
        fitting = [found for encoder in names for found in _fitting(name, encoder, options, bare)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise _undecided(name, fitting, where)
    return None


def _fitting(name: str, encoder: str, options: Options, bare: Shapes) -> Iterator[Arguments]:
    channels = input_channels(encoder, bare)
    if channels is None:
        return
    known: Options = {"encoder_name": [encoder], **({} if channels == 3 else {"in_channels": [channels]}), **options}
    for values in product(*known.values()):
        arguments = dict(zip(known, values, strict=True))
        if _fits(name, arguments, bare):
            yield arguments


def _fits(name: str, arguments: Mapping[str, object], bare: Shapes) -> bool:
    built = shapes_of(partial(smp_family.builder(name), **arguments), f"smp:{name}")
    return _without_counters(built) == _without_counters(bare)


def _without_counters(shapes: Shapes) -> Shapes:
    return {key: shape for key, shape in shapes.items() if not key.endswith(COUNTER)}


def _undecided(name: str, fitting: list[Arguments], where: object) -> CheckpointError:
    differing = [key for key in fitting[0] if any(each[key] != fitting[0][key] for each in fitting)]
    choices = [
        " ".join(f"--arch-arg {shlex.quote(f'{key}={_text(each[key])}')}" for key in differing) for each in fitting
    ]
    return CheckpointError(
        where,
        f"is an smp:{name} whose keys and shapes do not tell {' and '.join(differing)}",
        remedy=f"choose: --arch smp:{name} with {' or '.join(choices)}",
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
