"""The table of architectures in the documentation holds: every class is in it, and what it says is found."""

import functools
import re
from pathlib import Path

import architectures
import pytest

from equalize.sites.scan import scan
from tests.support.tracers import exported_ops, record, record_fake, said_by

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"


NETWORKS = {f"{library} {name}": (name, build) for library, name, build in architectures.networks()}
NOT_EXPORTED = {  # sizes depend on values, or tensors of the CPU meet the network's on the meta device
    f"transformers {name}ForUniversalSegmentation" for name in ("Eomt", "EomtDinov3", "Mask2Former", "OneFormer")
}


@functools.cache
def written() -> str:
    _, start, rest = PAGE.read_text(encoding="utf-8").partition(architectures.START)
    table, end, _ = rest.partition(architectures.END)
    assert start
    assert end
    return table.strip()


@pytest.mark.slow
def test_the_readme_has_the_table_that_the_script_makes():
    assert written() == architectures.table(), "run python examples/architectures.py --write docs/architectures.md"


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_both_tracers_find_the_same(name):
    """A recording on fake tensors against export; where that refuses, the scan's tracer against a run."""
    kind, build = NETWORKS[name]
    model, example = architectures.on_meta(build), architectures.example_of(kind)
    found = scan(model, example, kinds=("resampled", "plain"))
    assert (found.tracer, found.ran) == ("recorder", name in NOT_EXPORTED and "Mask2Former" not in name)
    independent = said_by(record if name in NOT_EXPORTED else exported_ops, model, example)
    assert (found.sites, found.refusals, found.norms) == (independent[0], independent[2], independent[3])
    if not found.ran:
        assert said_by(record_fake, model, example) == independent


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
