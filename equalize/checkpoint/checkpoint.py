"""`Checkpoint`: a model, what belongs to it, and the way back to disk."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from equalize.checkpoint.files.atomic import atomic_directory, copy_side_files
from equalize.checkpoint.files.rewrite import is_other_copy, replacements, write_flat, write_weights
from equalize.checkpoint.files.weights import ARCHITECTURE_FILE, Weights
from equalize.checkpoint.preprocess import Preprocess
from equalize.errors import CheckpointError, SiteError

__all__ = ["PLAN_FILE", "Checkpoint", "Origin"]

PLAN_FILE = "equalize.json"

Family = Literal["transformers", "smp", "torchvision", "mmsegmentation", "custom"]


class _Receipt(Protocol):
    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a checkpoint came from, and what it takes to write it back."""

    path: Path
    """The file or directory that was read."""
    weights: Weights
    disk_state: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    """A state dict of the model -> its tensors by the key they have, or shall have, on disk."""
    config: Mapping[str, object] | None = None
    """Fields that ``config.json`` has to change to, where a decoder was drawn."""
    architecture: Mapping[str, object] | None = None
    """Content of ``architecture.json``; given for state dicts alone."""
    prefix: str = ""
    """What wrappers put before the model's keys on disk."""
    model_key: Mapping[str, str] = field(default_factory=dict)
    """Key on disk -> model key, where they differ by more than ``prefix``."""
    beside: tuple[Path, ...] = ()
    """Files from elsewhere that belong beside the weights: the config a state dict was read with."""
    meta: Mapping[str, object] = field(default_factory=dict)
    """What has to change under ``meta`` of a torch file; None takes an entry away."""
    nest: str | None = None
    """Where a torch file shall have its state dict, with ``meta`` beside it; None leaves it where it is."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Files to write beside the weights, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A segmentation network as it was found."""

    source: str
    """As typed."""
    family: Family
    architecture: str
    model: nn.Module
    """In eval mode and float32; on the meta device if loaded without weights."""
    preprocess: Preprocess
    classes: tuple[str, ...] | None
    revision: str | None
    """The commit that a Hub id resolved to."""
    drawn: tuple[str, ...] = ()
    """The model's state-dict keys that ``init_missing`` drew."""
    notes: tuple[str, ...] = ()
    """What was chosen where the files left a choice: a line each, for the user."""
    sha256: str | None = None
    """Over the input's weight files."""
    plan_json: dict[str, Any] | None = None
    """The receipt of an earlier equalization, if there was one."""
    arch: str | None = None
    """The ``--arch`` that builds it again; None for a library's own directory."""
    arch_args: Mapping[str, object] | None = None
    origin: Origin | None = None

    def logits(self, inputs: Tensor) -> Tensor:
        """The main output, (N, classes, h, w), whatever the network wraps it in.

        Args:
            inputs: (N, 3, H, W), as ``preprocess`` makes them.

        Raises:
            SiteError: the output is none that a segmentation network gives.
        """
        return main_output(self.model(inputs), self.architecture)

    def disk_keys(self) -> dict[str, str]:
        """Model key -> key on disk, for tensors stored one to one."""
        state = self.model.state_dict()
        if self.origin is None:
            return {key: key for key in state}
        by_id = {id(tensor): key for key, tensor in state.items()}
        stored = self.origin.disk_state(state)
        return {by_id[id(tensor)]: disk for disk, tensor in stored.items() if id(tensor) in by_id}

    def twin(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What ``model.safetensors`` beside a torch file holds: the tensors on disk by the model's own keys."""
        assert self.origin is not None
        bare, prefix = self.origin.model_key, self.origin.prefix
        keys = self.origin.disk_state(self.model.state_dict())
        return {bare.get(key, key.removeprefix(prefix)): stored[key] for key in keys}

    def save(
        self,
        directory: str | Path,
        plan: _Receipt | None = None,
        *,
        overwrite: bool = False,
        prove: Callable[[Path], _Receipt] | None = None,
    ) -> None:
        """Write the model in the format it came in; tensors that did not change keep every bit.

        Args:
            directory: to be made; whole or absent afterwards.
            plan: the receipt, written as ``equalize.json``.
            overwrite: whether the directory may exist.
            prove: called with what was written before it takes its place; gives the receipt to write, or raises.

        Raises:
            OutputError: the directory exists, or touches the source.
            ResourceError: disk full or not writable.
            NumericsError: a changed value does not fit its dtype on disk.
        """
        origin = self.origin
        if origin is None:
            raise CheckpointError(self.source, "was loaded without weights and cannot be written")
        with atomic_directory(directory, overwrite=overwrite, source=origin.path) as out:
            self._write(origin, out)
            plan = prove(out) if prove is not None else plan
            if plan is not None:
                text = json.dumps(plan.to_json(), indent=2, ensure_ascii=False)
                (out / PLAN_FILE).write_text(text + "\n", encoding="utf-8")

    def _write(self, origin: Origin, out: Path) -> None:
        weights = origin.weights
        state = origin.disk_state(self.model.state_dict())
        changed = replacements(weights, state)
        containers = [*weights.files, *([weights.index] if weights.index else [])]
        names = {path: out / path.name for path in containers}
        lone = origin.architecture is not None and len(containers) == 1
        if lone:
            suffix = ".safetensors" if weights.files[0].suffix == ".safetensors" else ".pth"
            names = {weights.files[0]: out / f"model{suffix}"}
        if origin.path.is_dir():
            others = {path for path in origin.path.iterdir() if is_other_copy(path.name)}
            copy_side_files(origin.path, out, leave_out={*containers, *others})
        for path in origin.beside:
            shutil.copyfile(path, out / path.name)
        for name, text in origin.texts.items():
            (out / name).write_text(text, encoding="utf-8")
        write_weights(weights, changed, names, origin.meta, origin.nest)
        if lone and names[weights.files[0]].suffix == ".pth":
            write_flat(self.twin({**weights.tensors, **changed}), out / "model.safetensors")
        if origin.architecture is not None:
            (out / ARCHITECTURE_FILE).write_text(json.dumps(origin.architecture, indent=2) + "\n", encoding="utf-8")
        if origin.config:
            _edit_config(out / "config.json", origin.config)


def _edit_config(path: Path, fields: Mapping[str, object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    content.update(fields)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main_output(output: Any, architecture: str) -> Tensor:
    """The (N, classes, h, w) tensor in what a segmentation network returns."""
    if isinstance(output, Mapping) and "out" in output:
        output = output["out"]
    elif hasattr(output, "class_queries_logits"):  # mask classification: MaskFormer and its successors
        classes = output.class_queries_logits.softmax(-1)[..., :-1]
        return torch.einsum("nqc,nqhw->nchw", classes, output.masks_queries_logits.sigmoid())
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    if isinstance(output, Tensor) and output.ndim >= 4:
        return output
    raise SiteError(
        architecture, "returns no logits", got=type(output).__name__, expected="a tensor (N, classes, h, w)"
    )
