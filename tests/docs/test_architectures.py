"""The table of architectures in the documentation holds: every class is in it, and what it says is found."""

import functools
import re
from pathlib import Path

import architectures
import pytest
from torch import Tensor, nn

from equalize.graph.graph import Graph
from equalize.graph.record import record
from equalize.sites.scan import Scan
from equalize.sites.sites import find_sites

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"


def look(model: nn.Module, example: tuple[Tensor, ...]) -> Scan:
    """As a recorded run says, which costs a tenth of export and says the same: see test_networks.py."""
    ops = record(model, example)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    sites, refusals = find_sites(Graph(ops=ops, shapes=shapes, tracer="recorder"))
    assert sites or refusals
    return Scan(sites=sites, refusals=refusals, tracer="recorder")


@functools.cache
def written() -> str:
    _, start, rest = PAGE.read_text(encoding="utf-8").partition(architectures.START)
    table, end, _ = rest.partition(architectures.END)
    assert start
    assert end
    return table.strip()


@pytest.mark.slow
def test_the_readme_has_the_table_that_the_script_makes():
    assert written() == architectures.table(look), "run python examples/architectures.py --write docs/architectures.md"


@pytest.mark.parametrize("library", ["torchvision", "smp", "transformers"])
def test_every_class_for_semantic_segmentation_is_in_the_table(library):
    from segmentation_models_pytorch import MODEL_ARCHITECTURES_MAPPING
    from torchvision.models import list_models, segmentation
    from transformers.models.auto import modeling_auto as auto

    semantic = set(auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES.values())
    universal = set(auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES.values())
    classes = {
        "torchvision": set(list_models(module=segmentation)),
        "smp": {each.__name__ for each in MODEL_ARCHITECTURES_MAPPING.values()},
        "transformers": semantic | universal,
    }
    rows = set(re.findall(rf"^\| {library} \| (\w+) \|", written(), flags=re.MULTILINE))
    assert classes[library] <= rows


def test_write_replaces_what_is_between_the_marks_and_nothing_else(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"# Title\n\n{architectures.START}\nold\n{architectures.END}\n\nEnd\n", encoding="utf-8")
    architectures.write(path, "| new |")
    text = f"# Title\n\n{architectures.START}\n| new |\n{architectures.END}\n\nEnd\n"
    assert path.read_text(encoding="utf-8") == text
    architectures.write(path, "| new |")
    assert path.read_text(encoding="utf-8") == text
    path.write_text("# Title\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="has no <!-- architectures:start -->"):
        architectures.write(path, "| new |")
