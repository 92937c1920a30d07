"""The user's own code: a factory or class in a file or module that ``--arch`` names, which is consent to run it."""

import ast
import importlib
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from equalize.errors import CheckpointError
from equalize.messages import one_line


def load_factory(arch: str) -> Callable[..., nn.Module]:
    """The object behind ``path/to/file.py:Factory`` or ``package.module:Factory``.

    A CheckpointError if there is no such file, module or name, or the file raises when it is run.
    """
    place, _, name = arch.rpartition(":")
    path = _file(arch)
    if path is not None and not path.is_file():
        raise CheckpointError(place, "no such file")
    try:
        with _importable(arch):
            found: Any = importlib.import_module(place) if path is None else _run_file(path)
    except (Exception, SystemExit) as error:  # a training script may parse its command line and exit
        raise CheckpointError(arch, f"cannot be imported ({one_line(error)})", remedy=_remedy(error, arch)) from error
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise CheckpointError(arch, f"{place} has no factory {name!r}")
    return found  # type: ignore[no-any-return]


def run_factory(factory: Callable[..., nn.Module], arch: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Calls a factory, which may import more of its author's code; a CheckpointError if an import fails."""
    with _importable(arch):
        try:
            return factory(**arguments)
        except ImportError as error:
            raise CheckpointError(
                arch, f"cannot import what it needs ({one_line(error)})", remedy=_remedy(error, arch)
            ) from error


def _file(arch: str) -> Path | None:
    """The file that an ``--arch`` names; None for a module."""
    place = arch.rpartition(":")[0]
    return Path(place).expanduser() if place.endswith(".py") else None


def _remedy(error: BaseException, arch: str) -> str | None:
    """For an import relative to a package, which a file by itself does not have: the form that has one."""
    path = _file(arch)
    if path is None or not isinstance(error, ImportError) or "relative import" not in str(error):
        return None
    path = path.resolve()
    imports = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.ImportFrom)]
    depth = max(1, len(_packages(path)), *(node.level for node in imports))
    module = ".".join((*path.parts[-depth - 1 : -1], path.stem))
    return f"in {path.parents[depth]}, name its package: --arch {module}:{arch.rpartition(':')[2]}"


def _packages(path: Path) -> list[Path]:
    """The packages around a file, innermost first."""
    return list(itertools.takewhile(lambda folder: (folder / "__init__.py").is_file(), path.parents))


def _run_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # it is, for a path that ends with .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    previous = sys.modules.get(path.stem)
    sys.modules[path.stem] = module  # dataclasses and pickle look the module up by name while it runs
    try:
        spec.loader.exec_module(module)
    finally:
        if previous is not None:
            sys.modules[path.stem] = previous
    return module


@contextmanager
def _importable(arch: str) -> Iterator[None]:
    """Lets code import its neighbors: the file's folder, the root of its package, and the working directory."""
    path, places = _file(arch), [Path.cwd()]
    if path is not None:
        path = path.resolve()
        places = [path.parent, path.parents[len(_packages(path))], *places]
    added = [str(place) for place in dict.fromkeys(places)]
    sys.path[:0] = added
    try:
        yield
    finally:
        for place in added:
            if place in sys.path:
                sys.path.remove(place)
