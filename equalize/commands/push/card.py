"""The model card: metadata for the Hub and a text for readers, both from facts alone.

The generated text stands between two marks: in a card that its user goes on editing, a later push renews only what
stands between them.
"""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from equalize.checkpoint.files.weights import ARCHITECTURE_FILE, read_json, read_weights
from equalize.checkpoint.keys import PREFIXES
from equalize.commands.push.facts import Facts
from equalize.commands.push.files import without_paths
from equalize.errors import CheckpointError, InputError

__all__ = ["Loading", "describe_loading", "model_card"]

_BEGIN = "<!-- equalize: written from facts; a later push renews what stands between these marks -->"
_END = "<!-- equalize: end -->"
_GENERATED = re.compile(re.escape(_BEGIN) + r".*?" + re.escape(_END), re.DOTALL)

_SMP = "segmentation-models-pytorch"
_CONFIGS = ("config.json", ARCHITECTURE_FILE)
_TAGS = ["equalize", "scale-equalization", "semantic-segmentation"]
_METRIC_IDS = {"mIoU": "mean_iou", "mAcc": "mean_accuracy", "aAcc": "accuracy"}
_INHERITED = ("license", "license_name", "license_link")  # of the base model, as they hold for what is made of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """How a directory is loaded where its format is at home; no code where only its author's own builds it."""

    library: str | None
    architecture: str
    code: str


def model_card(facts: Facts, loading: Loading, repository: str) -> str:
    """The content of README.md.

    A card that the directory holds already is kept: its metadata win over ours, its text stays. Only if it is the base
    model's own card, copied along, what it says of the base's training and scores is not said of this model: it
    is folded away under the new text, and only the license is taken over.

    Raises:
        InputError: the metadata of the card that exists cannot be read.
    """
    base = _parse(facts.base_readme, "the base model's README.md")
    title = repository.partition("/")[2]
    ours = _metadata(facts, loading, title, base)
    values: dict[str, Any] = {field.name: getattr(facts, field.name) for field in fields(facts)}
    helpers: dict[str, Any] = {"code": _code, "plain": _plain, "number": _number}
    card = ModelCard.from_template(
        ours,
        template_path=str(Path(__file__).with_name("card_template.md")),
        begin=_BEGIN,
        end=_END,
        title=title,
        architecture=loading.architecture,
        loading_code=loading.code,
        base_card=_GENERATED.sub("", base.text).strip() if facts.readme else "",
        **values,
        **helpers,
    )
    if facts.readme in ("", facts.base_readme):
        return str(card)
    return str(_renewed(_parse(facts.readme, "README.md"), ours, card.text))


def _metadata(facts: Facts, loading: Loading, title: str, base: ModelCard) -> ModelCardData:
    data = str(facts.score.get("data") or "unknown")
    results = [
        EvalResult(
            task_type="image-segmentation",
            task_name="Semantic segmentation",
            dataset_type=data.lower(),
            dataset_name=data,
            dataset_split=facts.score.get("split"),
            metric_type=_METRIC_IDS[name],
            metric_name=name,
            metric_value=round(value, 4),
        )
        for name, value in facts.metrics.items()
    ]
    return ModelCardData(
        base_model=facts.base_model,
        library_name=loading.library,
        pipeline_tag="image-segmentation",
        tags=_TAGS,
        **{key: base.data.get(key) for key in _INHERITED},
        model_name=title if results else None,
        metrics=[_METRIC_IDS[name] for name in facts.metrics] or None,
        eval_results=results or None,
    )


def _parse(content: str, where: str) -> ModelCard:
    block = "" if content.lstrip().startswith("---") else "---\n{}\n---\n"  # a card without metadata is one as well
    try:
        return ModelCard(block + content)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(where, f"has metadata that cannot be read ({reason})", remedy="mend or remove it") from error


def _renewed(card: ModelCard, ours: ModelCardData, generated: str) -> ModelCard:
    """The user's card with our facts where it says nothing, our scores, and our text in its place."""
    text = _BEGIN + generated.partition(_BEGIN)[2].partition(_END)[0] + _END
    data, tags = card.data, card.data.get("tags") or []
    data["tags"] = list(dict.fromkeys([*([tags] if isinstance(tags, str) else tags), *_TAGS]))
    for key in ("base_model", "library_name", "pipeline_tag", "metrics", "model_name", *_INHERITED):
        data[key] = data.get(key) or ours.get(key)
    new = ours.get("eval_results") or []
    old = [each for each in data.get("eval_results") or [] if not any(each.is_equal_except_value(one) for one in new)]
    data["eval_results"] = [*old, *new] or None
    if _BEGIN in card.text:
        card.text = _GENERATED.sub(lambda _: text, card.text)
    else:
        card.text = f"{card.text.rstrip()}\n\n{text}\n"
    return card


def _plain(text: object) -> str:
    """One line of Markdown that stays inside its table cell."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def _code(text: object) -> str:
    return f"`{' '.join(str(text).split()).replace('`', '').replace('|', '')}`"


def _number(form: str, value: object) -> str:
    return form % value if isinstance(value, int | float) else "-"


def describe_loading(out: Path, where: str) -> Loading:
    """By the JSON files beside the weights; the code needs no `equalize`.

    Args:
        out: the directory.
        where: arguments of the libraries' loaders: the quoted ORG/NAME, and `revision=` for a branch.

    Raises:
        CheckpointError: it is no model.
    """
    config, record = (read_json(path) if (path := out / name).is_file() else {} for name in _CONFIGS)
    arch = str(record.get("arch", ""))
    family, _, name = arch.partition(":")
    if family in ("torchvision", "smp"):
        arguments = record.get("arch_args")
        return _of_state_dict(out, where, family, name, arguments if isinstance(arguments, dict) else {})
    if arch == "mmseg":
        code = "from huggingface_hub import snapshot_download\nfrom mmseg.apis import init_model\n\n"
        code += f"path = snapshot_download({where})\n"
        code += 'model = init_model(f"{path}/config.py", f"{path}/model.pth", device="cpu")'
        return Loading(library=None, architecture="EncoderDecoder", code=code)
    if arch and family != "transformers":
        return Loading(library=None, architecture=without_paths(record)["arch"], code="")
    if "_model_class" in config:
        code = f"import segmentation_models_pytorch as smp\n\nmodel = smp.from_pretrained({where}).eval()"
        return Loading(library=_SMP, architecture=str(config["_model_class"]), code=code)
    if "model_type" not in config:
        expected = "a directory that calibrate or finetune wrote, or one saved by transformers or smp"
        raise CheckpointError(out, "is no model that can be pushed", expected=expected)
    named = config.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    loader = name if name.isidentifier() else "AutoModelForSemanticSegmentation"
    loaded = {"model": loader}
    if any((out / f"{kind}_config.json").is_file() for kind in ("preprocessor", "processor")):
        loaded = {"processor": "AutoImageProcessor", "model": loader}
    code = f"from transformers import {', '.join(loaded.values())}\n"
    code += "".join(f"\n{variable} = {each}.from_pretrained({where})" for variable, each in loaded.items())
    return Loading(library="transformers", architecture=name, code=code)


def _of_state_dict(out: Path, where: str, family: str, name: str, arguments: dict[str, Any]) -> Loading:
    if family == "smp":
        library, module, fixed = _SMP, "segmentation_models_pytorch", {"encoder_weights": None}
    else:
        library, module, fixed = None, "torchvision.models.segmentation", {"weights": None, "weights_backbone": None}
    given = ", ".join(f"{key}={value!r}" for key, value in (arguments | fixed).items())
    file = out / "model.safetensors"
    keys = read_weights((file,)).tensors if file.is_file() else ("",)
    prefix = next((each for each in PREFIXES if all(key.startswith(each) for key in keys)), "")
    lines = [
        "from huggingface_hub import hf_hub_download",
        "from safetensors.torch import load_file",
        f"from {module} import {name}\n",
        f"model = {name}({given})",
        f'state = load_file(hf_hub_download({where}, filename="model.safetensors"))',
        f'state = {{key.removeprefix("{prefix}"): value for key, value in state.items()}}' if prefix else "",
        "model.load_state_dict(state)",
        "model.eval()",
    ]
    return Loading(library=library, architecture=name, code="\n".join(filter(None, lines)))
