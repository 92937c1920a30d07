"""mmsegmentation: its networks built from a config, and nothing else that its registries can reach."""

import contextlib
import copy
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from equalize.checkpoint.families.mmsegmentation.config import REMEDY, Config, types_in
from equalize.errors import CheckpointError, ResourceError

__all__ = ["builder", "check_types", "dump", "library", "quiet", "run_config"]

_SEGMENTORS = ("EncoderDecoder", "CascadeEncoderDecoder")
# Where a registered class may be defined if a stranger's config names it. TIMMBackbone, VPD and CLIPTextEncoder are
# kept out: their constructors read files by name.
_HOMES = (
    "mmseg.models.backbones.",
    "mmseg.models.decode_heads.",
    "mmseg.models.necks.",
    "mmcv.cnn.bricks.",
    "torch.nn.modules.",
    "mmengine.utils.dl_utils.parrots_wrapper",  # SyncBN
)
_LEFT_OUT = (
    "mmseg.models.backbones.timm_backbone",
    "mmseg.models.backbones.vpd",
    "mmseg.models.decode_heads.point_head",  # gives no logits without being told where
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """mm libraries warn of what they lack on import and log to stdout, which is for answers alone."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


def library() -> Any:
    """mmsegmentation's registry of models, which is an extra.

    Raises:
        ResourceError: not installed.
    """
    try:
        with quiet():
            importlib.import_module("mmseg.models")
            return importlib.import_module("mmseg.registry").MODELS
    except ImportError as error:
        raise ResourceError(
            "mmsegmentation", f"cannot be imported ({error})", remedy="pip install 'equalize[mmseg]'"
        ) from error


def check_types(model: Config, where: object) -> None:
    """Let pass only a segmentor whose parts are mmsegmentation's own: looked up, not imported by name.

    Raises:
        CheckpointError: a ``type`` is none of these.
    """
    registry = library()
    if model["type"] not in _SEGMENTORS:
        what, expected = "is no network that is supported", " or ".join(_SEGMENTORS)
        raise CheckpointError(where, what, got=str(model["type"])[:60], expected=expected)
    for name in types_in({key: value for key, value in model.items() if key != "type"}):
        found = _registered(registry, name)
        home = str(getattr(found, "__module__", "")) + "."
        if found is None or not home.startswith(_HOMES) or home.startswith(_LEFT_OUT):
            raise CheckpointError(
                where,
                "its config names a part that is none of mmsegmentation's own",
                got=repr(name)[:60],
                remedy=REMEDY,
            )


def _registered(registry: Any, name: object) -> object:
    while registry is not None:
        if isinstance(name, str) and name in registry.module_dict:
            return registry.module_dict[name]
        registry = registry.parent
    return None


def builder(model: Config, *, draw: bool, trusted: bool) -> Callable[[], nn.Module]:
    """A function that builds a network with fresh weights; nothing is downloaded.

    Args:
        model: as `bare_model` gives it, or of a config that the user let run.
        draw: initialise as mmsegmentation does before a training, not only as torch does.
        trusted: whether the user named the config, which may then have parts imported.
    """

    def make() -> nn.Module:
        registry = library()
        from mmengine import ConfigDict  # some parts read their options as attributes

        guard = contextlib.nullcontext() if trusted else _only_registered()
        with quiet(), guard, registry.switch_scope_and_registry("mmseg") as scoped:
            network = scoped.build(ConfigDict(copy.deepcopy(dict(model))))
            if draw:
                network.init_weights()
            from mmengine.model import revert_sync_batchnorm

            reverted: nn.Module = revert_sync_batchnorm(network)
        return reverted

    return make


@contextlib.contextmanager
def _only_registered() -> Iterator[None]:
    """A registry that lacks a name would import it as a module; here it just lacks it."""
    from mmengine.registry import registry

    def refuse(name: str) -> None:
        raise KeyError(name)

    before, registry.get_object_from_string = registry.get_object_from_string, refuse
    try:
        yield
    finally:
        registry.get_object_from_string = before


def run_config(path: Path) -> dict[str, Any]:
    """Run a config file that the user named, with its bases and imports.

    Raises:
        CheckpointError: it is missing, or raises.
    """
    library()
    if not path.is_file():
        raise CheckpointError(path, "no such file", expected="a config of mmsegmentation")
    from mmengine.config import Config as Runnable

    try:
        with quiet():
            config: dict[str, Any] = Runnable.fromfile(path).to_dict()
    except Exception as error:  # whatever the user's file raises
        line = " ".join(str(error).split())[:160]
        raise CheckpointError(path, f"cannot be run as a config ({type(error).__name__}: {line})") from error
    return config


def dump(config: Config) -> str:
    """The text of a config as mmengine writes it: assignments of plain values."""
    from mmengine.config import Config as Runnable

    with quiet():
        return str(Runnable(dict(config)).pretty_text)
