"""What the directory of a network of mmsegmentation says; no torch, no mmengine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from equalize.checkpoint.description import Description
from equalize.checkpoint.families.mmsegmentation.config import bare_model, read_literals
from equalize.checkpoint.files.weights import ARCHITECTURE_FILE, read_json

CONFIG_FILE = "config.py"
_BINARY_THRESHOLD = 0.3


class MMSegmentationDescription(Description):
    """Checkpoints of mmengine's runner with a record and, where it could be read as data, their config beside them."""

    name = "mmsegmentation"
    scheme = "mmseg"

    def architecture(self, out: Path) -> str:
        """The segmentor's type, if the config is there."""
        path = out / CONFIG_FILE
        if not path.is_file():
            return "EncoderDecoder"
        return architecture_of(bare_model(read_literals(path.read_text(encoding="utf-8"), path), path))

    def loading_code(self, out: Path, repository: str | None = None, revision: str | None = None) -> str:
        """``init_model`` of mmsegmentation on the config and the weights."""
        named = str(read_json(out / ARCHITECTURE_FILE).get("arch")).partition(":")[2]
        config, where, imports = f'f"{{path}}/{CONFIG_FILE}"', f'"{out}"', "from mmseg.apis import init_model\n\n"
        if not (out / CONFIG_FILE).is_file():
            if repository is not None:
                return ""
            config = f'"{named}"'
        if repository is not None:
            at = f', revision="{revision}"' if revision else ""
            where = f'snapshot_download("{repository}"{at})'
            imports = f"from huggingface_hub import snapshot_download\n{imports}"
        return f'{imports}path = {where}\nmodel = init_model({config}, f"{{path}}/model.pth", device="cpu")'


def scored_head(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """The head that the logits come from: the last of a cascade."""
    head = model.get("decode_head")
    if isinstance(head, (list, tuple)) and head:
        head = head[-1]
    return head if isinstance(head, Mapping) else {}


def binary_threshold(model: Mapping[str, Any]) -> float | None:
    """The probability above which a single output is class 1, of a head with one; mmsegmentation's default is 0.3."""
    head = scored_head(model)
    if head.get("out_channels") != 1:
        return None
    given = head.get("threshold")
    return float(given) if isinstance(given, (int, float)) and 0 < given < 1 else _BINARY_THRESHOLD


def architecture_of(model: Mapping[str, Any]) -> str:
    """The types of the segmentor, its backbone and its head, by its config."""
    backbone = model.get("backbone")
    parts = (backbone.get("type") if isinstance(backbone, Mapping) else None, scored_head(model).get("type"))
    return f"{model['type']} ({', '.join(str(part) for part in parts if part)})"
