import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import equalize
from equalize.checkpoint.checkpoint import write_plan
from tests.plan.test_attach import drawn, planned


@pytest.fixture(scope="session")
def equalized_dir(segformer_dir, tmp_path_factory) -> Path:
    """A SegFormer as `calibrate --strategy preserve` leaves it. Read only."""
    from transformers import SegformerForSemanticSegmentation

    directory = tmp_path_factory.mktemp("equalized") / "out"
    shutil.copytree(segformer_dir, directory)
    model = SegformerForSemanticSegmentation.from_pretrained(directory)
    torch.manual_seed(0)
    plan = equalize.calibrate(model, [torch.randn(2, 3, 48, 64)], strategy="preserve")
    (site,) = plan.sites
    loud = replace(site.branches[0], std=4 * site.branches[0].std)  # so that equalization makes a difference
    write_plan(replace(plan, sites=(replace(site, branches=(loud, *site.branches[1:])),)), directory)
    return directory


@pytest.fixture
def plan():
    """Of the network that `drawn("bias")` gives."""
    model, x, _ = drawn("bias")
    return planned(model, x)
