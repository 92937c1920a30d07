"""The lines of Python that load a pushed checkpoint with its own library."""

from collections.abc import Iterator

from equalize.commands.push.facts import Facts

__all__ = ["loading"]


def loading(facts: Facts, repository: str, revision: str | None) -> Iterator[str]:
    """Markdown with a block of code; no `equalize` is needed to run it.

    Args:
        facts: say which library.
        repository: ORG/NAME.
        revision: the branch, where it is not the main one.
    """
    at = f', revision="{revision}"' if revision else ""
    if facts.family == "custom":
        yield "The network is built by its author's own code, which is not part of this repository; its state dict is"
        yield "`model.safetensors`.\n"
        return
    lines = {"transformers": _transformers, "smp": _smp, "torchvision": _torchvision, "mmsegmentation": _mmseg}[
        facts.family
    ](facts, repository, at)
    yield "```python"
    yield from lines
    yield "```\n"


def _transformers(facts: Facts, repository: str, at: str) -> Iterator[str]:
    name = facts.architecture if facts.architecture.isidentifier() else "AutoModelForSemanticSegmentation"
    imports = f"AutoImageProcessor, {name}" if facts.processor else name
    yield f"from transformers import {imports}\n"
    if facts.processor:
        yield f'processor = AutoImageProcessor.from_pretrained("{repository}"{at})'
    yield f'model = {name}.from_pretrained("{repository}"{at})'


def _smp(facts: Facts, repository: str, at: str) -> Iterator[str]:
    if facts.state_dict:
        yield from _state_dict(facts, repository, at, "segmentation_models_pytorch", {"encoder_weights": None})
        return
    yield "import segmentation_models_pytorch as smp\n"
    yield f'model = smp.from_pretrained("{repository}"{at}).eval()'


def _mmseg(facts: Facts, repository: str, at: str) -> Iterator[str]:
    yield "from huggingface_hub import snapshot_download"
    yield "from mmseg.apis import init_model\n"
    yield f'path = snapshot_download("{repository}"{at})'
    yield 'model = init_model(f"{path}/config.py", f"{path}/model.pth", device="cpu")'


def _torchvision(facts: Facts, repository: str, at: str) -> Iterator[str]:
    nothing = {"weights": None, "weights_backbone": None}
    yield from _state_dict(facts, repository, at, "torchvision.models.segmentation", nothing)


def _state_dict(facts: Facts, repository: str, at: str, module: str, fixed: dict[str, None]) -> Iterator[str]:
    arguments = ", ".join(f"{key}={value!r}" for key, value in {**facts.arguments, **fixed}.items())
    yield "from huggingface_hub import hf_hub_download"
    yield "from safetensors.torch import load_file"
    yield f"from {module} import {facts.architecture}\n"
    yield f"model = {facts.architecture}({arguments})"
    yield f'state = load_file(hf_hub_download("{repository}", "model.safetensors"{at}))'
    if facts.prefix:
        yield f'state = {{key.removeprefix("{facts.prefix}"): value for key, value in state.items()}}'
    yield "model.load_state_dict(state)"
    yield "model.eval()"
