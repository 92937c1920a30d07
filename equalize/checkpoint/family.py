"""The interface of a checkpoint family: a library, or the user's own code.

`load` calls in this order: `claims`, `open`, then `outline` (the structure alone) or `load`, and `save_spec` for
writing. A family returns facts and a model, never a `Checkpoint`, and imports no other family.
"""

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from torch import Tensor, nn

from equalize.checkpoint.build import construct
from equalize.checkpoint.description import Description
from equalize.checkpoint.files.atomic import CLASS_NAMES_FILE
from equalize.checkpoint.files.weights import Weights, safetensors_copy
from equalize.checkpoint.fill import fill, fit, placement_notes, with_model_keys
from equalize.checkpoint.keys import Match
from equalize.checkpoint.limits import limit_construction
from equalize.checkpoint.outputs import named_outputs
from equalize.checkpoint.preprocess import PREPROCESS_FILE, Override, Preprocess
from equalize.checkpoint.request import Request
from equalize.checkpoint.source import Place, fetch_weights, weights_at


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """A network as its checkpoint and the user describe it: facts, no tensors."""

    architecture: str
    make: Callable[[], nn.Module]
    """Builds it with fresh weights; downloads nothing."""
    preprocess: Preprocess
    classes: tuple[str, ...] | None = None
    palette: tuple[tuple[int, int, int], ...] | None = None
    """Red, green and blue of each class, 0 to 255."""
    num_classes: int | None = None
    """The number that the user gave."""
    logit_threshold: float = 0.0
    """The logit above which a single output is class 1."""
    notes: tuple[str, ...] = ()
    """What was chosen where the files left a choice."""
    arch: str | None = None
    """The ``--arch`` that builds it again; None for a library's own directory."""
    arguments: Mapping[str, object] | None = None
    """The ``--arch-arg`` that go with it."""
    limited: bool = True
    """Whether the weights limit its size: true for networks that a checkpoint, not the user, describes."""


def ignored_notes(ignored: object, num_classes: object) -> tuple[str, ...]:
    """A note for the user where a network's configuration says that one of its classes was ignored in training."""
    if not isinstance(ignored, int) or not isinstance(num_classes, int) or not 0 <= ignored < num_classes:
        return ()
    return (f"its training ignored label {ignored}, by its configuration: --ignore-index {ignored} does so too",)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyMap:
    """A model's tensors and those on disk."""

    weights: Weights
    """As read, under the keys that are to be written."""
    to_disk: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    """Maps the model's state dict to its tensors by key on disk, also for keys that the disk lacks yet."""
    newly_initialized: tuple[str, ...] = ()
    """Model keys that were missing on disk, or had another number of classes there."""
    missing: bool = False
    """Whether there were keys that are missing on disk."""
    prefix: str = ""
    """The prefix of wrappers on the keys on disk, such as ``module.``."""
    model_key: Mapping[str, str] = field(default_factory=dict)
    """Key on disk -> model key, where they differ by more than ``prefix``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model with its weights."""

    model: nn.Module
    keys: KeyMap
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveSpec:
    """What is needed to write a model back in the format it came in."""

    path: Path
    """The file or directory that was read."""
    keys: KeyMap
    config: Mapping[str, object] | None = None
    """Fields of ``config.json`` with their new values."""
    architecture: Mapping[str, object] | None = None
    """Content of ``architecture.json``; for state dicts only."""
    beside: tuple[Path, ...] = ()
    """Files from elsewhere that belong beside the weights: the config a state dict was read with."""
    meta: Mapping[str, object] = field(default_factory=dict)
    """Changes under ``meta`` of a torch file; None removes an entry."""
    nest: str | None = None
    """The key for the state dict in a torch file, with ``meta`` beside it; None leaves it where it is."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Files to write beside the weights, by name."""


S = TypeVar("S", bound=Spec)


class Family(Description, Generic[S]):
    """Loads and writes what its `Description` describes. The defaults are those of a state dict with a record."""

    arch_forms: ClassVar[tuple[str, ...]]
    """How its ``--arch`` is spelled, for errors."""
    needs_model_keys: ClassVar[bool] = False
    """Whether its loader requires keys without a wrapper's prefix."""

    @abstractmethod
    def claims(self, place: Place, weights: Weights, request: Request) -> bool:
        """Whether a checkpoint is of this family. Called without weights, then, if none claims it, with them."""

    @abstractmethod
    def open(self, place: Place, weights: Weights, request: Request) -> S:
        """Read the files and the flags; ``weights`` is empty where JSON files describe the structure.

        A CheckpointError if it is of no network that can be built, a ResourceError without its library.
        """

    def fetch(self, place: Place) -> Place:
        """Download the weights of a place that is not on this machine yet."""
        fetch_weights(place)
        return place

    def needs_weights(self, place: Place, request: Request) -> bool:
        """Whether the structure can be known from the weights alone; else a config or its publisher describes it."""
        return request.arch is not None or not (place.config or place.library)

    def outline(self, spec: S, weights: Weights, request: Request) -> tuple[nn.Module, tuple[str, ...]]:
        """The network on the meta device, and notes; keys and shapes must fit as far as there are any."""
        request = replace(request, init_missing=True)  # missing weights do not matter for the structure
        model = _build(spec, weights, request, on_meta=True)
        if not weights.tensors:
            return model, spec.notes
        return model, _pair(model, spec, weights, request)[1]

    def missing(self, model: nn.Module, spec: S, weights: Weights, request: Request) -> tuple[str, ...]:
        """Keys of the outlined network that the checkpoint lacks, as far as is known without reading weights."""
        if not weights.tensors:
            return ()
        return tuple(_pair(model, spec, weights, replace(request, init_missing=True))[0].missing)

    def load(self, spec: S, weights: Weights, request: Request) -> Loaded:
        """Build the network and fill it; see `fit` and `fill` for errors."""
        model = _build(spec, weights, request)
        match, notes = _pair(model, spec, weights, request)
        missing = bool(match.missing)
        weights, match = with_model_keys(weights, match, drop_prefix=self.needs_model_keys)
        keys = KeyMap(
            weights=weights,
            to_disk=match.to_disk,
            newly_initialized=fill(model, weights, match, request.source),
            missing=missing,
            model_key={disk: key for key, disk in match.disk_name.items()},
        )
        return Loaded(model=model, keys=keys, notes=notes)

    def save_spec(self, spec: S, loaded: Loaded, place: Place) -> SaveSpec:
        """What the weights are written back with."""
        try:
            arguments = json.loads(json.dumps(dict(spec.arguments or {})))
        except (TypeError, ValueError):  # objects that JSON cannot hold: a caller in Python passes them again
            arguments = None
        return SaveSpec(path=place.path, keys=loaded.keys, architecture={"arch": spec.arch, "arch_args": arguments})

    def with_classes(self, save: SaveSpec, names: tuple[str, ...]) -> SaveSpec:
        """The spec with class names; by default in ``class_names.json``, for formats without a field for them."""
        text = json.dumps({str(number): name for number, name in enumerate(names)}, indent=2, ensure_ascii=False)
        return replace(save, texts={**save.texts, CLASS_NAMES_FILE: f"{text}\n"})

    def with_preprocess(self, save: SaveSpec, preprocess: Preprocess) -> SaveSpec:
        """The spec with a preprocessing that the user gave; in ``preprocess.json``, which `load` reads."""
        text = json.dumps(Override.of(preprocess).given(), indent=2)
        return replace(save, texts={**save.texts, PREPROCESS_FILE: f"{text}\n"})

    def with_reduced_labels(self, save: SaveSpec, reduced: bool) -> SaveSpec:
        """The spec with what the format's own files say of labels, if they do, as they were in training."""
        return save

    def reload(self, place: Place, request: Request) -> nn.Module:
        """Load what was written, strictly, to verify it: by the library's own loader, by default as a state dict."""
        weights = weights_at(place)
        model = self.load(self.open(place, weights, request), weights, request).model
        if (copy := safetensors_copy(place.path)) is not None:
            nn.Module.load_state_dict(model, copy, strict=True)
        return model

    def heads(self, model: nn.Module, x_NCHW: Tensor) -> dict[str, Tensor]:
        """The outputs that may carry a loss, each (N, classes, h, w), by name; by default all of the network."""
        return named_outputs(model(x_NCHW), x_NCHW.shape)

    def runs_code(self, arch: str) -> bool:
        """Whether building the network of an ``--arch`` runs code that only the user may name."""
        return False

    def recorded(self, arch: str, directory: Path) -> str | None:
        """The ``--arch`` of an architecture.json if it may be used; None if it names code, or files elsewhere."""
        return None if self.runs_code(arch) else arch


def _build(spec: Spec, weights: Weights, request: Request, *, on_meta: bool = False) -> nn.Module:
    """The network of a spec; if ``limited``, an error where it is far larger than the weights can fill."""
    limit = limit_construction(weights.tensors or None, draw=request.init_missing) if spec.limited else nullcontext()
    with limit:
        return construct(spec.make, spec.arch or spec.architecture, on_meta=on_meta, seed=request.seed)


def _pair(model: nn.Module, spec: Spec, weights: Weights, request: Request) -> tuple[Match, tuple[str, ...]]:
    """How a network and its weights pair up, and notes."""
    match = fit(model, weights.tensors, request, num_classes=spec.num_classes, architecture=spec.architecture)
    return match, (*weights.notes, *spec.notes, *placement_notes(request.source, weights, match))
