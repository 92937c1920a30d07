"""Reads transformers' JSON files without running code: config, segmentation class, class names, preprocessing."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from equalize.checkpoint.families.transformers.description import is_known
from equalize.checkpoint.files.weights import read_json
from equalize.checkpoint.preprocess import Preprocess
from equalize.errors import CheckpointError
from equalize.eval_mode import refusing
from equalize.quiet import quiet_transformers

_ATTENTIONS = (None, "eager", "sdpa")  # other values may fetch code from the Hub


_REDUCE_KEYS = ("do_reduce_labels", "reduce_labels")  # the second is that of old versions


def read_config(directory: Path, num_classes: int | None = None) -> Any:
    """Read ``config.json`` without running code, and set the number of classes if ``num_classes`` is another."""
    from transformers import AutoConfig

    path = directory / "config.json"
    raw = read_json(path)
    _check_for_code(raw, path)
    if raw.get("quantization_config"):
        raise CheckpointError(path, "is of a quantized network", remedy="use the checkpoint that it was made of")
    with quiet_transformers(), refusing(partial(_invalid, path, "config")):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        if num_classes is not None and config.num_labels != num_classes:
            config.num_labels = num_classes
    return config


def _invalid(path: Path, what: str, why: str) -> CheckpointError:
    return CheckpointError(path, f"is not a valid {what} ({why})")


def _check_for_code(config: Mapping[str, object], path: Path) -> None:
    """Refuse a config that names code on the Hub under any key: a module, or a kernel for attention."""
    stack: list[object] = [config]
    while stack:
        value = stack.pop()
        if isinstance(value, Mapping):
            for key, inner in value.items():
                kernel = key.endswith(("attn_implementation", "experts_implementation"))
                if key == "auto_map" or (kernel and inner not in _ATTENTIONS):
                    raise CheckpointError(
                        path, f"asks for code from the Hub ({key})", remedy="not supported: use --arch"
                    )
            stack += value.values()
        elif isinstance(value, list):
            stack += value


def target_class(config: Any, where: object) -> Any:
    """The segmentation class for a config: the one it names, else the one of its model type."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    named = named_class(config)
    if named is not None and named.endswith("Segmentation"):
        found = getattr(transformers, named, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    for mapping in (auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING, auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    if not is_known(named or ""):
        what = f"is a {named}, a class of its author's code and none of transformers"
        remedy = f"name it: --arch file.py:{named}"
        raise CheckpointError(where, what, remedy=remedy)
    raise CheckpointError(
        where,
        f"is a {named or config.model_type}, for which transformers has no segmentation network",
        remedy="put it under one, such as UperNet, with --arch transformers:DIR_WITH_CONFIG",
    )


def named_class(config: Any) -> str | None:
    """The first of the config's architectures, None if it is no string."""
    match config.architectures:
        case [str(name), *_]:
            return name
    return None


def labels(config: Any) -> tuple[str, ...] | None:
    """The class names of a config, in order."""
    names = config.id2label
    return tuple(str(names[number]) for number in sorted(names)) if names else None


def preprocessing(directory: Path) -> Preprocess:
    """From the image processor's config, if the directory has one."""
    from transformers import AutoImageProcessor

    for name in ("preprocessor_config.json", "processor_config.json"):
        if (path := directory / name).is_file():
            raw = read_json(path)
            _check_for_code(raw, path)
            with quiet_transformers(), refusing(partial(_invalid, path, "image processor config")):
                processor = AutoImageProcessor.from_pretrained(
                    directory, trust_remote_code=False, local_files_only=True
                )
                known = {**processor.to_dict(), "do_reduce_labels": _reduces_labels(raw)}
                return Preprocess.from_processor(known, f"from {name}")
    return Preprocess(origin="ImageNet defaults, there is no preprocessor_config.json", assumed=True)


def _reduces_labels(raw: Mapping[str, Any]) -> object:
    """What the file says, None if nothing: the processor has False then, which says nothing of the training."""
    inner = raw.get("image_processor", raw)  # as it lies in processor_config.json
    return next((inner[key] for key in _REDUCE_KEYS if key in inner), None) if isinstance(inner, Mapping) else None


def with_reduced_labels(processor: Mapping[str, object], reduced: bool) -> dict[str, object]:
    """An image processor's config that says whether labels are reduced; it need not if they are not."""
    there = [key for key in _REDUCE_KEYS if key in processor]
    return {**processor, **dict.fromkeys(there or _REDUCE_KEYS[:reduced], reduced)}


def with_preprocessing(processor: Mapping[str, object], preprocess: Preprocess) -> dict[str, object]:
    """An image processor's config with a preprocessing, but for its size."""
    flips = preprocess.channels == "BGR"
    return {
        **processor,
        **({"do_flip_channel_order": flips} if flips or "do_flip_channel_order" in processor else {}),
        "do_rescale": True,
        "rescale_factor": preprocess.rescale,
        "do_normalize": True,
        "image_mean": list(preprocess.mean) if len(preprocess.mean) > 1 else preprocess.mean[0],
        "image_std": list(preprocess.std) if len(preprocess.std) > 1 else preprocess.std[0],
    }
