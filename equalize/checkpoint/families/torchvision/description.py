"""What the directory of a network of torchvision says; no torch."""

from pathlib import Path

from equalize.checkpoint.description import Description
from equalize.checkpoint.loading_code import state_dict_code


class TorchvisionDescription(Description):
    """State dicts with a record beside them."""

    name = "torchvision"
    scheme = "torchvision"

    def loading_code(self, out: Path, repository: str | None = None, revision: str | None = None) -> str:
        """The function that builds it, then its state dict."""
        fresh = {"weights": None, "weights_backbone": None}
        module = "torchvision.models.segmentation"
        return state_dict_code(out, module, self.architecture(out), fresh, repository, revision)
