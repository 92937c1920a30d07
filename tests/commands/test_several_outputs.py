"""Networks with several outputs, or with probabilities for logits, through the commands."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from equalize.checkpoint.loading import load
from tests.support.output_nets import save_net
from tests.support.scenes import write_scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("two"), 2, counts={"train": 4, "val": 3})


def miou(predict, root: Path) -> float:
    """Of two classes, from what ``predict`` gives for each picture."""
    intersection, union = np.zeros(2), np.zeros(2)
    for path in sorted((root / "images/val").iterdir()):
        pixels = np.asarray(Image.open(path)) / 255
        x = torch.from_numpy((pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).permute(2, 0, 1)[None].float()
        label = np.asarray(Image.open(root / "masks/val" / path.name))
        with torch.no_grad():
            scores = torch.nn.functional.interpolate(predict(x), size=label.shape, mode="bilinear")[0]
        found = (scores[0] > 0.5).numpy() if len(scores) == 1 else scores.argmax(0).numpy()
        for k in range(2):
            inside = label != 255
            intersection[k] += ((found == k) & (label == k) & inside).sum()
            union[k] += (((found == k) | (label == k)) & inside).sum()
    return 100 * float((intersection / union).mean())


@pytest.mark.parametrize("name", ["Sigmoid", "ResizedSigmoid", "OneOfSoftmax", "ByHand", "Softmax"])
def test_probabilities_are_scored_at_one_half(run_cli, scenes, tmp_path, name):
    path, arch = save_net(tmp_path, name)
    flags = ("--arch", arch, *(("--num-classes", 2) if name == "Softmax" else ()))
    if name == "Softmax":
        model = load(path, arch, num_classes=2, init_missing=True)
        torch.save(model.model.state_dict(), path)
    ran = run_cli("evaluate", path, "--data", scenes, *flags, "--json")
    assert ran.code == 0, ran.err
    arguments = {"num_classes": 2} if name == "Softmax" else {}
    expected = miou(load(path, arch, arguments).model, scenes)
    assert json.loads(ran.out)["mIoU"] == pytest.approx(expected, abs=0.1)  # a pixel at the threshold
    assert "probabilities, not logits" in " ".join(ran.err.split())


def test_an_output_is_chosen_once_and_used_alike_afterwards(run_cli, scenes, tmp_path):
    path, arch = save_net(tmp_path, "AuxFirst")
    named = ("--arch", arch, "--num-classes", 5)
    data, out, tuned = ("--data", scenes), tmp_path / "out", tmp_path / "tuned"
    for command in (
        ("calibrate", path, *data, "-o", out, "--arch", arch),
        ("evaluate", path, *data, *named),
        ("finetune", path, *data, "-o", out, *named, "--steps", 1, "--size", 48),
        ("compare", path, *data, "-o", out, *named, "--steps", 1, "--size", 48),
    ):
        ran = run_cli(*command)
        assert ran.code == 2, (command, ran.err)
        assert "returns several outputs that may be the logits, got 0 (1, 5, " in ran.err
        assert "choose one with --output INDEX or NAME" in ran.err
        assert not out.exists()
    ran = run_cli("calibrate", path, *data, "-o", out, "--arch", arch, "--output", 1, "--json")
    assert ran.code == 0, ran.err
    assert json.loads((out / "equalize.json").read_text())["logits"] == "1"
    assert json.loads((out / "architecture.json").read_text())["output"] == "1"
    scores = {}
    for source, flags in ((path, ("--output", 1)), (path, ("--output", 0)), (out, ())):
        ran = run_cli("evaluate", source, *data, *named, *flags, "--json")
        assert ran.code == 0, ran.err
        scores[source, flags] = json.loads(ran.out)["mIoU"]
    assert scores[out, ()] == pytest.approx(scores[path, ("--output", 1)], abs=0.1)
    assert scores[path, ("--output", 0)] != scores[out, ()]
    assert run_cli("verify", out, "--against", path, "--arch", arch).code == 0
    assert run_cli("apply", out, path, "--arch", arch, "-o", tmp_path / "again").code == 0
    ran = run_cli("finetune", out, *data, "-o", tuned, *named, "--steps", 2, "--size", 48, "--workers", 0, "--json")
    assert ran.code == 0, ran.err
    assert "the loss is that of 1, and 0.4 times that of 0" in " ".join(ran.err.split())
    before, after = (torch.load(each / "model.pth", weights_only=True) for each in (out, tuned))
    assert not torch.equal(before["main.weight"], after["main.weight"])
    assert json.loads((tuned / "architecture.json").read_text())["output"] == "1"
    assert json.loads((tuned / "last" / "run.json").read_text())["logits"] == "1"


def test_training_behind_a_sigmoid_lowers_the_loss(run_cli, scenes, tmp_path):
    path, arch = save_net(tmp_path, "Sigmoid")
    words = ("--data", scenes, "--arch", arch, "--steps", 14, "--size", "48x64", "--batch-size", 4, "--lr", 0.01)
    ran = run_cli("finetune", path, *words, "-o", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    scored = [line["mIoU"] for line in lines if "mIoU" in line]
    expected = miou(load(tmp_path / "out", arch).model, scenes)
    assert max(scored) == pytest.approx(expected, abs=0.1)
