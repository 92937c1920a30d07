"""`Checkpoint`: a loaded model with its preprocessing and classes, and how it is written back to disk."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from equalize.checkpoint.activations import THRESHOLDS, Activations
from equalize.checkpoint.family import Family, SaveSpec
from equalize.checkpoint.files.atomic import PLAN_FILE, atomic_directory, copy_side_files
from equalize.checkpoint.files.rewrite import changed_tensors, other_copies, write_flat, write_weights
from equalize.checkpoint.files.weights import ARCHITECTURE_FILE, read_json
from equalize.checkpoint.outputs import ScoredOutput, listed, logits_of_padded, named_outputs, scored_output
from equalize.checkpoint.preprocess import Preprocess
from equalize.errors import CheckpointError
from equalize.eval_mode import eval_mode
from equalize.messages import Notify, ignore

if TYPE_CHECKING:
    from equalize.plan.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A loaded segmentation network, and what is needed to write it back."""

    source: str
    """MODEL as the user typed it."""
    adapter: Family[Any]
    """The family that loaded it."""
    architecture: str
    model: nn.Module
    """In eval mode and float32; on the meta device if loaded without weights."""
    preprocess: Preprocess
    classes: tuple[str, ...] | None
    palette: tuple[tuple[int, int, int], ...] | None = None
    """Red, green and blue of each class, where the files say."""
    revision: str | None
    """The commit that a Hub id resolved to."""
    notes: tuple[str, ...] = ()
    """What was chosen where the files left a choice: a line each, for the user."""
    sha256: str | None = None
    """Over the bytes of the weight files that were read."""
    plan_json: dict[str, Any] | None = None
    """Content of ``equalize.json`` beside the weights, if it was equalized before."""
    arch: str | None = None
    """The ``--arch`` that builds it again; None for a library's own directory."""
    arch_args: Mapping[str, object] | None = None
    output: str | None = None
    """Which of several outputs is scored: its key or index, as the user or a record has it."""
    num_classes: int | None = None
    """Of the network, if the files or the user say."""
    threshold: float = 0.0
    """Above which a single output is class 1: what `with_output` found the network to end in; 0 for logits."""
    logit_threshold: float = 0.0
    """Above which a single logit is class 1, as the network's library has it."""
    save_spec: SaveSpec | None = None
    """What is needed to write it back; None if it was loaded without weights."""
    missing: tuple[str, ...] = ()
    """Keys that the files lack and ``init_missing`` would draw; known of a checkpoint loaded without weights alone."""
    multiple: int = 1
    """Images are padded to sides that are multiples of it, where that is all that the network takes."""

    @property
    def family(self) -> str:
        """transformers, smp, torchvision, mmsegmentation or custom."""
        return self.adapter.name

    @property
    def newly_initialized(self) -> tuple[str, ...]:
        """State-dict keys of tensors that the checkpoint lacked and ``init_missing`` initialized."""
        return self.save_spec.keys.newly_initialized if self.save_spec else ()

    @property
    def stored(self) -> SaveSpec:
        """What is needed to write it back; a CheckpointError if it was loaded without weights."""
        if self.save_spec is None:
            raise CheckpointError(self.source, "was loaded without weights and cannot be written")
        return self.save_spec

    def with_names(self, names: Sequence[str]) -> "Checkpoint":
        """The checkpoint with these class names, which `save` writes to the format's own field or to a file."""
        names = tuple(names)
        if names == self.classes:
            return self
        save = None if self.save_spec is None else self.adapter.with_classes(self.save_spec, names)
        return replace(self, classes=names, palette=None, save_spec=save)

    def with_reduced_labels(self, reduced: bool) -> "Checkpoint":
        """The checkpoint as trained on labels that were reduced by one, or not, of which `save` leaves a record."""
        return replace(self, save_spec=self.adapter.with_reduced_labels(self.stored, reduced))

    @property
    def reduced_before(self) -> bool | None:
        """Whether it was trained on reduced labels; None if its configuration does not say, or its head is new."""
        return None if self.newly_initialized else self.preprocess.reduce_labels

    def logits(self, inputs: Tensor) -> Tensor:
        """See `scores`; inputs are (N, C, H, W). Images of sizes that the network does not take are padded."""
        return logits_of_padded(lambda padded: self.scores(self.model(padded), padded), inputs, self.multiple)

    def scores(self, output: Any, inputs: Tensor) -> Tensor:
        """The main output (N, classes, h, w) of all that the network returned for ``inputs``; a SiteError without one.

        The largest is the class; a single one stands for class 1 where it is above 0: it is given less its threshold.
        """
        found = self.scored(output, inputs).tensor
        threshold = self.threshold or self.logit_threshold
        return found - threshold if threshold and found.shape[1] == 1 else found

    def with_output(self, inputs: Tensor, notify: Notify = ignore) -> "Checkpoint":
        """The checkpoint with what a run shows, which output is scored and whether as probabilities; see `scores`."""
        with eval_mode(self.model), Activations() as seen:
            output = self.model(inputs)
            scored = self.scored(output, inputs)
            name, within = seen.name(scored.tensor), bool(scored.tensor.any()) and _between_0_and_1(scored.tensor)
            if within and name is None:  # logits would grow with what the network is given
                far = self.scored(self.model(-1e6 * inputs), inputs).tensor
                within = _between_0_and_1(far[far.isfinite()])  # an exponential may overflow
        if self.output is not None and not scored.name:
            notify(f"--output {self.output}: the network gives one output alone where it is scored, and that is taken")
        if scored.reason:
            notify(f"outputs {listed(named_outputs(output, inputs.shape))}: {scored.name} is scored, {scored.reason}")
        if name:
            what = "probabilities" if THRESHOLDS[name] > 0 else "logarithms of probabilities"
            notify(f"the network ends in a {name}: what it gives are {what}, not logits")
        elif within:
            notify("all outputs lie between 0 and 1: they are taken as probabilities, not logits")
        chosen = self.output or (scored.name if scored.reason else None)
        return replace(self, output=chosen, threshold=THRESHOLDS[name] if name else 0.5 * within)

    def scored(self, output: Any, inputs: Tensor) -> ScoredOutput:
        """See `scored_output`."""
        return scored_output(output, self.architecture, inputs.shape, chosen=self.output, num_classes=self.num_classes)

    def disk_keys(self) -> dict[str, str]:
        """Model key -> key on disk, for tensors stored one to one."""
        state = self.model.state_dict()
        if self.save_spec is None:
            return {key: key for key in state}
        by_id = {id(tensor): key for key, tensor in state.items()}
        stored = self.save_spec.keys.to_disk(state)
        return {by_id[id(tensor)]: disk for disk, tensor in stored.items() if id(tensor) in by_id}

    def safetensors_copy(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The content of ``model.safetensors`` beside a torch file: the tensors on disk under the model's own keys."""
        keys = self.stored.keys
        on_disk = keys.to_disk(self.model.state_dict())
        return {keys.model_key.get(key, key.removeprefix(keys.prefix)): stored[key] for key in on_disk}

    def save(self, directory: str | Path, plan: "Plan | None" = None, *, overwrite: bool = False) -> None:
        """Write the model in the format it came in; tensors that did not change keep every bit.

        Args:
            directory: to be made; whole or absent afterwards.
            plan: written as ``equalize.json``.
            overwrite: whether the directory may exist.

        Raises:
            NumericsError: a changed value does not fit its dtype on disk. Else see `atomic_directory`.
        """
        with self.writing(directory, overwrite=overwrite) as out:
            if plan is not None:
                write_plan(plan, out)

    @contextmanager
    def writing(self, directory: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
        """Like `save`, but yields the temporary directory, to be checked before it is renamed to its place."""
        spec = self.stored
        with atomic_directory(directory, overwrite=overwrite, source=spec.path) as out:
            self._write(spec, out)
            yield out

    def _write(self, spec: SaveSpec, out: Path) -> None:
        weights = spec.keys.weights
        changed = changed_tensors(weights, spec.keys.to_disk(self.model.state_dict()))
        containers = [*weights.files, *([weights.index] if weights.index else [])]
        names = {path: out / path.name for path in containers}
        lone = spec.architecture is not None and len(containers) == 1
        if lone:
            suffix = ".safetensors" if weights.files[0].suffix == ".safetensors" else ".pth"
            names = {weights.files[0]: out / f"model{suffix}"}
        if spec.path.is_dir():
            copy_side_files(spec.path, out, leave_out={*containers, *other_copies(spec.path)})
        for path in spec.beside:
            shutil.copyfile(path, out / path.name)
        for name, text in spec.texts.items():
            (out / name).write_text(text, encoding="utf-8")
        write_weights(weights, changed, names, spec.meta, spec.nest)
        if lone and names[weights.files[0]].suffix == ".pth":
            write_flat(self.safetensors_copy({**weights.tensors, **changed}), out / "model.safetensors")
        if spec.architecture is not None:
            _write_json(spec.architecture, out / ARCHITECTURE_FILE)
        if spec.config:
            _write_json({**read_json(out / "config.json"), **spec.config}, out / "config.json")


def _between_0_and_1(tensor: Tensor) -> bool:
    return bool(((tensor >= 0) & (tensor <= 1)).all())


def _write_json(content: Mapping[str, object], path: Path) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # JSON, as paths may be no text


def write_plan(plan: "Plan", directory: Path) -> None:
    """Writes ``equalize.json`` beside the weights."""
    _write_json(plan.to_json(), directory / PLAN_FILE)
