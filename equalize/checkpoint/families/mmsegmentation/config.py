"""mmsegmentation configs that come with a checkpoint: Python text of unknown origin, parsed and never run.

mmengine's own readers execute a config. Training writes a dump of values into a checkpoint: assignments of literals and
of ``dict(...)``. These calls are rewritten into dict displays and `ast.literal_eval` reads the result; it refuses
everything else.
"""

import ast
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from equalize.errors import CheckpointError

Config = Mapping[str, Any]

REMEDY = "if you trust its config, name that file and it is run: --arch mmseg:config.py"
_FETCHED = re.compile(r"init_cfg|pretrained|data_preprocessor")
# Keys that read files or addresses, or that logits do not need: weights are initialized by the library's rules, losses
# and samplers come from our trainer, mean and std of pixels from `Preprocess`.
_LEFT_OUT = re.compile(
    r"init_cfg|pretrained|checkpoint|loss_.*|class_weight|sampler|train_cfg|test_cfg|data_preprocessor|_scope_"
)
_LIBRARIES = ("mmseg.", "mmcv.", "mmengine.", "torch.nn.")


def read_literals(text: str, where: object) -> dict[str, Any]:
    """The assignments of a config, which is not run; an error if it holds more than literals and ``dict(...)``."""
    config: dict[str, Any] = {}
    try:
        with warnings.catch_warnings(action="ignore"):  # the parser warns about backslashes
            statements = ast.parse(text).body
        for statement in statements:
            match statement:
                case ast.Expr(value=ast.Constant()):  # a docstring
                    continue
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    config[name] = ast.literal_eval(_Displays().visit(value))
                case _:
                    raise ValueError(f"no assignment on line {statement.lineno}")
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        at = type(error).__name__
        if found := re.search(r"line (\d+)", str(error)):
            line = "".join(text.splitlines()[int(found[1]) - 1 : int(found[1])])
            at = f"line {found[1]}: {' '.join(line.split())[:60]!r}"
        what = f"its config holds more than plain values and was not run ({at})"
        raise CheckpointError(where, what, remedy=REMEDY) from error
    if config.get("custom_imports"):
        raise CheckpointError(where, "its config asks to import other code (custom_imports)", remedy=REMEDY)
    return config


class _Displays(ast.NodeTransformer):
    """Rewrites ``dict`` calls into displays: ``dict(a=1)`` becomes ``{"a": 1}``."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """``inf`` and ``nan``, as a dump spells them, become constants."""
        return ast.Constant(value=float(node.id)) if node.id in ("inf", "nan") else node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """Rewrites ``dict(k=v)`` and ``dict({...})``; other calls stay, and `literal_eval` refuses them."""
        self.generic_visit(node)
        match node:
            case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords) if all(each.arg for each in keywords):
                names: list[ast.expr | None] = [ast.Constant(value=each.arg) for each in keywords]
                return ast.Dict(keys=names, values=[each.value for each in keywords])
            case ast.Call(func=ast.Name(id="dict"), args=[ast.Dict() as inner], keywords=[]):
                return inner
        return node


def bare_model(config: Config, where: object, *, trusted: bool = False) -> dict[str, Any]:
    """The ``model`` of a config without the weights that it would fetch, and without what only a training needs.

    With ``trusted`` (the user let it run) only what it would fetch is removed.
    """
    model = config.get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("type"), str):
        raise CheckpointError(where, "its config has no model", expected="model = dict(type='EncoderDecoder', …)")
    left_out = _FETCHED if trusted else _LEFT_OUT

    def bare(value: Any, key: object) -> Any:
        if isinstance(value, Mapping):
            return {name: bare(inner, name) for name, inner in value.items() if not left_out.fullmatch(str(name))}
        if isinstance(value, (list, tuple, set)):
            return type(value)(bare(inner, key) for inner in value)
        if key == "type" and not trusted and isinstance(value, str) and value.startswith(_LIBRARIES):
            return value.rpartition(".")[2]  # the registry finds classes by name without module
        return value

    return dict(bare(model, "model"))


def leaves(value: Any, key: object = None, inside: Config | None = None) -> Iterator[tuple[object, Any, Config]]:
    """Every value of a config that is no container, with the key that holds it and the dict that has this key."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from leaves(inner, name, value)
    elif isinstance(value, (list, tuple, set)):
        for inner in value:
            yield from leaves(inner, key, inside)
    else:
        yield key, value, inside or {}


def with_classes(model: Config, number: int) -> dict[str, Any]:
    """A model's config with ``number`` classes in its main and auxiliary heads, one output channel each."""

    def changed(head: Any) -> Any:
        if isinstance(head, (list, tuple)):
            return [changed(one) for one in head]
        if not isinstance(head, Mapping) or head.get("num_classes") == number:
            return head
        kept = {key: value for key, value in head.items() if key not in ("out_channels", "threshold")}
        return {**kept, "num_classes": number}

    return {key: changed(value) if key in ("decode_head", "auxiliary_head") else value for key, value in model.items()}
