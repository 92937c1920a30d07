import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test imports huggingface_hub: no test may ask the network
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is expected is what a CPU computes

import contextlib
import signal
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background, a shell has it ignored


def pytest_configure(config):
    """Lets yapf, which mmengine imports, write its cache before there are several processes.

    It gives the file its name before all is written, and another process reads half of it (yapf 0.43).
    """
    if not hasattr(config, "workerinput"):
        with contextlib.suppress(ImportError):
            import yapf  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny tensors gain nothing from more, and busy machines lose much."""
    torch.set_num_threads(1)


def _quietly_save(model, directory: Path, **options) -> Path:
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(directory, **options)
    return directory


def _segformer_config(**changes):
    from transformers import SegformerConfig

    return SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=8,
        **{"num_labels": 5, **changes},
    )


class Ran(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """Standard output with every line break and indent as one blank, as it is wrapped to the terminal."""
        return " ".join(self.out.split())


@pytest.fixture
def run_cli(capsys):
    """Runs the command line in this process: `run_cli("scan", path, "--json")`."""
    from equalize.cli import main

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder of four smooth color images of 64x48. Read only."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for index in range(4):
        pixels = (torch.rand(6, 8, 3, generator=generator) * 255).to(torch.uint8).numpy()
        Image.fromarray(pixels).resize((64, 48)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def segformer_dir(tmp_path_factory) -> Path:
    """A whole SegFormer with five classes. Read only: copy before changing."""
    from transformers import SegformerForSemanticSegmentation, SegformerImageProcessor

    torch.manual_seed(1)
    directory = tmp_path_factory.mktemp("segformer")
    _quietly_save(SegformerForSemanticSegmentation(_segformer_config()), directory)
    SegformerImageProcessor(size={"height": 48, "width": 64}, do_reduce_labels=False).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def segformer_encoder_dir(tmp_path_factory) -> Path:
    """An image classifier with SegFormer's encoder, as nvidia/mit-b0 is one. Read only."""
    from transformers import SegformerForImageClassification

    torch.manual_seed(2)
    directory = tmp_path_factory.mktemp("mit")
    return _quietly_save(SegformerForImageClassification(_segformer_config(num_labels=10)), directory)


@pytest.fixture(scope="session")
def upernet_dir(tmp_path_factory) -> Path:
    """UPerNet over a tiny Swin, seven classes, in several shards. Read only."""
    from transformers import SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

    torch.manual_seed(3)
    swin = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = UperNetConfig(
        backbone_config=swin, hidden_size=8, auxiliary_channels=8, auxiliary_in_channels=32, num_labels=7
    )
    directory = tmp_path_factory.mktemp("upernet")
    return _quietly_save(UperNetForSemanticSegmentation(config), directory, max_shard_size="100KB")


def _saved_unet(encoder: str, directory: Path) -> Path:
    import segmentation_models_pytorch as smp

    torch.manual_seed(4)
    model = smp.Unet(encoder, encoder_weights=None, decoder_channels=(16, 8, 8, 8, 8), classes=2)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def smp_dir(tmp_path_factory) -> Path:
    """smp.Unet over timm's smallest ResNet with narrow decoder, two classes. Read only."""
    return _saved_unet("tu-test_resnet.r160_in1k", tmp_path_factory.mktemp("smp"))


@pytest.fixture(scope="session")
def smp_resnet_dir(tmp_path_factory) -> Path:
    """The same over ResNet-18, which is recognized by its keys. Read only."""
    return _saved_unet("resnet18", tmp_path_factory.mktemp("smp_resnet"))


@pytest.fixture(scope="session")
def lraspp_state() -> dict:
    """The state dict of torchvision's smallest segmentation network, four classes. Copy before changing."""
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    torch.manual_seed(5)
    return lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4).state_dict()
