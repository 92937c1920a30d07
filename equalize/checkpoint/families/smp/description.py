"""What the directory of a network of segmentation_models_pytorch says; no torch, no smp."""

from pathlib import Path

from equalize.checkpoint.description import Description
from equalize.checkpoint.files.weights import ARCHITECTURE_FILE, read_json
from equalize.checkpoint.loading_code import state_dict_code


class SmpDescription(Description):
    """Directories as smp writes them, and state dicts with a record beside them."""

    name = "smp"
    library = "segmentation-models-pytorch"
    scheme = "smp"
    config_field = "_model_class"

    def architecture(self, out: Path) -> str:
        """The class name as smp spells it; ``--arch`` takes it in lower case as well."""
        if not (out / ARCHITECTURE_FILE).is_file():
            return str(read_json(out / "config.json")["_model_class"])
        return str(read_json(out / ARCHITECTURE_FILE).get("class") or super().architecture(out))

    def loading_code(self, out: Path, repository: str | None = None, revision: str | None = None) -> str:
        """``smp.from_pretrained`` of a directory; for a state dict the class, then its weights."""
        if not (out / ARCHITECTURE_FILE).is_file():
            at = f', revision="{revision}"' if revision else ""
            code = f'model = smp.from_pretrained("{repository or out}"{at}).eval()'
            return f"import segmentation_models_pytorch as smp\n\n{code}"
        fresh = {"encoder_weights": None}
        return state_dict_code(out, "segmentation_models_pytorch", self.architecture(out), fresh, repository, revision)
