"""``--arch`` -> a model with fresh weights. Only a file or module that the user names here ever runs."""

import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from equalize.errors import CheckpointError

__all__ = ["CLASS_ARGUMENTS", "class_argument", "construct", "load_factory", "seeded"]

CLASS_ARGUMENTS = ("num_classes", "classes", "n_classes", "num_labels")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw under a seed and give torch's generator back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def construct(make: Callable[[], nn.Module], arch: str, *, weights: bool, seed: int) -> nn.Module:
    """Call a factory on the CPU under a seed, or on the meta device if no weights are wanted.

    Args:
        make: the factory.
        arch: for errors.
        weights: False puts all of it on the meta device.
        seed: of the draw.

    Raises:
        CheckpointError: the factory raises, or returns something that is not a module.
    """
    try:
        with seeded(seed):
            model = make() if weights else _on_meta(make)
    except (Exception, SystemExit) as error:  # whatever a factory raises is an answer to the arguments it was given
        line = " ".join(str(error).split())[:160]
        raise CheckpointError(
            arch, f"cannot be built ({type(error).__name__}: {line})", remedy="check --arch and --arch-arg"
        ) from error
    if not isinstance(model, nn.Module):
        raise CheckpointError(arch, "is no model factory", got=type(model).__name__, expected="a torch.nn.Module")
    return model.eval()


def _on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    try:
        with torch.device("meta"):
            return make()
    except Exception:  # some constructors read values (`torch.linspace(…).item()`), which meta tensors lack
        with _StorageOnMeta():
            model = make()
        return model.to("meta") if isinstance(model, nn.Module) else model


class _StorageOnMeta(TorchFunctionMode):
    """Puts what is made to be filled, as parameters are, on the meta device; ranges of values stay real."""

    _FILLED = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._FILLED and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def load_factory(arch: str) -> Callable[..., nn.Module]:
    """The object behind ``path/to/file.py:Factory`` or ``package.module:Factory``.

    Raises:
        CheckpointError: no such file, module or name, or the file raises when it is run.
    """
    place, colon, name = arch.rpartition(":")
    if not colon or not place or not name:
        raise CheckpointError(
            arch,
            "is no architecture",
            expected="torchvision:NAME, smp:NAME, transformers:DIR, mmseg:config.py, file.py:Factory "
            "or package.module:Factory",
        )
    try:
        module = _run_file(Path(place)) if place.endswith(".py") else _import(place)
    except CheckpointError:
        raise
    except (Exception, SystemExit) as error:  # a training script may parse its own command line, and end
        raise CheckpointError(arch, f"cannot be imported ({type(error).__name__}: {error})") from error
    found = module
    for part in name.split("."):
        found = getattr(found, part, None)  # type: ignore[assignment]
    if not callable(found):
        names = ", ".join(sorted(key for key, value in vars(module).items() if _is_factory(value, module))[:5])
        raise CheckpointError(arch, f"{place} has no factory {name!r}", expected=names or None)
    return found


def _is_factory(value: object, module: ModuleType) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def _run_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise CheckpointError(path, "no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _importable(path.resolve().parent):
        previous = sys.modules.get(path.stem)
        sys.modules[path.stem] = module  # dataclasses and pickling look a module up by name while it runs
        try:
            spec.loader.exec_module(module)
        finally:
            if previous is not None:
                sys.modules[path.stem] = previous
    return module


def _import(name: str) -> ModuleType:
    with _importable(Path.cwd()):
        return importlib.import_module(name)


@contextmanager
def _importable(directory: Path) -> Iterator[None]:
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        if str(directory) in sys.path:
            sys.path.remove(str(directory))


def class_argument(factory: Callable[..., object], arch: str) -> str:
    """The name under which a factory takes the number of classes.

    Raises:
        CheckpointError: it has none of the usual names.
    """
    parameters = inspect.signature(factory).parameters
    for name in CLASS_ARGUMENTS:
        if name in parameters:
            return name
    raise CheckpointError(
        arch,
        "takes no number of classes under a usual name",
        expected=", ".join(CLASS_ARGUMENTS),
        remedy="give it with --arch-arg instead of --num-classes",
    )


def json_arguments(arguments: Mapping[str, object]) -> dict[str, object] | None:
    """The arguments if JSON can hold them, to be written beside a state dict; else None."""
    try:
        return dict(json.loads(json.dumps(dict(arguments))))
    except (TypeError, ValueError):
        return None
