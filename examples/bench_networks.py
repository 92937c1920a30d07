"""The six networks that `bench_calibration.py` runs: full size, drawn at random, nothing is downloaded."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["NETWORKS", "build"]


class Logits(nn.Module):
    """A transformers network that returns its logits, as the others do."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, classes, h, w)."""
        logits: Tensor = self.network(pixel_values, return_dict=False)[0]
        return logits


def _upernet_swin_t() -> nn.Module:
    from transformers import SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = SwinConfig(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], out_features=stages)
    config = UperNetConfig(backbone_config=backbone, hidden_size=512, auxiliary_in_channels=384, num_labels=150)
    return Logits(UperNetForSemanticSegmentation(config))


def _segformer_b0() -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    return Logits(SegformerForSemanticSegmentation(SegformerConfig(num_labels=150)))


def _deeplabv3_resnet50() -> nn.Module:
    from torchvision.models.segmentation import deeplabv3_resnet50

    class Out(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=21, aux_loss=True)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.network(x)["out"]
            return logits

    return Out()


def _smp(architecture: str) -> Callable[[], nn.Module]:
    def draw() -> nn.Module:
        import segmentation_models_pytorch as smp

        network: Any = getattr(smp, architecture)
        model: nn.Module = network("resnet18", encoder_weights=None, classes=21)
        return model

    return draw


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "upernet-swin-t": _upernet_swin_t,
    "segformer-b0": _segformer_b0,
    "deeplabv3-resnet50": _deeplabv3_resnet50,
    "unet-resnet18": _smp("Unet"),
    "pspnet-resnet18": _smp("PSPNet"),
    "deeplabv3plus-resnet18": _smp("DeepLabV3Plus"),
}


def build(name: str) -> nn.Module:
    """The network in eval mode, the same weights at every call."""
    import torch

    torch.manual_seed(0)
    return NETWORKS[name]().eval()
