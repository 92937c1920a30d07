"""What a directory of transformers says; no torch, and for most networks no transformers."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from equalize.checkpoint.description import Description
from equalize.checkpoint.files.weights import read_json

CONFIG_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")


class TransformersDescription(Description):
    """Directories as transformers writes them, and state dicts with such a config beside them."""

    name = "transformers"
    library = "transformers"
    scheme = "transformers"
    config_field = "model_type"

    def describes(self, config: Mapping[str, object]) -> bool:
        """By its type, or as one of its author's code."""
        return super().describes(config) or "auto_map" in config

    def architecture(self, out: Path) -> str:
        """The class that the config names, if any."""
        named = read_json(out / "config.json").get("architectures")
        return str(named[0]) if isinstance(named, list) and named else ""

    def loading_code(self, out: Path, repository: str | None = None, revision: str | None = None) -> str:
        """``from_pretrained`` of the class that the config names, and of the processor."""
        named = self.architecture(out)
        name = named if named.isidentifier() else "AutoModelForSemanticSegmentation"
        where = f'"{repository or out}"' + (f', revision="{revision}"' if revision else "")
        model_type = str(read_json(out / "config.json").get("model_type"))
        if named and not (_is_defined(named, model_type) or is_known(named)):
            return f"model = {name}.from_pretrained({where})  # a class of its author's code"
        if not any((out / file).is_file() for file in CONFIG_FILES[1:]):
            return f"from transformers import {name}\n\nmodel = {name}.from_pretrained({where})"
        return (
            f"from transformers import AutoImageProcessor, {name}\n\n"
            f"processor = AutoImageProcessor.from_pretrained({where})\n"
            f"model = {name}.from_pretrained({where})"
        )


def _is_defined(name: str, model_type: str) -> bool:
    """Whether the source of transformers' networks of a type defines a class: far quicker than to import transformers.

    Some types are in folders of another name; for these `is_known` decides.
    """
    folder, spec = model_type.replace("-", "_"), importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None or not folder.isidentifier():
        return False
    source = Path(spec.origin).parent / "models" / folder / f"modeling_{folder}.py"
    return source.is_file() and f"\nclass {name}(" in source.read_text(encoding="utf-8")


def is_known(name: str) -> bool:
    """Whether a class that a config names is one of transformers; so is an empty name. Nothing of it is imported."""
    import transformers

    return not name or name in dir(transformers)
