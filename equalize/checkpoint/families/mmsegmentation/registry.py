"""Builds mmsegmentation's networks from a config, with registered parts only unless the user trusts the config."""

import contextlib
import copy
import importlib
import re
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from equalize.checkpoint.families.mmsegmentation.config import REMEDY, Config, leaves
from equalize.errors import CheckpointError, ResourceError
from equalize.messages import one_line

_quiet = partial(warnings.catch_warnings, action="ignore")  # mm libraries warn about what is not installed
_WORD = re.compile(r"[\w-]*")
_SEGMENTORS = ("EncoderDecoder", "CascadeEncoderDecoder")
# Modules whose registered classes a config of unknown origin may name. TIMMBackbone, VPD and CLIPTextEncoder are
# excluded: their constructors read files by name.
_MODULES = (
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
    "mmseg.models.decode_heads.point_head",  # gives logits only at points that a caller names
)


def library() -> Any:
    """The registry of models of mmsegmentation, which is an extra."""
    try:
        with _quiet():
            importlib.import_module("mmseg.models")
            return importlib.import_module("mmseg.registry").MODELS
    except ImportError as error:
        what = f"cannot be imported ({error})"
        raise ResourceError("mmsegmentation", what, remedy="pip install 'equalize[mmseg]'") from error


def check_parts(model: Config, where: object) -> None:
    """Let pass only a segmentor whose parts are mmsegmentation's own, made of plain words and numbers: no path."""
    registry = library()
    if model["type"] not in _SEGMENTORS:
        what, expected = "is no network that is supported", " or ".join(_SEGMENTORS)
        raise CheckpointError(where, what, got=str(model["type"])[:60], expected=expected)
    for key, value, _ in leaves({key: inner for key, inner in model.items() if key != "type"}):
        if key == "type" and not _is_own(registry, value):
            what = "its config names a part that is none of mmsegmentation's own"
            raise CheckpointError(where, what, got=repr(value)[:60], remedy=REMEDY)
        if not isinstance(value, int | float | None) and not (isinstance(value, str) and _WORD.fullmatch(value)):
            what = f"its config's {key} is no plain word or number"
            raise CheckpointError(where, what, got=repr(value)[:60], remedy=REMEDY)


def _is_own(registry: Any, name: object) -> bool:
    """Whether a part is registered here, or in what this registry inherits from, and may be built."""
    while registry is not None:
        if isinstance(name, str) and name in registry.module_dict:
            module = f"{registry.module_dict[name].__module__}."
            return module.startswith(_MODULES) and not module.startswith(_LEFT_OUT)
        registry = registry.parent
    return False


def build(model: Config, *, draw: bool, trusted: bool) -> nn.Module:
    """A network with fresh weights from what `bare_model` gives; nothing is downloaded.

    With ``draw`` it is initialized as mmsegmentation does before a training, not only as torch does. With ``trusted``
    parts that are not registered may be imported.
    """
    registry = library()
    from mmengine import ConfigDict  # some parts read their options as attributes
    from mmengine.model import revert_sync_batchnorm

    guard = contextlib.nullcontext() if trusted else _only_registered()
    with _quiet(), guard, registry.switch_scope_and_registry("mmseg") as scoped:
        network = scoped.build(ConfigDict(copy.deepcopy(dict(model))))
        if draw:
            network.init_weights()
        reverted: nn.Module = revert_sync_batchnorm(network)
    return reverted


@contextlib.contextmanager
def _only_registered() -> Iterator[None]:
    """Keeps registries from importing a name that they lack as a module."""
    from mmengine.registry import registry

    def refuse(name: str) -> None:
        raise KeyError(name)

    before, registry.get_object_from_string = registry.get_object_from_string, refuse
    try:
        yield
    finally:
        registry.get_object_from_string = before


def run_config(path: Path) -> dict[str, Any]:
    """Run a config file that the user named, with its bases and imports."""
    library()
    from mmengine.config import Config as Runnable

    try:
        with _quiet():
            return dict(Runnable.fromfile(path).to_dict())
    except Exception as error:  # the user's file may raise anything
        raise CheckpointError(path, f"cannot be run as a config ({one_line(error)})") from error


def dump(config: Config) -> str:
    """The text of a config as mmengine writes it: assignments of plain values."""
    from mmengine.config import Config as Runnable

    with _quiet():
        return str(Runnable(dict(config)).pretty_text)
