"""mmsegmentation configs that come with a checkpoint: Python text from a stranger, read as data and never run.

mmengine's own readers execute a config. What training writes into a checkpoint is a dump of values, though:
assignments of literals and of ``dict(...)``. This is all that is understood here; everything else is refused.
"""

import ast
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from equalize.errors import CheckpointError

__all__ = ["REMEDY", "Config", "bare_model", "read_literals", "trusted_model", "types_in", "with_classes"]

Config = Mapping[str, Any]

REMEDY = "if you trust its config, name that file and it is run: --arch mmseg:config.py"
_LONGEST_TEXT = 1 << 18  # ten times what mmsegmentation's own have
_LONGEST_INT = (1 << 60) - 1  # larger ones can be chosen so that a dict takes minutes
_LARGEST_NUMBER = 1 << 16  # no channel, class or layer count is larger; a bomb's is
_WORD = re.compile(r"[\w-]*")
# Read files or addresses, or are not needed for logits: fresh weights come from the library's own rules, losses and
# samplers from the trainer here, pixels' mean and std from `Preprocess`.
_LEFT_OUT = re.compile(
    r"init_cfg|pretrained|checkpoint|loss_.*|class_weight|sampler|train_cfg|test_cfg|data_preprocessor"
)
_FETCHED = ("init_cfg", "pretrained", "data_preprocessor")
_LIBRARIES = ("mmseg.", "mmcv.", "mmengine.", "torch.nn.")


def read_literals(text: str, where: object) -> dict[str, Any]:
    """The assignments of a config, nothing of it run.

    Raises:
        CheckpointError: it holds more than literals, ``dict(...)`` and their like.
    """
    if len(text) > _LONGEST_TEXT:
        raise CheckpointError(where, f"its config is longer than {_LONGEST_TEXT >> 10} KiB", remedy=REMEDY)
    try:
        with warnings.catch_warnings(action="ignore"):  # of the parser, about backslashes
            statements = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(where, f"its config cannot be read ({type(error).__name__})", remedy=REMEDY) from error
    config: dict[str, Any] = {}
    for statement in statements:
        try:
            match statement:
                case ast.Expr(value=ast.Constant()):
                    pass  # a docstring
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    config[name] = ast.literal_eval(_Displays().visit(value))
                case _:
                    raise ValueError
        except (ValueError, TypeError, RecursionError, MemoryError) as error:
            found = " ".join((ast.get_source_segment(text, statement) or "").split())[:60]
            what = f"its config holds more than plain values and was not run (line {statement.lineno}: {found!r})"
            raise CheckpointError(where, what, remedy=REMEDY) from error
    if config.get("custom_imports"):
        raise CheckpointError(where, "its config asks to import other code (custom_imports)", remedy=REMEDY)
    return config


class _Displays(ast.NodeTransformer):
    """Rewrites the calls that stand for values in a dump into what `ast.literal_eval` reads; it refuses all others."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        match node:
            case ast.Call(func=ast.Name(id="dict"), args=[], keywords=pairs):
                return _dict(node, pairs)
            case ast.Call(func=ast.Name(id="dict"), args=[ast.Dict() as inner], keywords=[]):
                return inner  # so dumped where a key is no identifier
            case ast.Call(func=ast.Name(id=name), args=[] | [ast.List() | ast.Tuple() | ast.Set()], keywords=[]):
                items = [item for sequence in node.args for item in getattr(sequence, "elts", ())]
                kinds = {"list": ast.List, "tuple": ast.Tuple, "set": ast.Set}
                return kinds[name](elts=items) if name in kinds else node
            case ast.Call(func=ast.Name(id="float"), args=[ast.Constant(value=str() as value)], keywords=[]):
                return ast.Constant(float(value))
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(float(node.id)) if node.id in ("inf", "nan") else node  # as a dump spells them

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if not isinstance(node.value, (int, float, str, type(None))):
            raise ValueError
        if isinstance(node.value, int) and abs(node.value) > _LONGEST_INT:
            raise ValueError
        return node


def _dict(node: ast.Call, pairs: list[ast.keyword]) -> ast.expr:
    """``dict(a=1, **{"b c": 2})``: what is no identifier is dumped in the second way."""
    parts = [ast.Dict([ast.Constant(pair.arg)], [pair.value]) if pair.arg else pair.value for pair in pairs]
    dicts = [part for part in parts if isinstance(part, ast.Dict)]
    if len(dicts) < len(parts):
        return node
    return ast.Dict([key for each in dicts for key in each.keys], [value for each in dicts for value in each.values])


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
    odd = isinstance(value, str) and not _WORD.fullmatch(value)
    if odd or (isinstance(value, (int, float)) and abs(value) > _LARGEST_NUMBER):
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
