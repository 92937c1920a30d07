"""A table is calibrated on, scored and trained on as the same pictures in a folder are.

The same command on the same pixels, twice: to the last bit.
"""

import json
import sys
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from safetensors.torch import load_file

from equalize.data.dataset import open_data
from tests.support.scenes import write_scenes

SPLITS = {"train": 4, "val": 2}
CPU = ("--device", "cpu", "--size", "64x64")


@pytest.fixture
def folder(tmp_path):
    return write_scenes(tmp_path / "folder", 5, counts=SPLITS)


@pytest.fixture
def tables(folder, tmp_path, monkeypatch):
    """The same files as parquet, a file a split."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "tables"
    root.mkdir()
    datasets.disable_progress_bars()
    try:
        for split, rows in _rows(folder).items():
            rows.to_parquet(root / f"{split}-00000-of-00001.parquet")
    finally:
        datasets.enable_progress_bars()
    return root


def _rows(folder: Path) -> DatasetDict:
    found = DatasetDict()
    for split in SPLITS:
        data = open_data(folder, split=split, labels=True)
        pairs = zip(data.images, data.masks, strict=True)
        rows = [
            {
                "image": {"bytes": image.read_bytes(), "path": None},
                "label": {"bytes": mask.read_bytes(), "path": None},
            }
            for image, mask in pairs
        ]
        found[split] = Dataset.from_list(rows, features=Features(image=ImageFeature(), label=ImageFeature()))
    return found


def answer(ran):
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def test_calibrate_measures_the_same(run_cli, segformer_dir, folder, tables, tmp_path):
    for data, out, workers in ((folder, "a", 0), (tables, "b", 1)):
        words = ("calibrate", segformer_dir, "--data", data, "-o", tmp_path / out, "--workers", workers, *CPU)
        answer(run_cli(*words, "--json"))
    a, b = (json.loads((tmp_path / out / "equalize.json").read_text()) for out in "ab")
    assert b["sites"] == a["sites"]
    assert b["edits"] == a["edits"]
    assert b["data"] == {"path": str(tables), "split": "train", "fingerprint": b["data"]["fingerprint"]}
    assert len(b["data"]["fingerprint"]) == 64


def test_evaluate_scores_the_same(run_cli, segformer_dir, folder, tables):
    ran = run_cli("evaluate", segformer_dir, "--data", tables, *CPU, "--json")
    assert answer(ran) == answer(run_cli("evaluate", segformer_dir, "--data", folder, *CPU, "--json"))
    assert "table layout, columns image and label, split validation, 2 images, 2 pairs" in " ".join(ran.err.split())


def test_finetune_comes_to_the_same_weights_and_resumes(run_cli, segformer_dir, folder, tables, tmp_path):
    quick = ("--batch-size", 2, "--max-steps", 3, "--lr", 0.01, *CPU)
    for data, out in ((folder, "a"), (tables, "b")):
        answer(run_cli("finetune", segformer_dir, "--data", data, "-o", tmp_path / out, *quick, "--json"))
    a, b = (load_file(tmp_path / out / "model.safetensors") for out in "ab")
    assert a.keys() == b.keys()
    assert all(a[key].equal(b[key]) for key in a)
    words = ("finetune", segformer_dir, "--data", tables, "-o", tmp_path / "b", *quick, "--resume")
    ran = run_cli(*words)
    assert ran.code == 0, ran.err
    assert "the training was complete after step 3" in ran.text


def test_errors_are_one_line(run_cli, segformer_dir, tables, monkeypatch):
    ran = run_cli("evaluate", segformer_dir, "--data", "acme/streets", *CPU)
    assert (ran.code, ran.err.count("\n")) == (3, 1)
    assert ran.err.startswith("error: acme/streets: no such path, no such data set in the cache, and HF_HUB_OFFLINE")
    monkeypatch.setitem(sys.modules, "datasets", None)
    ran = run_cli("calibrate", segformer_dir, "--data", tables, "-o", tables.parent / "out", *CPU)
    assert (ran.code, ran.err.count("\n")) == (3, 1)
    assert ran.err.endswith("cannot be read without the library datasets; pip install equalize[datasets]\n")
