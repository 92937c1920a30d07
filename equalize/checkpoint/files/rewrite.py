"""Writes weights back into the kinds of files they came from, replacing only tensors that changed."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from equalize.checkpoint.files.safetensors_file import read_metadata
from equalize.checkpoint.files.torch_file import TorchFile, read_torch
from equalize.checkpoint.files.weights import Weights, read_json
from equalize.errors import NumericsError

_COPIES = re.compile(
    r"(pytorch_model|model|tf_model|flax_model)([-.].*)?\.(bin|safetensors|h5|msgpack|onnx|(bin|safetensors)\.index\.json)"
)
_EXPORTS = re.compile(r".*\.(onnx|onnx_data|tflite)|openvino_model.*\.(bin|xml)")


def other_copies(directory: Path) -> set[Path]:
    """Files that hold the same weights in another format, and would be stale beside those written.

    What was exported may lie in folders, such as ``onnx/``.
    """
    copies = {path for path in directory.iterdir() if _COPIES.fullmatch(path.name)}
    return copies | {path for path in directory.rglob("*") if _EXPORTS.fullmatch(path.name)}


def changed_tensors(weights: Weights, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``state`` that differ from those on disk, in the dtype they have there; new keys included.

    ``state``: tensors of the model by key on disk; keys it lacks stay as they are. A NumericsError if a value does not
    fit the dtype on disk.
    """
    floats = {tensor.dtype for tensor in weights.tensors.values() if tensor.is_floating_point()}
    usual = floats.pop() if len(floats) == 1 else None
    changed: dict[str, Tensor] = {}
    for key, value in state.items():
        new = value.detach().cpu()
        old = weights.tensors.get(key)
        if old is not None and old.shape == new.shape and torch.equal(old.to(new.dtype), new):
            continue
        dtype = old.dtype if old is not None else usual if usual and new.is_floating_point() else new.dtype
        cast = new.to(dtype).contiguous()
        if cast.is_floating_point() and not torch.isfinite(cast).all():
            raise NumericsError(key, f"has values that {dtype} cannot hold".replace("torch.", ""))
        alone = cast.untyped_storage().nbytes() == cast.nbytes  # of a view torch.save would write the whole storage
        changed[key] = cast if alone else cast.clone()
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
        weights, changed: as read; and by key on disk, where a key that is not there yet goes to the last file.
        names: file read (or index) -> file to write.
        meta, nest: see `SaveSpec`.
    """
    file_of = {**dict.fromkeys(changed, weights.files[-1]), **weights.file_of}
    for path in weights.files:
        torch_file = path.suffix != ".safetensors"
        mine = {key: tensor for key, tensor in changed.items() if file_of[key] == path}
        if not mine and not weights.renamed and not (meta and torch_file):
            shutil.copyfile(path, names[path])
            continue
        kept = {key: tensor for key, tensor in weights.tensors.items() if file_of[key] == path}
        if torch_file:
            file = read_torch(path, weights.key)
            if weights.renamed:
                for key in file.state:
                    del file.mapping[key]
            file.mapping.update({**(kept if weights.renamed else {}), **mine})
            _save_torch(file, names[path], meta, nest)
        else:
            _save_safetensors({**kept, **mine}, names[path], read_metadata(path))
    if weights.index is not None:
        content: Any = read_json(weights.index)
        content["weight_map"] = {key: path.name for key, path in file_of.items()}
        metadata = content.get("metadata")
        if (changed or weights.renamed) and isinstance(metadata, dict) and isinstance(metadata.get("total_size"), int):
            metadata["total_size"] = sum(tensor.nbytes for tensor in {**weights.tensors, **changed}.values())
        text = json.dumps(content, indent=2, sort_keys=True)
        names[weights.index].write_text(text + "\n", encoding="utf-8")


def _save_torch(file: TorchFile, target: Path, meta: Mapping[str, object], nest: str | None) -> None:
    content = file.content if nest is None or file.nest == (nest,) else {nest: file.state}
    if file.meta or nest is not None:
        merged = {**file.meta, **meta}
        content["meta"] = {key: value for key, value in merged.items() if meta.get(key, ...) is not None}
    with _os_errors(target):
        torch.save(content, target)


def write_flat(tensors: Mapping[str, Tensor], target: Path) -> None:
    """A plain safetensors file of a model's state dict."""
    _save_safetensors({key: tensor.contiguous() for key, tensor in tensors.items()}, target, {"format": "pt"})


def _save_safetensors(tensors: Mapping[str, Tensor], target: Path, metadata: dict[str, str] | None) -> None:
    """Write tensors, copying those that share memory, which safetensors refuses."""
    seen: set[int] = set()
    alone: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        alone[key] = tensor.clone() if place in seen else tensor
        seen.add(place)
    with _os_errors(target):
        save_file(alone, target, metadata=metadata)


@contextmanager
def _os_errors(target: Path) -> Iterator[None]:
    """Turns a failed write into an OSError: safetensors gives the number in its text, torch does not."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        errno_text = re.search(r"os error (\d+)", str(error))
        full = shutil.disk_usage(target.parent).free < 1 << 20
        number = int(errno_text[1]) if errno_text else errno.ENOSPC if full else errno.EIO
        raise OSError(number, os.strerror(number)) from error
