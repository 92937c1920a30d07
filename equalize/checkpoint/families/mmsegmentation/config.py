"""mmsegmentation configs that come with a checkpoint: Python text from a stranger, read as data and never run.

mmengine's own readers execute a config. What training writes into a checkpoint is a dump of values, though: assignments
of literals and of ``dict(...)``. The calls are rewritten into displays and `ast.literal_eval` reads the result, which
refuses everything else.
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
# Read files or addresses, or are not needed for logits: fresh weights come from the library's own rules, losses and
# samplers from the trainer here, pixels' mean and std from `Preprocess`.
_LEFT_OUT = re.compile(
    r"init_cfg|pretrained|checkpoint|loss_.*|class_weight|sampler|train_cfg|test_cfg|data_preprocessor|_scope_"
)
_LIBRARIES = ("mmseg.", "mmcv.", "mmengine.", "torch.nn.")


def read_literals(text: str, where: object) -> dict[str, Any]:
    """The assignments of a config, nothing of it run; an error if it holds more than literals and ``dict(...)``."""
    config: dict[str, Any] = {}
    try:
        with warnings.catch_warnings(action="ignore"):  # of the parser, about backslashes
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
    """Rewrites the calls that a dump holds into what they give: ``dict(a=1)`` into ``{"a": 1}``."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """``inf`` and ``nan``, as a dump spells them."""
        return ast.Constant(value=float(node.id)) if node.id in ("inf", "nan") else node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """``dict`` of keywords, or of a display where a key is no identifier; other calls stay, and are refused."""
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

    Of one that is trusted, because the user let it run, all but what it would fetch stays as it is.
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
            return value.rpartition(".")[2]  # found by its last name in the registry, or refused
        return value

    return dict(bare(model, "model"))


def leaves(value: Any, key: object = None) -> Iterator[tuple[object, Any]]:
    """Every value of a config that holds no others, and the key that it stands under."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from leaves(inner, name)
    elif isinstance(value, (list, tuple, set)):
        for inner in value:
            yield from leaves(inner, key)
    else:
        yield key, value


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
