"""Loads transformers' models by its own loader and renames tensors to the keys on disk by its own conversion."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from equalize.checkpoint.build import construct
from equalize.checkpoint.families.transformers.config import named_class, read_config, target_class
from equalize.checkpoint.family import KeyMap, Loaded
from equalize.checkpoint.files.weights import Weights, weight_files
from equalize.checkpoint.fill import check_finite, mismatch_error, only_class_count
from equalize.checkpoint.keys import PREFIXES, WRAPPERS, copy_notes, prefix_of, strippings
from equalize.checkpoint.limits import limit_construction
from equalize.checkpoint.request import Request
from equalize.errors import CheckpointError
from equalize.eval_mode import refusing
from equalize.quiet import quiet_transformers
from equalize.seeded import seeded

_COUNTER = "num_batches_tracked"


def skeleton(kind: Any, config: Any) -> nn.Module:
    """The network of a config on the meta device."""
    with quiet_transformers(), limit_construction(None):
        return construct(partial(kind, config), kind.__name__, on_meta=True)


def load(kind: Any, config: Any, weights: Weights, request: Request, *, strip: bool) -> Loaded:
    """The network of a config with copies of its tensors.

    ``strip``: whether keys may carry a wrapper's prefix (those of a state dict may, those of a directory may not).
    """
    where = request.source
    tensors = {key: tensor.clone() for key, tensor in weights.tensors.items()}  # for the model to own
    bare = _best_reading(skeleton(kind, config), tensors) if strip else {key: key for key in tensors}
    check_finite(tensors, where)
    state = {key: tensors[disk] for key, disk in bare.items()}
    with seeded(request.seed), limit_construction(tensors, draw=request.init_missing):
        model, info = _from_pretrained(kind, where, None, config=config, state_dict=state)
    keys = list(model.state_dict())
    missing, mismatched = _missing(info, keys), _mismatched(info)
    initialized = tuple(key for key in keys if key in {*missing, *mismatched})
    if initialized:
        unexpected = sorted(info["unexpected_keys"])
        if len(unexpected) > len(keys) - len(initialized):  # it is another network that shares a few keys
            raise mismatch_error(where, kind.__name__, missing, unexpected, mismatched)
        if not (request.init_missing and only_class_count(mismatched, request.num_classes)):
            named = named_class(config) or config.model_type
            what = kind.__name__ if named == kind.__name__ else f"{kind.__name__} (it is a {named})"
            raise mismatch_error(where, what, missing, [], mismatched, init_missing=request.init_missing)
    return Loaded(
        model=model,
        keys=KeyMap(
            weights=weights,
            to_disk=partial(_disk_state, model, bare, initialized),
            newly_initialized=initialized,
            prefix=prefix_of(bare),
        ),
        notes=tuple(copy_notes(where, tensors, bare)),
    )


def _from_pretrained(kind: Any, where: object, place: Path | None, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model, and transformers' loading info about its keys."""
    what = f"cannot be loaded as {kind.__name__}"  # whose code may raise anything for a config of unknown origin
    with quiet_transformers(), refusing(lambda why: CheckpointError(where, f"{what} ({why})")):
        model, info = kind.from_pretrained(
            place,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
            **options,
        )
    return model.eval(), info


def _missing(info: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """Keys that are missing on disk, except BatchNorm counters that old files lack."""
    found = [key for key in keys if key in info["missing_keys"]]
    return [key for key in found if not key.endswith(_COUNTER) or key.removesuffix(_COUNTER) + "running_mean" in found]


def _mismatched(info: Mapping[str, Any]) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Key -> (shape in the model, shape on disk)."""
    return {key: (torch.Size(in_model), torch.Size(disk)) for key, disk, in_model in info["mismatched_keys"]}


def _best_reading(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Key without the wrapper's prefix -> key on disk."""
    known = set(model.state_dict()) | set(revert(model, model.state_dict()))
    known |= {key.removeprefix(f"{model.base_model_prefix}.") for key in known}
    return max(strippings(tensors, model.state_dict()), key=lambda reading: len(reading.keys() & known))


def without_wrappers(kind: Any, config: Any, weights: Weights, name: str) -> tuple[Weights, tuple[str, ...]]:
    """A directory's weights under keys that ``from_pretrained`` knows, and a note if wrappers' names were in them."""
    names = WRAPPERS | {prefix.removesuffix(".") for prefix in PREFIXES}
    if names.isdisjoint(part for key in weights.tensors for part in key.split(".")):
        return weights, ()
    reading = _best_reading(skeleton(kind, config), weights.tensors)
    gone = {part for key, disk in reading.items() for part in (Counter(disk.split(".")) - Counter(key.split(".")))}
    if not gone or not gone <= names:  # any other prefix is a base model's, which transformers finds itself
        return weights, ()
    note = f"{name}: keys are written without the names of wrappers ({', '.join(sorted(gone))}), for from_pretrained"
    return weights.under({disk: key for key, disk in reading.items()}), (note,)


def revert(model: nn.Module, state: Mapping[str, Tensor], *, as_loaded: bool = True) -> dict[str, Tensor]:
    """Tensors of a model under the names that transformers writes to disk.

    Reverts the renamings that loading applied, or all those that the model's type has.
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


def place_backbone(model: nn.Module, weights: Weights, name: str) -> tuple[Weights, tuple[str, ...]]:
    """Weights renamed to the keys of the network, and a note if they were renamed.

    transformers itself finds a base model in a directory, as SegFormer's in ``nvidia/mit-b0``; it does not
    find the backbone of UPerNet and similar networks.
    """
    own = model.state_dict()
    # The keys of the modules, and those that transformers writes; it reads either, but not a mixture.
    states = (own, revert(model, own, as_loaded=False))
    readings = strippings(weights.tensors)
    if any(2 * len(reading.keys() & (states[0].keys() | states[1].keys())) >= len(reading) for reading in readings):
        return weights, ()
    found = [
        (place, _under(place, state, weights, readings))
        for state in states
        for place in sorted({".".join(key.split(".")[:depth]) + "." for key in state for depth in (1, 2)})
    ]
    place, names = max(found, key=lambda each: len(each[1]))
    if 2 * len(names) < len(weights.tensors):
        return weights, ()
    note = f"{name}: {len(names)} tensors were taken as those of {place.removesuffix('.')}"
    return weights.under(names), (note,)


def _under(place: str, state: Mapping[str, Tensor], weights: Weights, readings: list[dict[str, str]]) -> dict[str, str]:
    """Key on disk -> key under the prefix ``place``; empty if a part would not fit.

    A wrapper's name may go with some keys and not with others: networks of transformers differ in this.
    """
    names: dict[str, str] = {}
    for reading in readings:
        for key, disk in reading.items():
            if place + key in state and state[place + key].shape == weights.tensors[disk].shape:
                names[disk] = place + key
    parts = {key.partition(".")[0] for key in names}
    left = [key for key in weights.tensors if key not in names and key.partition(".")[0] in parts]
    fits = len(set(names.values())) == len(names)
    # Old files hold position tables, which transformers computes today.
    return names if fits and not any(weights.tensors[key].is_floating_point() for key in left) else {}


def _disk_state(
    model: nn.Module, bare: Mapping[str, str], newly_initialized: Sequence[str], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a state dict of the model by the key they have, or shall have, in the files they came from."""
    written = revert(model, state)
    plain = not model.__dict__.get("_weight_conversions")  # the file has the modules' own keys: write the rest likewise
    initialized = revert(model, {key: state[key] for key in newly_initialized}, as_loaded=plain)
    prefix = f"{model.base_model_prefix}."
    found: dict[str, Tensor] = {}
    for key, disk in bare.items():
        for name in (key, prefix + key, key.removeprefix(prefix)):
            if name in written:
                found[disk] = written[name]
                break
    return {**{prefix_of(bare) + key: tensor for key, tensor in initialized.items()}, **found}


def class_fields(names: Mapping[int, str]) -> dict[str, object]:
    """The fields of ``config.json`` that hold the names of classes."""
    return {
        "id2label": {str(number): str(name) for number, name in names.items()},
        "label2id": {str(name): int(number) for number, name in names.items()},
    }


def reload(directory: Path, kind: Any = None) -> nn.Module:
    """Load with ``from_pretrained`` of ``kind``, or else of the config's class; an error if it misses a key."""
    kind = kind or target_class(read_config(directory), directory)
    named = re.fullmatch(r"(?:pytorch_model|model)\.([\w-]+)\.(?:bin|safetensors)", weight_files(directory)[0][0].name)
    variant = None if named is None else named[1]
    model, info = _from_pretrained(kind, directory, directory, variant=variant, local_files_only=True)
    missing, mismatched = _missing(info, list(model.state_dict())), _mismatched(info)
    if missing or mismatched:
        raise mismatch_error(directory, kind.__name__, missing, [], mismatched)
    for parameter in nn.Module.parameters(
        model
    ):  # copied: unaligned addresses in a mapped file change a product's last bit
        parameter.data = parameter.data.clone()
    return model  # type: ignore[no-any-return]
