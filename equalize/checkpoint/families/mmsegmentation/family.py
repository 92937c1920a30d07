"""State dicts of mmsegmentation. The config in a checkpoint is parsed, one that the user names is run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from equalize.checkpoint.families.mmsegmentation import registry
from equalize.checkpoint.families.mmsegmentation.config import Config, bare_model, read_literals, with_classes
from equalize.checkpoint.families.mmsegmentation.description import (
    CONFIG_FILE,
    MMSegmentationDescription,
    architecture_of,
    binary_threshold,
    scored_head,
)
from equalize.checkpoint.families.mmsegmentation.facts import (
    class_names,
    config_text,
    meta_with_classes,
    meta_with_reduced_labels,
    palette,
    preprocessing,
    renumbered_note,
    windows_note,
    with_reduced_labels,
)
from equalize.checkpoint.family import Family, Loaded, SaveSpec, Spec, ignored_notes
from equalize.checkpoint.files.weights import Weights
from equalize.checkpoint.keys import unwrapped
from equalize.checkpoint.outputs import named_outputs
from equalize.checkpoint.request import Request
from equalize.checkpoint.source import Place
from equalize.errors import CheckpointError

_SCHEME = MMSegmentationDescription.scheme
"""Alone: the config in or beside the checkpoint; ``mmseg:config.py``: run that file."""
_NEST = "state_dict"  # where mmengine looks for the state dict


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spec(Spec):
    text: str | None
    """The config to write beside the weights; None if it cannot be read without being run."""
    meta: Mapping[str, object]
    """Changes under ``meta`` for another number of classes."""


class MMSegmentation(MMSegmentationDescription, Family[_Spec]):
    """Checkpoints of mmengine's runner, with their config inside or beside them."""

    arch_forms = ("mmseg:config.py",)
    needs_model_keys = True

    def claims(self, place: Place, weights: Weights, request: Request) -> bool:
        """By ``--arch``, by the config in the file, or by the key ``decode_head.conv_seg`` of its heads."""
        if request.arch is not None:
            return request.scheme == self.scheme
        named = any("decode_head.conv_seg." in unwrapped(key) for key in weights.tensors)
        return named or config_text(weights.meta) is not None

    def open(self, place: Place, weights: Weights, request: Request) -> _Spec:
        """Read the config that came with the weights as data, or run the one that the user names."""
        config, text = _run(Path(request.arch_name)) if request.arch_name else _read(place.path, weights, request)
        trusted = text is None
        model = bare_model(config, request.source, trusted=trusted)
        number, meta = _num_classes(request), {}
        if number is not None and with_classes(model, number) != model:
            model = with_classes(model, number)
            meta = meta_with_classes(None)
            if text is not None:
                text = registry.dump({**config, "model": with_classes(config["model"], number)})
                meta |= {key: text for key in ("cfg", "config") if key in weights.meta}
        names, colors = class_names(weights.meta), palette(weights.meta)
        head, above = scored_head(model), binary_threshold(model)
        there = head.get("num_classes")
        return _Spec(
            architecture=architecture_of(model),
            make=partial(registry.build, model, draw=request.init_missing, trusted=trusted),
            preprocess=preprocessing(config, weights.meta),
            classes=names if names and len(names) == there else None,
            palette=colors if colors and len(colors) == there else None,
            num_classes=number,
            logit_threshold=0.0 if above is None else math.log(above / (1 - above)),
            notes=(
                *ignored_notes(head.get("ignore_index"), there),
                *renumbered_note(weights.meta),
                *([] if above is None else [f"a probability above {above:g} is class 1, as the config's head has it"]),
                *windows_note(config),
            ),
            arch=f"{_SCHEME}:{request.arch_name}" if trusted else _SCHEME,
            arguments={"num_classes": number} if trusted and number is not None else {},  # else in its text
            limited=not trusted,
            text=text,
            meta=meta,
        )

    def save_spec(self, spec: _Spec, loaded: Loaded, place: Place) -> SaveSpec:
        """Puts the config beside the weights; a backbone's file gets the layout of mmengine's runner."""
        meta = dict(spec.meta)
        if loaded.keys.missing:  # the meta of a backbone may describe the network it was trained in
            same = config_text(loaded.keys.weights.meta) == spec.text
            meta |= {} if same else {"cfg": spec.text, "config": None}
            meta |= {} if spec.classes else meta_with_classes(None)
        return replace(
            super().save_spec(spec, loaded, place),
            meta=meta,
            nest=_NEST if loaded.keys.missing else None,
            texts={} if spec.text is None else {CONFIG_FILE: spec.text},
        )

    def with_classes(self, save: SaveSpec, names: tuple[str, ...]) -> SaveSpec:
        """Puts the names into the file's ``meta``, where it has one."""
        if not (save.keys.weights.meta or save.nest):
            return super().with_classes(save, names)
        return replace(save, meta={**save.meta, **meta_with_classes(names)})

    def with_reduced_labels(self, save: SaveSpec, reduced: bool) -> SaveSpec:
        """In the config beside the weights and in their ``meta``, where these say something of it."""
        kept = {**save.keys.weights.meta, **save.meta}
        save = replace(save, meta={**save.meta, **meta_with_reduced_labels(kept, reduced)})
        text = save.texts.get(CONFIG_FILE)
        if text is None or (new := with_reduced_labels(text, reduced)) == text:
            return save
        meta = {key: new for key in ("cfg", "config") if kept.get(key) is not None}
        return replace(save, texts={**save.texts, CONFIG_FILE: new}, meta={**save.meta, **meta})

    def heads(self, model: nn.Module, x_NCHW: Tensor) -> dict[str, Tensor]:
        """Logits (N, classes, h, w) of the last decode head, of those before it in a cascade, and of auxiliary heads.

        The network's own forward gives the last head's alone. In a cascade each head takes the features and the
        logits of the one before. Some heads return several in training, the scored one not always first.
        """
        network: Any = model
        features = network.extract_feat(x_NCHW)
        cascade = network.decode_head if isinstance(network.decode_head, nn.ModuleList) else [network.decode_head]
        output = cascade[0](features)
        found: dict[str, Tensor] = {}
        for stage, head in enumerate(cascade[1:]):
            found |= named_outputs(output, x_NCHW.shape, f"decode_head.{stage}")
            output = head(features, output)
        if type(cascade[-1]).__name__ == "PIDHead" and isinstance(output, tuple):
            output = output[:2]  # the third shows boundaries, not classes
        auxiliary = getattr(network, "auxiliary_head", None) or []
        several = auxiliary if isinstance(auxiliary, (nn.ModuleList, list)) else [auxiliary]
        for number, head in enumerate(several):
            found |= named_outputs(head(features), x_NCHW.shape, f"auxiliary_head.{number}")
        return {**named_outputs(output, x_NCHW.shape, "decode_head"), **found}

    def runs_code(self, arch: str) -> bool:
        """True if a config file is named."""
        return arch != self.scheme


def _read(path: Path, weights: Weights, request: Request) -> tuple[Config, str | None]:
    """The config that came with the weights, as data, and its text."""
    beside = path / CONFIG_FILE
    if request.arch is not None and path.is_dir() and beside.is_file():
        text: str | None = beside.read_text(encoding="utf-8", errors="replace")
    else:
        text = config_text(weights.meta)
    if text is None:
        remedy = "name the config: --arch mmseg:config.py"
        raise CheckpointError(request.source, "holds no config of mmsegmentation", remedy=remedy)
    return _checked(text, request.source), text


def _run(file: Path) -> tuple[Config, str | None]:
    """The config that the user named, and its text if plain values describe it: OUT then needs no other file."""
    config = registry.run_config(file.expanduser())
    text = registry.dump(config)
    try:
        return _checked(text, file), text
    except CheckpointError:
        return config, None


def _checked(text: str, where: object) -> Config:
    config = read_literals(text, where)
    registry.check_parts(bare_model(config, where), where)
    return config


def _num_classes(request: Request) -> int | None:
    """The number that the user gave, or that the record has for a config that was run."""
    if unknown := set(request.arch_args) - {"num_classes"}:
        where = f"--arch-arg {sorted(unknown)[0]}"
        raise CheckpointError(where, "is no argument of a config", remedy="change the config instead")
    recorded: Any = request.arch_args.get("num_classes")
    return request.num_classes or recorded
