"""transformers: directories as ``save_pretrained`` writes them, and state dicts under a config that the user names."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from equalize.checkpoint.families.transformers import config as configs
from equalize.checkpoint.families.transformers import loader
from equalize.checkpoint.families.transformers.description import CONFIG_FILES, TransformersDescription
from equalize.checkpoint.family import Family, Loaded, SaveSpec, Spec, ignored_notes
from equalize.checkpoint.files.weights import Weights, read_json
from equalize.checkpoint.outputs import named_outputs
from equalize.checkpoint.preprocess import Preprocess
from equalize.checkpoint.request import Request
from equalize.checkpoint.source import Place
from equalize.checkpoint.user_code import load_factory
from equalize.errors import CheckpointError

_ITSELF = "transformers:."  # in architecture.json: the config is beside the weights


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spec(Spec):
    kind: Any
    """The class of the network."""
    config: Any
    directory: Path
    """Where the config lies."""
    state_dict: bool
    """Whether the weights are a state dict (``--arch transformers:DIR``, architecture.json), not a directory's."""


class Transformers(TransformersDescription, Family[_Spec]):
    """Loaded and written back by transformers' own code, which renames keys between disk and model."""

    arch_forms = ("transformers:DIR",)

    def claims(self, place: Place, weights: Weights, request: Request) -> bool:
        """By the config beside the weights, or by ``--arch``, which may name a class of the user's for a directory."""
        if request.scheme == self.scheme:
            return True
        return self.describes(place.config) and (request.arch is None or _user_class(request.arch) is not None)

    def open(self, place: Place, weights: Weights, request: Request) -> _Spec:
        """Read the config without running code."""
        named = request.arch if request.scheme == self.scheme else None
        directory = place.path if named is None else Path(request.arch_name).expanduser()
        state_dict = not self.describes(place.config)
        if state_dict and request.arch_args:
            raise CheckpointError(request.arch, "takes no --arch-arg", remedy="change its config.json")
        config = configs.read_config(directory, request.num_classes)
        own = None if request.arch is None or named is not None else _user_class(request.arch)
        kind = own or configs.target_class(config, directory)
        return _Spec(
            architecture=kind.__name__,
            make=partial(kind, config),
            preprocess=configs.preprocessing(directory if state_dict else place.path),
            classes=configs.labels(config),
            num_classes=request.num_classes,
            notes=ignored_notes(getattr(config, "semantic_loss_ignore_index", None), config.num_labels),
            arch=named,
            kind=kind,
            config=config,
            directory=directory,
            state_dict=state_dict,
        )

    def needs_weights(self, place: Place, request: Request) -> bool:
        """False for a directory; a file that the user names is read even so, to report what is wrong with it."""
        return not self.describes(place.config)

    def outline(self, spec: _Spec, weights: Weights, request: Request) -> tuple[nn.Module, tuple[str, ...]]:
        """Built from the config alone: keys on disk differ from those of the model."""
        return loader.skeleton(spec.kind, spec.config), spec.notes

    def missing(self, model: Any, spec: _Spec, weights: Weights, request: Request) -> tuple[str, ...]:
        """All but the encoder, where the config names a class that is one, or the weights are those of one."""
        if weights.tensors:
            there = {key.partition(".")[0] for key in loader.place_backbone(model, weights, "")[0].tensors}
        else:
            named = configs.named_class(spec.config) or "Segmentation"
            there = set() if named.endswith("Segmentation") else {model.base_model_prefix}
        keys = list(model.state_dict())
        left = tuple(key for key in keys if key.partition(".")[0] not in there)
        return () if len(left) == len(keys) else left

    def load(self, spec: _Spec, weights: Weights, request: Request) -> Loaded:
        """Through ``from_pretrained``."""
        notes = (*weights.notes, *spec.notes)
        if spec.arch is not None:
            model = loader.skeleton(spec.kind, spec.config)
            weights, more = loader.place_backbone(model, weights, Path(request.source).name)
            notes += more
        elif not spec.state_dict:
            weights, more = loader.without_wrappers(spec.kind, spec.config, weights, Path(request.source).name)
            notes += more
        loaded = loader.load(spec.kind, spec.config, weights, request, strip=spec.state_dict)
        return replace(loaded, notes=(*notes, *loaded.notes))

    def save_spec(self, spec: _Spec, loaded: Loaded, place: Place) -> SaveSpec:
        """The config, updated where parts or a network around a backbone are new; a record for a state dict."""
        model: Any = loaded.model
        config = {"architectures": [type(model).__name__], **loader.class_fields(model.config.id2label)}
        if spec.state_dict:
            files = tuple(spec.directory / name for name in CONFIG_FILES if (spec.directory / name).is_file())
            record = {"arch": _ITSELF, "arch_args": None}
            return SaveSpec(path=place.path, keys=loaded.keys, config=config, architecture=record, beside=files)
        around = spec.arch is not None
        return SaveSpec(
            path=place.path,
            keys=loaded.keys,
            config=config if around or loaded.keys.newly_initialized else None,
            beside=(spec.directory / "config.json",) if around else (),
        )

    def with_classes(self, save: SaveSpec, names: tuple[str, ...]) -> SaveSpec:
        """In the config, as ``id2label``, which also says how many outputs there are: not for two classes of one."""
        before = (read_json(save.path / "config.json") if save.config is None else save.config).get("id2label")
        if len(names) == 2 and isinstance(before, Mapping) and len(before) == 1:
            return super().with_classes(save, names)
        return replace(save, config={**(save.config or {}), **loader.class_fields(dict(enumerate(names)))})

    def with_preprocess(self, save: SaveSpec, preprocess: Preprocess) -> SaveSpec:
        """Also in the image processor's own fields, if there is one."""
        save = super().with_preprocess(save, preprocess)
        return _with_processor(save, lambda processor: configs.with_preprocessing(processor, preprocess))

    def with_reduced_labels(self, save: SaveSpec, reduced: bool) -> SaveSpec:
        """In the image processor's own field, if there is a processor."""
        return _with_processor(save, lambda processor: configs.with_reduced_labels(processor, reduced))

    def reload(self, place: Place, request: Request) -> nn.Module:
        """By ``from_pretrained``."""
        return loader.reload(place.path, None if request.arch is None else _user_class(request.arch))

    def heads(self, model: nn.Module, x_NCHW: Tensor) -> dict[str, Tensor]:
        """The logits, and those of an auxiliary head, which a hook collects as no output has them."""
        auxiliary: dict[str, Tensor] = {}
        head = getattr(model, "auxiliary_head", None)
        hooks = []
        if isinstance(head, nn.Module):
            hooks.append(head.register_forward_hook(lambda *call: auxiliary.update(auxiliary_head=call[-1])))
        try:
            found = named_outputs(model(x_NCHW), x_NCHW.shape)
        finally:
            for hook in hooks:
                hook.remove()
        return {**({"logits": found["logits"]} if "logits" in found else found), **auxiliary}

    def recorded(self, arch: str, directory: Path) -> str | None:
        """Only the config beside the weights."""
        return f"{self.scheme}:{directory}" if arch == _ITSELF else None


def _with_processor(save: SaveSpec, change: Callable[[Mapping[str, object]], Mapping[str, object]]) -> SaveSpec:
    """The spec with changes to the image processor's config, if there is one."""
    name = CONFIG_FILES[1]
    places = [save.path, *(path.parent for path in save.beside)]
    found = next((path for place in places if (path := place / name).is_file()), None)
    if found is None:
        return save
    before = json.loads(save.texts[name]) if name in save.texts else read_json(found)
    after = change(before)
    if after == before:
        return save
    return replace(save, texts={**save.texts, name: json.dumps(after, indent=2, ensure_ascii=False) + "\n"})


def _user_class(arch: str) -> Any:
    """The class of the user's own code that an ``--arch`` names, if it is a network of transformers' kind."""
    place = arch.rpartition(":")[0]
    if not place.endswith(".py") and "." not in place:  # the scheme of a library
        return None
    from transformers import PreTrainedModel

    found = load_factory(arch)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None
