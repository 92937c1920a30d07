"""The data that a training's score was measured on: in the plan, metrics.jsonl and the model card."""

import json

from equalize.commands.push.card import model_card
from equalize.data.dataset import open_data
from tests.support.scenes import write_scenes


def test_the_record_and_the_card_name_the_data_and_the_split(run_cli, segformer_dir, tmp_path):
    data = write_scenes(tmp_path / "streets", 5, counts={"train": 2, "valid": 2})
    out = tmp_path / "out"
    quick = ("--batch-size", 2, "--max-steps", 1, "--size", "64x64", "--device", "cpu")
    ran = run_cli("finetune", segformer_dir, "--data", data, "-o", out, "--calibrate", *quick, "--json")
    assert ran.code == 0, ran.err
    scored_on = {"data": "streets", "split": "valid"}
    score = json.loads((out / "equalize.json").read_text())["finetuned"]["score"]
    assert score.items() >= scored_on.items()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line for line in lines if "mIoU" in line][-1].items() >= scored_on.items()
    assert "`streets`, split `valid`" in model_card(out, "me/street")
    (out / "equalize.json").unlink()
    assert "`streets`, split `valid`" in model_card(out, "me/street")


def test_the_name_of_a_data_set(tmp_path, monkeypatch):
    data = write_scenes(tmp_path / "streets", 2, counts={None: 1})
    monkeypatch.chdir(data)
    assert open_data(data).name == open_data(".").name == open_data("../streets").name == "streets"
