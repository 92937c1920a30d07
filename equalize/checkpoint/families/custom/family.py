"""A user's own network: the factory in a file or module that ``--arch`` names, which is consent to run it."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from equalize.checkpoint.build import class_argument
from equalize.checkpoint.family import Family, Spec
from equalize.checkpoint.files.weights import ARCHITECTURE_FILE, Weights, read_json
from equalize.checkpoint.preprocess import Preprocess
from equalize.checkpoint.request import Request
from equalize.checkpoint.source import Place
from equalize.errors import CheckpointError


class Custom(Family[Spec]):
    """Networks built by a factory in the user's own code; the last family to be tried."""

    name = "custom"
    arch_forms = ("file.py:Factory", "package.module:Factory")

    def claims(self, place: Place, weights: Weights, request: Request) -> bool:
        """True for any ``--arch``; the other families are tried first."""
        return request.arch is not None

    def open(self, place: Place, weights: Weights, request: Request) -> Spec:
        """Run the file or import the module."""
        arch = str(request.arch)
        factory, arguments = load_factory(arch), dict(request.arch_args)
        if request.num_classes is not None:
            arguments[class_argument(factory, arch)] = request.num_classes
        return Spec(
            architecture=request.arch_name,
            make=partial(factory, **arguments),
            preprocess=Preprocess(origin="ImageNet defaults, the checkpoint does not say", assumed=True),
            num_classes=request.num_classes,
            arch=arch,
            arguments=arguments,
            limited=False,
        )

    def architecture(self, out: Path) -> str:
        """The factory's name, without its file or module."""
        return str(read_json(out / ARCHITECTURE_FILE).get("arch")).rpartition(":")[2]

    def loading_code(self, out: Path, repository: str | None = None, revision: str | None = None) -> str:
        """Code that uses `equalize.load`; empty for a repository, which lacks the factory's code."""
        if repository is not None:
            return ""
        arch = read_json(out / ARCHITECTURE_FILE).get("arch")
        return f'import equalize\n\nmodel = equalize.load("{out}", "{arch}").model'

    def runs_code(self, arch: str) -> bool:
        """Always."""
        return True


def load_factory(arch: str) -> Callable[..., nn.Module]:
    """The object behind ``path/to/file.py:Factory`` or ``package.module:Factory``.

    Raises:
        CheckpointError: no such file, module or name, or the file raises when it is run.
    """
    place, _, name = arch.rpartition(":")
    path = Path(place) if place.endswith(".py") else None
    if path is not None and not path.is_file():
        raise CheckpointError(place, "no such file")
    try:
        with _importable(Path.cwd() if path is None else path.resolve().parent):
            found: Any = importlib.import_module(place) if path is None else _run_file(path)
    except (Exception, SystemExit) as error:  # a training script may parse its command line and exit
        raise CheckpointError(arch, f"cannot be imported ({type(error).__name__}: {error})") from error
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise CheckpointError(arch, f"{place} has no factory {name!r}")
    return found  # type: ignore[no-any-return]


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
def _importable(directory: Path) -> Iterator[None]:
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        if str(directory) in sys.path:
            sys.path.remove(str(directory))
