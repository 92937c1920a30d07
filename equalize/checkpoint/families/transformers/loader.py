"""transformers' models: tensors in by its own loader, and back under the keys on disk by its own conversion."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from equalize.checkpoint.build import construct, seeded
from equalize.checkpoint.families.transformers.config import named_class, quiet, read_config, target_class
from equalize.checkpoint.files.weights import weight_files
from equalize.checkpoint.fill import check_finite, mismatch_error, only_class_count
from equalize.checkpoint.keys import strippings
from equalize.checkpoint.limits import limit_construction
from equalize.errors import CheckpointError

__all__ = ["Loaded", "config_fields", "disk_state", "fill", "reload", "skeleton", "variant"]

_COUNTER = "num_batches_tracked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A transformers model with its weights."""

    model: nn.Module
    newly_initialized: tuple[str, ...]
    """Model keys that were missing, or whose class count differed."""
    bare: Mapping[str, str]
    """Key without the wrapper's prefix -> key on disk."""

    @property
    def prefix(self) -> str:
        """What wrappers put before the keys on disk."""
        return next((disk.removesuffix(key) for key, disk in self.bare.items()), "")


def skeleton(config: Any, where: object) -> nn.Module:
    """The network of a config on the meta device.

    Raises:
        CheckpointError: the config cannot be built.
    """
    kind = target_class(config, where)
    with quiet(), limit_construction(None):
        return construct(lambda: kind(config), kind.__name__, on_meta=True)


def fill(
    config: Any,
    tensors: Mapping[str, Tensor],
    where: object,
    *,
    init_missing: bool,
    num_classes: int | None,
    seed: int,
    strip: bool,
) -> Loaded:
    """Build the network of a config and load tensors into it with transformers' own loader.

    Args:
        config: of transformers.
        tensors: by the key on disk; the model will own them.
        where: for errors.
        init_missing: draw missing tensors, and a classifier of other classes, with the library's initialiser.
        num_classes: what the config was set to have, if that was asked for.
        seed: of the draw.
        strip: whether keys may carry a wrapper's prefix (lone files may, directories may not).

    Raises:
        CheckpointError: keys missing or of another shape.
        NumericsError: NaN or Inf.
    """
    kind = target_class(config, where)
    bare = _best_reading(config, tensors, where) if strip else {key: key for key in tensors}
    check_finite(tensors, where)
    own = {key: tensors[disk] for key, disk in bare.items()}
    with seeded(seed), limit_construction(tensors, draw=init_missing):
        model, info = _from_pretrained(kind, config, own, where)
    keys = list(model.state_dict())
    missing = [key for key in keys if key in info["missing_keys"]]
    missing = [key for key in missing if not key.endswith(_COUNTER) or _statistics(key) in missing]
    mismatched = {key: (torch.Size(in_model), torch.Size(disk)) for key, disk, in_model in info["mismatched_keys"]}
    drawn = tuple(key for key in keys if key in {*missing, *mismatched})
    if len(info["unexpected_keys"]) > len(keys) - len(drawn) and drawn:  # what came along by chance was not meant
        raise mismatch_error(where, kind.__name__, missing, sorted(info["unexpected_keys"]), mismatched)
    if drawn and len(drawn) == len(keys):
        raise CheckpointError(where, f"has no key in common with {kind.__name__}")
    if drawn and not (init_missing and only_class_count(mismatched, num_classes)):
        named = named_class(config) or config.model_type
        architecture = kind.__name__ if named == kind.__name__ else f"{kind.__name__} (it is a {named})"
        raise mismatch_error(where, architecture, missing, [], mismatched, init_missing=init_missing)
    return Loaded(model=model.eval(), newly_initialized=drawn, bare=bare)


def _from_pretrained(kind: Any, config: Any, state: dict[str, Tensor], where: object) -> tuple[Any, dict[str, Any]]:
    """The model, and what its loader says of the keys."""
    try:
        with quiet():
            found: tuple[Any, dict[str, Any]] = kind.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=False,
            )
    except MemoryError:
        raise
    except Exception as error:  # whatever a network makes of a config from strangers
        raise CheckpointError(
            where, f"cannot be loaded as {kind.__name__} ({' '.join(str(error).split())[:200]})"
        ) from error
    return found


def _statistics(counter: str) -> str:
    return counter.removesuffix(_COUNTER) + "running_mean"


def _best_reading(config: Any, tensors: Mapping[str, Tensor], where: object) -> dict[str, str]:
    model = skeleton(config, where)
    prefix = model.base_model_prefix
    known = set(model.state_dict()) | set(revert(model, model.state_dict()))
    known |= {key.removeprefix(f"{prefix}.") for key in known}
    return max(strippings(tensors), key=lambda reading: len(reading.keys() & known))


def revert(model: nn.Module, state: Mapping[str, Tensor], *, as_loaded: bool = True) -> dict[str, Tensor]:
    """Tensors of a model under the names that transformers writes to disk.

    Args:
        model: of transformers.
        state: its state dict, or a part of it.
        as_loaded: undo the renamings that loading applied; else all those that the type of model has.
    """
    from transformers.core_model_loading import revert_weight_conversion

    applied = model.__dict__.get("_weight_conversions")
    try:
        if not as_loaded:
            model.__dict__.pop("_weight_conversions", None)
        return dict(revert_weight_conversion(model, dict(state)))
    finally:
        if applied is not None:
            model.__dict__["_weight_conversions"] = applied


def disk_state(loaded: Loaded, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict of the model by the key they have, or shall have, in the files they came from."""
    model = loaded.model
    written = revert(model, state)
    plain = not model.__dict__.get("_weight_conversions")  # the file has the keys of the modules: so shall the rest
    drawn = revert(model, {key: state[key] for key in loaded.newly_initialized}, as_loaded=plain)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, Tensor] = {}
    for key, disk in loaded.bare.items():
        for name in (key, prefix + key, key.removeprefix(prefix)):
            if name in written:
                found[disk] = written[name]
                break
    return {**{loaded.prefix + key: tensor for key, tensor in drawn.items()}, **found}


def config_fields(model: nn.Module) -> dict[str, object]:
    """What ``config.json`` must say for ``from_pretrained`` to build a network whose decoder was drawn."""
    config: Any = model.config
    names = {str(number): str(name) for number, name in config.id2label.items()}
    return {
        "architectures": [type(model).__name__],
        "id2label": names,
        "label2id": {name: int(number) for number, name in names.items()},
    }


def variant(files: Sequence[Path], index: Path | None) -> str | None:
    """The ``variant`` that `from_pretrained` must be given to find the weights of a directory.

    Raises:
        CheckpointError: it does not look under such a name.
    """
    if index is not None:
        return None
    named = re.fullmatch(r"(pytorch_model|model)(?:\.([\w-]+))?\.(bin|safetensors)", files[0].name)
    if named is None or (named[1] == "model") != (named[3] == "safetensors"):
        expected = "model.safetensors or pytorch_model.bin"
        raise CheckpointError(
            files[0], "has a name under which from_pretrained does not look", expected=expected, remedy="rename it"
        )
    return named[2]


def reload(directory: Path) -> nn.Module:
    """Load with ``from_pretrained``, and insist on its finding every key.

    Raises:
        CheckpointError: it does not.
    """
    kind = target_class(read_config(directory), directory)
    try:
        with quiet():
            model, info = kind.from_pretrained(
                directory,
                variant=variant(*weight_files(directory)) if not (directory / "model.pth").exists() else None,
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # of an index or a config that misses a field
        line = " ".join(str(error).split())[:200]
        raise CheckpointError(directory, f"from_pretrained refuses it ({type(error).__name__}: {line})") from error
    missing = [key for key in info["missing_keys"] if not key.endswith(_COUNTER)]
    if missing or info["mismatched_keys"]:
        mismatched = {key: (torch.Size(a), torch.Size(b)) for key, b, a in info["mismatched_keys"]}
        raise mismatch_error(directory, kind.__name__, missing, [], mismatched)
    result: nn.Module = model.eval()
    for parameter in nn.Module.parameters(
        result
    ):  # unaligned addresses in a mapped file change the last bit of a product
        parameter.data = parameter.data.clone()
    return result
