"""mmsegmentation configs that come with a checkpoint: Python text from a stranger, read as data and never run.

mmengine's own readers execute a config. What training writes into a checkpoint is a dump of values, though: assignments
of literals and of ``dict(...)``. The calls are rewritten into displays and `ast.literal_eval` reads the result, which
refuses everything else.
"""

import ast
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from equalize.errors import CheckpointError

__all__ = ["REMEDY", "Config", "bare_model", "read_literals", "trusted_model", "types_in", "with_classes"]

Config = Mapping[str, Any]

REMEDY = "if you trust its config, name that file and it is run: --arch mmseg:config.py"
_LONGEST_TEXT = 1 << 18  # ten times what mmsegmentation's own have
_LARGEST_NUMBER = 1 << 16  # no channel, class or layer count is larger; a bomb's is
_WORD = re.compile(r"[\w-]*")
# Read files or addresses, or are not needed for logits: fresh weights come from the library's own rules, losses and
# samplers from the trainer here, pixels' mean and std from `Preprocess`.
_LEFT_OUT = re.compile(
    r"init_cfg|pretrained|checkpoint|loss_.*|class_weight|sampler|train_cfg|test_cfg|data_preprocessor"
)
_FETCHED = ("init_cfg", "pretrained", "data_preprocessor")
_DISPLAYS: Mapping[str, Callable[..., ast.expr]] = {"list": ast.List, "tuple": ast.Tuple, "set": ast.Set}
_LIBRARIES = ("mmseg.", "mmcv.", "mmengine.", "torch.nn.")


def read_literals(text: str, where: object) -> dict[str, Any]:
    """The assignments of a config, nothing of it run.

    Raises:
        CheckpointError: it holds more than literals, ``dict(...)`` and their like.
    """
    if len(text) > _LONGEST_TEXT:
        raise CheckpointError(where, f"its config is longer than {_LONGEST_TEXT >> 10} KiB", remedy=REMEDY)
    config: dict[str, Any] = {}
    try:
        with warnings.catch_warnings(action="ignore"):  # of the parser, about backslashes
            statements = ast.parse(text).body
        for statement in statements:
            match statement:
                case ast.Expr(value=ast.Constant()):  # a docstring
                    continue
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    config[name] = _literal(value, text, where)
                case _:
                    raise _no_literal(statement.lineno, text, where)
    except CheckpointError:
        raise
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(where, f"its config cannot be read ({type(error).__name__})", remedy=REMEDY) from error
    if config.get("custom_imports"):
        raise CheckpointError(where, "its config asks to import other code (custom_imports)", remedy=REMEDY)
    return config


def _literal(node: ast.expr, text: str, where: object) -> Any:
    try:
        return ast.literal_eval(_Displays().visit(node))
    except ValueError as error:
        found = re.search(r"on line (\d+)", str(error))
        raise _no_literal(int(found[1]) if found else node.lineno, text, where) from error


def _no_literal(line: int, text: str, where: object) -> CheckpointError:
    found = " ".join(text.splitlines()[line - 1].split())[:60]
    return CheckpointError(
        where, f"its config holds more than plain values and was not run (line {line}: {found!r})", remedy=REMEDY
    )


class _Displays(ast.NodeTransformer):
    """Rewrites the calls that a dump holds into what they give: ``dict(a=1)`` into ``{"a": 1}``."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """``inf`` and ``nan``, as a dump spells them."""
        return ast.Constant(value=float(node.id)) if node.id in ("inf", "nan") else node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """``dict``, ``list``, ``tuple``, ``set`` and ``float`` of literals; other calls stay, and are refused."""
        self.generic_visit(node)
        match node:
            case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
                return _dict_display(keywords) or node
            case ast.Call(func=ast.Name(id="dict"), args=[ast.Dict() as inner], keywords=[]):
                return inner  # so dumped where a key is no identifier
            case ast.Call(func=ast.Name(id="list" | "tuple" | "set" as name), args=[], keywords=[]):
                return _DISPLAYS[name](elts=[])
            case ast.Call(
                func=ast.Name(id="list" | "tuple" | "set" as name),
                args=[ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items)],
                keywords=[],
            ):
                return _DISPLAYS[name](elts=items)
            case ast.Call(func=ast.Name(id="float"), args=[ast.Constant(value=str() as value)], keywords=[]):
                return ast.Constant(value=float(value))
        return node


def _dict_display(keywords: list[ast.keyword]) -> ast.Dict | None:
    """``a=1, **{"b c": 2}`` -> ``{"a": 1, "b c": 2}``: what is no identifier is dumped in the second way."""
    display = ast.Dict(keys=[], values=[])
    for keyword in keywords:
        if keyword.arg is not None:
            display.keys.append(ast.Constant(value=keyword.arg))
            display.values.append(keyword.value)
        elif isinstance(keyword.value, ast.Dict):
            display.keys += keyword.value.keys
            display.values += keyword.value.values
        else:
            return None
    return display


def bare_model(config: Config, where: object) -> dict[str, Any]:
    """The ``model`` of a config without whatever loads files, and, as plain words and numbers, without a path.

    Raises:
        CheckpointError: there is no model, or a value of it is none that a network's shape is made of.
    """
    model = config.get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("type"), str):
        raise CheckpointError(where, "its config has no model", expected="model = dict(type='EncoderDecoder', …)")
    bare = _bare(model, where)
    assert isinstance(bare, dict)
    return bare


def _bare(value: Any, where: object, key: str = "model") -> Any:
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise CheckpointError(where, f"its config's {key} has keys that are no text", remedy=REMEDY)
        kept = {name: inner for name, inner in value.items() if name != "_scope_" and not _LEFT_OUT.fullmatch(name)}
        return {name: _bare(inner, where, name) for name, inner in kept.items()}
    if isinstance(value, (list, tuple, set)):
        return type(value)(_bare(inner, where, key) for inner in value)
    if key == "type" and isinstance(value, str) and value.startswith(_LIBRARIES):
        return value.rpartition(".")[2]  # found by its last name in the registry, or refused
    word = isinstance(value, str) and _WORD.fullmatch(value)
    number = isinstance(value, (int, float)) and not abs(value) > _LARGEST_NUMBER
    if not (value is None or word or number):
        raise CheckpointError(
            where, f"its config's {key} is no plain word or number", got=repr(value)[:60], remedy=REMEDY
        )
    return value


def trusted_model(config: Config, where: object) -> dict[str, Any]:
    """The ``model`` of a config that the user let run, without the weights that it would fetch.

    Raises:
        CheckpointError: there is no model.
    """
    model = config.get("model")
    if not isinstance(model, Mapping) or "type" not in model:
        raise CheckpointError(where, "has no model", expected="model = dict(type='EncoderDecoder', …)")

    def without(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: without(inner) for key, inner in value.items() if key not in _FETCHED}
        return type(value)(without(inner) for inner in value) if isinstance(value, (list, tuple)) else value

    return dict(without(model))


def types_in(model: Any) -> Iterator[object]:
    """What every ``type`` in a model's config names."""
    if isinstance(model, Mapping):
        if "type" in model:
            yield model["type"]
        for inner in model.values():
            yield from types_in(inner)
    elif isinstance(model, (list, tuple, set)):
        for inner in model:
            yield from types_in(inner)


def with_classes(model: Config, number: int) -> dict[str, Any]:
    """A model's config whose main and auxiliary heads tell that many classes apart, each by a channel of its own."""

    def changed(head: Any) -> Any:
        if isinstance(head, (list, tuple)):
            return [changed(one) for one in head]
        if not isinstance(head, Mapping) or head.get("num_classes") == number:
            return head
        kept = {key: value for key, value in head.items() if key not in ("out_channels", "threshold")}
        return {**kept, "num_classes": number}

    return {key: changed(value) if key in ("decode_head", "auxiliary_head") else value for key, value in model.items()}
