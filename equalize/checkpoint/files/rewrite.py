"""Weights back into the containers they came from: only what changed is replaced."""

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from equalize.checkpoint.files.safetensors_file import read_metadata, read_safetensors
from equalize.checkpoint.files.torch_file import TorchFile, read_torch
from equalize.checkpoint.files.weights import Weights, read_json
from equalize.errors import NumericsError

__all__ = ["changed_tensors", "is_other_copy", "write_flat", "write_weights"]

_COPIES = re.compile(
    r"(pytorch_model|model|tf_model|flax_model)([-.].*)?\.(bin|safetensors|h5|msgpack|onnx|(bin|safetensors)\.index\.json)"
)


def is_other_copy(name: str) -> bool:
    """Whether a file is the same weights in another format, which would be stale beside those written."""
    return _COPIES.fullmatch(name) is not None


def changed_tensors(weights: Weights, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``state`` that differ from those on disk, in the dtype they have there; new keys included.

    Args:
        weights: as read.
        state: the model's tensors by key on disk; keys it lacks stay as they are.

    Raises:
        NumericsError: a value does not fit the dtype on disk.
    """
    floats = {tensor.dtype for tensor in weights.tensors.values() if tensor.is_floating_point()}
    usual = floats.pop() if len(floats) == 1 else None
    changed: dict[str, Tensor] = {}
    shared: dict[tuple[object, ...], Tensor] = {}
    for key, value in state.items():
        new = value.detach().cpu()
        old = weights.tensors.get(key)
        if old is not None and old.shape == new.shape and torch.equal(old.to(new.dtype), new):
            continue
        dtype = old.dtype if old is not None else usual if usual and new.is_floating_point() else new.dtype
        view = (value.data_ptr(), tuple(value.shape), value.stride(), dtype)
        if view not in shared or not value.numel():
            cast = new.to(dtype).contiguous()
            if cast.is_floating_point() and not torch.isfinite(cast).all():
                raise NumericsError(key, f"has values that {dtype} cannot hold".replace("torch.", ""))
            alone = cast.untyped_storage().nbytes() == cast.nbytes  # else torch.save would write what it is a view of
            shared[view] = cast if alone else cast.clone()
        changed[key] = shared[view]
    return changed


def write_weights(
    weights: Weights,
    changed: Mapping[str, Tensor],
    names: Mapping[Path, Path],
    meta: Mapping[str, object],
    nest: str | None = None,
) -> None:
    """Write every file again under a new name: a plain copy where none of its tensors changed.

    Args:
        weights: as read.
        changed: by key on disk; a key that is not there yet goes to the last file.
        names: the file to write for each file read, and for the index.
        meta: what changes under ``meta`` of torch files; None takes an entry away.
        nest: where torch files shall have their state dict, with ``meta`` beside it; None leaves it where it is.
    """
    last = weights.files[-1]
    for path in weights.files:
        mine = {key: tensor for key, tensor in changed.items() if weights.home.get(key, last) == path}
        torch_file = path.suffix != ".safetensors"
        if not mine and weights.renamed is None and not (meta and torch_file):
            shutil.copyfile(path, names[path])
        elif torch_file:
            _rewrite_torch(weights, path, names[path], mine, meta, nest)
        else:
            _rewrite_safetensors(weights, path, names[path], mine)
    if weights.index is not None:
        _rewrite_index(weights, changed, names[weights.index])


def _rewrite_safetensors(weights: Weights, path: Path, target: Path, changed: Mapping[str, Tensor]) -> None:
    _save({**weights.as_named(read_safetensors(path)), **_unshared(changed)}, target, read_metadata(path))


def _rewrite_torch(
    weights: Weights,
    path: Path,
    target: Path,
    changed: Mapping[str, Tensor],
    meta: Mapping[str, object],
    nest: str | None,
) -> None:
    file = read_torch(path)
    if weights.renamed is not None:
        tensors = weights.as_named(file.state)
        others = {key: value for key, value in file.mapping.items() if not isinstance(value, Tensor)}
        file.mapping.clear()
        file.mapping.update(others | tensors)
    file.mapping.update({key: _as_was(file.mapping.get(key), tensor) for key, tensor in changed.items()})
    size = sum(tensor.nbytes for tensor in file.state.values())
    content = file.content if nest is None else _nested(file, nest)
    if file.meta or nest is not None:
        told = content.get("meta")
        merged = {**(told if isinstance(told, dict) else {}), **meta}
        content["meta"] = {key: value for key, value in merged.items() if meta.get(key, ...) is not None}
    try:
        torch.save(content, target)
    except RuntimeError as error:  # all that torch says of a failed write
        number = errno.ENOSPC if shutil.disk_usage(target.parent).free < size else errno.EIO
        raise OSError(number, os.strerror(number)) from error


def _as_was(old: object, tensor: Tensor) -> Tensor:
    """A tensor in the memory layout of the one that it replaces, and a parameter if that was one."""
    if not isinstance(old, Tensor) or old.shape != tensor.shape:
        return tensor
    if old.stride() != tensor.stride():  # channels last
        tensor = torch.empty_like(old, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
    return nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor


def _nested(file: TorchFile, nest: str) -> dict[str, Any]:
    """The content of a file with its state dict under one key, wherever it was."""
    state = file.mapping
    if file.nest == (nest,):
        return dict(file.content)
    if not file.nest:
        return {**{key: value for key, value in state.items() if not isinstance(value, Tensor)}, nest: file.state}
    *way, last = file.nest
    around = file.content
    for key in way:
        around = around[key]
    del around[last]
    return {**file.content, nest: state}


def _rewrite_index(weights: Weights, changed: Mapping[str, Tensor], target: Path) -> None:
    assert weights.index is not None
    content: Any = read_json(weights.index)
    homes = {**dict.fromkeys(changed, weights.files[-1]), **weights.home}
    content["weight_map"] = {key: path.name for key, path in homes.items()}
    metadata = content.get("metadata")
    changes = changed or weights.renamed is not None
    if changes and isinstance(metadata, dict) and isinstance(metadata.get("total_size"), int):
        metadata["total_size"] = sum(tensor.nbytes for tensor in {**weights.tensors, **changed}.values())
    target.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_flat(tensors: Mapping[str, Tensor], target: Path) -> None:
    """A plain safetensors file of a model's state dict."""
    _save(_unshared({key: tensor.contiguous() for key, tensor in tensors.items()}), target, {"format": "pt"})


def _save(tensors: dict[str, Tensor], target: Path, metadata: dict[str, str] | None) -> None:
    """Write safetensors; what the operating system says comes out as an OSError."""
    try:
        save_file(tensors, target, metadata=metadata)
    except SafetensorError as error:
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        number = int(found.group(1))
        raise OSError(number, os.strerror(number)) from error


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory: give each of them its own."""
    seen: set[int] = set()
    alone: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        alone[key] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return alone
