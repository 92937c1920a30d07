"""Reads weight files as tensors without running code in them.

Checkpoints are of unknown origin: no code in them is run, and no tensor may be larger than the file. Libraries' errors
about broken files are raised as `CheckpointError`.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from equalize.checkpoint.files.atomic import is_training_state
from equalize.checkpoint.files.safetensors_file import read_keys, read_safetensors
from equalize.checkpoint.files.zip_archive import is_intact
from equalize.errors import CheckpointError, ResourceError
from equalize.messages import first_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
ARCHITECTURE_FILE = "architecture.json"
"""Written beside a state dict: the ``arch`` and ``arch_args`` it was read with; and its ``key``, if that was chosen."""
SAFETENSORS_COPY = "model.safetensors"
"""Written beside a torch file, by the model's own keys."""
_LFS_POINTER = b"version https://git-lfs"
_STANDARD_NAMES = [f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The tensors of one checkpoint as they lie on disk."""

    files: tuple[Path, ...]
    """The files that hold tensors: one, or the shards in order."""
    index: Path | None
    """The JSON file that says which shard holds which key, if there are shards."""
    tensors: Mapping[str, "Tensor"]
    """By the key on disk; memory-mapped where the format allows."""
    file_of: Mapping[str, Path]
    """The file of each key."""
    meta: Mapping[str, object] = field(default_factory=dict)
    """The entry ``meta`` of a torch file, where frameworks describe the network."""
    notes: tuple[str, ...] = ()
    """What was chosen where a file left a choice."""
    key: str | None = None
    """The ``--key`` that chose among several state dicts of a torch file."""
    renamed: bool = False
    """Whether the keys differ from those in the files; what is written has the keys here."""

    @property
    def shapes(self) -> dict[str, "torch.Size"]:
        """By the key on disk."""
        return {key: tensor.shape for key, tensor in self.tensors.items()}

    def under(self, names: Mapping[str, str]) -> "Weights":
        """The same tensors under other keys, by the mapping ``names``; keys that it lacks are dropped."""
        tensors = {names[key]: tensor for key, tensor in self.tensors.items() if key in names}
        file_of = {names[key]: path for key, path in self.file_of.items() if key in names}
        return replace(self, tensors=tensors, file_of=file_of, renamed=True)

    def sha256(self) -> str:
        """Over the bytes of all files, in order."""
        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
        return digest.hexdigest()


def read_weights(files: tuple[Path, ...], index: Path | None = None, key: str | None = None) -> Weights:
    """Read and check weight files; ``key`` chooses among several state dicts of a torch file.

    A CheckpointError if one is missing, damaged, of another format, names code to run, or holds several state dicts.
    """
    tensors: dict[str, Tensor] = {}
    file_of: dict[str, Path] = {}
    meta: dict[str, object] = {}
    notes: list[str] = []
    for path in files:
        check_readable(path)
        if path.suffix == ".safetensors":
            if key is not None:
                what = f"{path.name} is safetensors, which nests nothing"
                raise CheckpointError("--key", what, remedy="leave it away")
            found = read_safetensors(path)
        else:
            from equalize.checkpoint.files.torch_file import read_torch  # imports torch

            file = read_torch(path, key)
            found, meta = file.state, {**meta, **file.meta}
            if file.others:
                read, *left = ["/".join(way) for way in (file.nest, *file.others)]
                notes.append(f"{path.name}: read from {read!r}; left as it is: {', '.join(map(repr, left))}")
            if state := file.training_state:
                notes.append(f"{path.name}: holds the state of a training too, which copies keep: {first_of(state)}")
        tensors |= found
        file_of |= dict.fromkeys(found, path)
    if not tensors:
        raise CheckpointError(files[0], "holds no tensors", expected="a state dict")
    return Weights(files=files, index=index, tensors=tensors, file_of=file_of, meta=meta, notes=tuple(notes), key=key)


def directory_weights(directory: Path, key: str | None = None) -> Weights:
    """Those of a checkpoint directory; without ``key`` under the one that was recorded when it was written."""
    if key is None and (directory / ARCHITECTURE_FILE).is_file():
        recorded = read_json(directory / ARCHITECTURE_FILE).get("key")
        key = None if recorded is None else str(recorded)
    files, index = weight_files(directory)
    return read_weights(files, index, key)


def check_directory(directory: Path) -> None:
    """Demands that a checkpoint directory holds weights that are not damaged; raises what `directory_weights` raises.

    Torch is imported only for torch files without the copy that `Checkpoint.save` puts beside them, or without
    checksums.
    """
    files, _ = weight_files(directory)
    for path in files:
        check_readable(path)
    if all(path.suffix == ".safetensors" for path in files):
        if not sum(len(read_keys(path)) for path in files):
            raise CheckpointError(files[0], "holds no tensors", expected="a state dict")
    elif _is_copied(directory) and is_intact(files[0]):
        read_keys(directory / SAFETENSORS_COPY)
    else:
        directory_weights(directory)


def state_on_disk(path: str | Path) -> dict[str, "Tensor"]:
    """The tensors of a weight file or of a checkpoint directory, flat, by the key they have on disk."""
    place = Path(path)
    return dict((directory_weights(place) if place.is_dir() else read_weights((place,))).tensors)


def safetensors_copy(directory: Path) -> dict[str, "Tensor"] | None:
    """The tensors of ``model.safetensors`` that `Checkpoint.save` wrote beside a torch file, if it did."""
    return read_safetensors(directory / SAFETENSORS_COPY) if _is_copied(directory) else None


def _is_copied(directory: Path) -> bool:
    written = (ARCHITECTURE_FILE, "model.pth", SAFETENSORS_COPY)
    return all((directory / name).is_file() for name in written)


def weight_files(directory: Path) -> tuple[tuple[Path, ...], Path | None]:
    """The weight files of a checkpoint directory and their index, by the libraries' own order of preference.

    A CheckpointError if there are no weights, several to choose from, or a shard is missing.
    """
    if (directory / ARCHITECTURE_FILE).is_file() and (nested := directory / "model.pth").is_file():
        return (nested,), None
    for name in _STANDARD_NAMES:
        path = directory / name
        if path.is_file():
            return (shards(path), path) if name.endswith(".json") else ((path,), None)
    files = [path for path in directory.iterdir() if path.suffix in WEIGHT_SUFFIXES and path.is_file()]
    loose = sorted(path for path in files if not is_training_state(path.name) and path.name != "training_args.bin")
    if len(loose) == 1:
        return (loose[0],), None
    if loose:
        what, got = f"holds {len(loose)} weight files", ", ".join(path.name for path in loose[:3])
        raise CheckpointError(directory, what, got=got, remedy="name the file itself")
    expected = "model.safetensors, pytorch_model.bin or a state dict"
    raise CheckpointError(directory, "holds no weights", expected=expected)


def shards(index: Path) -> tuple[Path, ...]:
    """The files that an index names; a CheckpointError if it is none, or a file is missing or lies elsewhere."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(index, "has no weight_map from keys to file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            what = f"names the shard {name[:80]!r}, which is missing beside it"
            raise CheckpointError(index, what, remedy="download it again")
    return tuple(index.parent / name for name in names)


def check_readable(path: Path) -> None:
    """Refuse, by a CheckpointError, what cannot be a weight file; a ResourceError if it may not be read."""
    if not path.is_file():
        raise CheckpointError(path, "is not a regular file" if path.exists() else "no such file or directory")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise ResourceError(path, f"cannot be read ({error.strerror})") from error
    if not head:
        raise CheckpointError(path, "is empty")
    if head.startswith(_LFS_POINTER):
        raise CheckpointError(path, "is a Git-LFS pointer, not the weights", remedy="run `git lfs pull`")
    is_html = head.lstrip().lower().startswith((b"<!doctype", b"<html"))
    if is_html or all(byte in b"\t\n\r\f\x1b" or 32 <= byte < 127 for byte in head):
        raise CheckpointError(path, "is an HTML page or other text, not weights", remedy="download the file itself")


def read_json(path: Path) -> dict[str, object]:
    """A JSON object; a CheckpointError if the file is missing or holds none, a ResourceError if it may not be read."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(path, "no such file") from error
    except OSError as error:
        raise ResourceError(path, f"cannot be read ({error.strerror})") from error
    if raw.startswith(_LFS_POINTER):
        raise CheckpointError(path, "is a Git-LFS pointer, not the file itself", remedy="run `git lfs pull`")
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, "is not valid JSON") from error
    if not isinstance(content, dict):
        raise CheckpointError(path, "is not a JSON object")
    return content
