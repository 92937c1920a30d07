"""transformers: directories as ``save_pretrained`` writes them, and state dicts under a config that the user names."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from equalize.checkpoint.families.transformers import config as configs
from equalize.checkpoint.families.transformers import loader
from equalize.checkpoint.family import Family, Loaded, SaveSpec, Spec
from equalize.checkpoint.files.weights import Weights, read_json
from equalize.checkpoint.outputs import main_output
from equalize.checkpoint.preprocess import Preprocess
from equalize.checkpoint.request import Request
from equalize.checkpoint.source import Place
from equalize.errors import CheckpointError

_CONFIG_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
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


class Transformers(Family[_Spec]):
    """Loaded and written back by transformers' own code, which renames keys between disk and model."""

    name = "transformers"
    library = "transformers"
    scheme = "transformers"
    arch_forms = ("transformers:DIR",)
    config_field = "model_type"

    def claims(self, place: Place, weights: Weights, request: Request) -> bool:
        """By the config beside the weights, or by ``--arch``."""
        return request.scheme == self.scheme or (request.arch is None and _is_directory(place))

    def open(self, place: Place, weights: Weights, request: Request) -> _Spec:
        """Read the config without running code."""
        directory = place.path if request.arch is None else Path(request.arch_name).expanduser()
        state_dict = not _is_directory(place)
        if state_dict and request.arch_args:
            raise CheckpointError(request.arch, "takes no --arch-arg", remedy="change its config.json")
        config = configs.read_config(directory, request.num_classes)
        kind = configs.target_class(config, directory)
        return _Spec(
            architecture=kind.__name__,
            make=partial(kind, config),
            preprocess=configs.preprocessing(directory if state_dict else place.path),
            classes=configs.labels(config),
            num_classes=request.num_classes,
            arch=request.arch,
            kind=kind,
            config=config,
            directory=directory,
            state_dict=state_dict,
        )

    def needs_weights(self, place: Place, request: Request) -> bool:
        """False for a directory; a file that the user names is read even so, to report what is wrong with it."""
        return not _is_directory(place)

    def outline(self, spec: _Spec, weights: Weights, request: Request) -> tuple[nn.Module, tuple[str, ...]]:
        """Built from the config alone: keys on disk differ from those of the model."""
        return loader.skeleton(spec.kind, spec.config), ()

    def load(self, spec: _Spec, weights: Weights, request: Request) -> Loaded:
        """Through ``from_pretrained``."""
        notes = weights.notes
        if spec.arch is not None:
            model = loader.skeleton(spec.kind, spec.config)
            weights, more = loader.place_backbone(model, weights, Path(request.source).name)
            notes += more
        loaded = loader.load(spec.kind, spec.config, weights, request, strip=spec.state_dict)
        return replace(loaded, notes=notes)

    def save_spec(self, spec: _Spec, loaded: Loaded, place: Place) -> SaveSpec:
        """The config, updated where parts or a network around a backbone are new; a record for a state dict."""
        config = loader.config_fields(loaded.model)
        if spec.state_dict:
            files = tuple(spec.directory / name for name in _CONFIG_FILES if (spec.directory / name).is_file())
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
        """In the config, as ``id2label``."""
        return replace(save, config={**(save.config or {}), **loader.class_fields(dict(enumerate(names)))})

    def with_preprocess(self, save: SaveSpec, preprocess: Preprocess) -> SaveSpec:
        """Also in the image processor's own fields, if there is one."""
        save = super().with_preprocess(save, preprocess)
        places = [save.path, *(path.parent for path in save.beside)]
        found = next((path for place in places if (path := place / _CONFIG_FILES[1]).is_file()), None)
        if found is None:
            return save
        text = json.dumps(configs.with_preprocessing(read_json(found), preprocess), indent=2, ensure_ascii=False)
        return replace(save, texts={**save.texts, found.name: f"{text}\n"})

    def reload(self, place: Place, request: Request) -> nn.Module:
        """By ``from_pretrained``."""
        return loader.reload(place.path)

    def heads(self, model: nn.Module, x_NCHW: Tensor) -> list[Tensor]:
        """Logits (N, classes, h, w), with those of an auxiliary head, which a hook collects as no output has them."""
        auxiliary: list[Tensor] = []
        head = getattr(model, "auxiliary_head", None)
        hooks = []
        if isinstance(head, nn.Module):
            hooks.append(head.register_forward_hook(lambda *call: auxiliary.append(call[-1])))
        try:
            return [main_output(model(x_NCHW), type(model).__name__), *auxiliary]
        finally:
            for hook in hooks:
                hook.remove()

    def architecture(self, out: Path) -> str:
        """The class that the config names, if any."""
        named = read_json(out / "config.json").get("architectures")
        return str(named[0]) if isinstance(named, list) and named else ""

    def loading_code(self, out: Path, repository: str | None = None, revision: str | None = None) -> str:
        """``from_pretrained`` of the class that the config names, and of the processor."""
        named = self.architecture(out)
        name = named if named.isidentifier() else "AutoModelForSemanticSegmentation"
        where = f'"{repository or out}"' + (f', revision="{revision}"' if revision else "")
        if not any((out / file).is_file() for file in _CONFIG_FILES[1:]):
            return f"from transformers import {name}\n\nmodel = {name}.from_pretrained({where})"
        return (
            f"from transformers import AutoImageProcessor, {name}\n\n"
            f"processor = AutoImageProcessor.from_pretrained({where})\n"
            f"model = {name}.from_pretrained({where})"
        )

    def recorded(self, arch: str, directory: Path) -> str | None:
        """Only the config beside the weights."""
        return f"{self.scheme}:{directory}" if arch == _ITSELF else None


def _is_directory(place: Place) -> bool:
    config: Mapping[str, object] = place.config
    return "model_type" in config or "auto_map" in config
