"""Each family, with and without equalization, for other classes; what is refused."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from equalize.checkpoint.loading import ModelName, load
from equalize.commands.calibrate import calibrate_checkpoint
from equalize.commands.evaluate import EvalConfig, evaluate
from equalize.commands.finetune.finetune import finetune
from equalize.commands.finetune.splits import open_task
from equalize.errors import CheckpointError, DataError, InputError, OutputError, ResourceError
from equalize.plan import indicator
from equalize.plan.plan import Plan
from tests.support.scenes import write_scenes
from tests.support.tolerance import TIE
from tests.support.training import QUICK, falls, metrics, named, same, trained_weights

# every family trains and comes back in its own format


def state(out) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def test_transformers(segformer_dir, five_classes, tmp_path):
    from transformers import SegformerForSemanticSegmentation, SegformerImageProcessor

    reduced = shutil.copytree(segformer_dir, tmp_path / "reduced")
    SegformerImageProcessor(size={"height": 48, "width": 64}, do_reduce_labels=True).save_pretrained(reduced)
    config = replace(QUICK, lr=0.02, reduce_labels="no")
    done = finetune(named(reduced), five_classes, tmp_path / "out", config)
    assert falls(done)
    model, info = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not SegformerImageProcessor.from_pretrained(tmp_path / "out").do_reduce_labels  # as it was trained
    written = state(tmp_path / "out")
    both = [key for key in model.state_dict() if key in written]  # others have another name on disk
    assert {"decode_head.linear_fuse.weight", "decode_head.classifier.bias"} <= set(both)
    assert all(torch.equal(model.state_dict()[key], written[key]) for key in both)
    lines = metrics(tmp_path / "out")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert all(set(line) == {"step", "epoch", "loss", "lr"} for line in lines if "loss" in line)
    scored = [line for line in lines if "mIoU" in line]
    assert [line["step"] for line in scored] == [2, 4, 6, 8]
    assert done.best == max(scored, key=lambda line: line["mIoU"])
    again = evaluate(named(tmp_path / "out"), five_classes, EvalConfig(size=(48, 64), device="cpu", batch_size=4))
    assert again.mIoU == pytest.approx(done.best["mIoU"], abs=TIE)
    shutil.copy(reduced / "preprocessor_config.json", tmp_path / "out")  # what the training recorded goes before it
    assert evaluate(named(tmp_path / "out"), five_classes, EvalConfig(device="cpu", batch_size=4)) == again


def test_two_names_for_one_output(segformer_dir, tmp_path):
    """They draw no second output, and do not go where the library counts the outputs."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    single = SegformerConfig.from_pretrained(segformer_dir, num_labels=1)
    SegformerForSemanticSegmentation(single).save_pretrained(tmp_path / "single")
    root = write_scenes(tmp_path / "data", 2, counts={"train": 4, "val": 1})
    (root / "classes.txt").write_text("background\nroad\n")
    done = finetune(named(tmp_path / "single"), root, tmp_path / "out", replace(QUICK, max_steps=1))
    assert done.newly_initialized == ()
    (root / "classes.txt").unlink()
    score = evaluate(named(tmp_path / "out"), root, EvalConfig(device="cpu"))
    assert [row.name for row in score.classes] == ["background", "road"]
    assert score.mIoU == pytest.approx(done.best["mIoU"], abs=TIE)


@pytest.mark.parametrize(("listed", "kept"), [("sky Road car oak pole", True), ("cat dog cow hen pole", False)])
def test_a_network_trained_on_other_classes_has_their_names(segformer_dir, tmp_path, listed, kept):
    own = ["sky", "road", "car", "tree", "sign"]
    load(segformer_dir).with_names(own).save(tmp_path / "named")
    root = write_scenes(tmp_path / "data", 5, counts={"train": 2})
    (root / "classes.txt").write_text(listed.replace(" ", "\n"))
    task = open_task(named(tmp_path / "named"), root, QUICK, torch.device("cpu"))
    assert task.checkpoint.newly_initialized == ()
    assert task.checkpoint.classes == tuple(own if kept else listed.split())


def test_upernet_with_its_auxiliary_head_in_shards(upernet_dir, tmp_path):
    from transformers import UperNetForSemanticSegmentation

    root = write_scenes(tmp_path / "data", 7, counts={"train": 4, "val": 1}, size=(64, 64))
    config = replace(QUICK, max_steps=1, size=(64, 64), lr=0.03)
    done = finetune(named(upernet_dir), root, tmp_path / "out", config)
    before = UperNetForSemanticSegmentation.from_pretrained(upernet_dir).state_dict()
    after, info = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    key = "auxiliary_head.classifier.weight"
    assert not torch.equal(before[key], after.state_dict()[key])
    without = finetune(named(upernet_dir), root, tmp_path / "no_aux", replace(config, aux_weight=0.0))
    assert without.losses[0][1] < done.losses[0][1]


def test_smp(smp_dir, tmp_path):
    import segmentation_models_pytorch as smp

    root = write_scenes(tmp_path / "data", 2, counts={"train": 4, "val": 1}, size=(64, 64))
    (root / "classes.txt").write_text("sky\nroad\n")
    finetune(named(smp_dir), root, tmp_path / "out", replace(QUICK, max_steps=1, size=(64, 64)))
    model = smp.from_pretrained(str(tmp_path / "out"))
    assert same(model.state_dict(), state(tmp_path / "out"))
    first = next(key for key in state(smp_dir) if key.endswith("conv1.weight"))
    assert not torch.equal(state(tmp_path / "out")[first], state(smp_dir)[first])
    (root / "classes.txt").unlink()
    score = evaluate(named(tmp_path / "out"), root, EvalConfig(device="cpu"))
    assert [row.name for row in score.classes] == ["sky", "road"]


def test_torchvision(lraspp_state, tmp_path):
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    torch.save({"model": lraspp_state, "epoch": 3}, tmp_path / "lraspp.pth")
    root = write_scenes(tmp_path / "data", 4, counts={"train": 4}, size=(64, 64))
    done = finetune(named(tmp_path / "lraspp.pth"), root, tmp_path / "out", replace(QUICK, max_steps=1, size=(64, 64)))
    assert done.best is None
    content = torch.load(tmp_path / "out/model.pth", weights_only=True)
    assert content["epoch"] == 3
    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    model.load_state_dict(content["model"], strict=True)
    assert not torch.equal(
        content["model"]["classifier.low_classifier.weight"], lraspp_state["classifier.low_classifier.weight"]
    )


def test_a_network_that_cannot_be_equalized_is_trained_all_the_same(lraspp_state, tmp_path):
    torch.save(lraspp_state, tmp_path / "lraspp.pth")
    root = write_scenes(tmp_path / "data", 4, counts={"train": 4}, size=(64, 64))
    config, warned = replace(QUICK, max_steps=1, size=(64, 64), calibrate="rescale"), []
    done = finetune(named(tmp_path / "lraspp.pth"), root, tmp_path / "out", config, warn=warned.append)
    assert (done.steps, done.train_as) == (1, None)
    assert f"{tmp_path / 'lraspp.pth'} has no fusion layer that can be equalized" in warned


def test_any_network(custom, five_classes, tmp_path):
    done = finetune(custom, five_classes, tmp_path / "out", replace(QUICK, report_to=("tensorboard",)))
    assert falls(done)
    assert trained_weights(tmp_path / "out").keys() == torch.load(custom.source, weights_only=True).keys()
    reported = EventAccumulator(str(next((tmp_path / "out/last/runs").iterdir()))).Reload()
    losses = [(event.step, event.value) for event in reported.Scalars("train/loss")]
    assert losses == [(step, pytest.approx(loss)) for step, loss in done.losses]
    assert [event.value for event in reported.Scalars("eval/mIoU")][-1] == pytest.approx(done.last["mIoU"])


# equalization


@pytest.fixture(scope="session")
def equal(custom, five_classes, tmp_path_factory) -> ModelName:
    """`custom` calibrated beforehand, on what `QUICK` calibrates on."""
    out = tmp_path_factory.mktemp("equal") / "out"
    config = QUICK.calibration("train")
    calibrate_checkpoint(custom, five_classes, out, strategy="preserve", config=config)
    return replace(custom, source=str(out))


def test_preserve_trains_explicitly_and_leaves_plain_weights(custom, equal, five_classes, tmp_path):
    sgd = replace(QUICK, optimizer="sgd", lr=0.05, max_steps=2)
    explicit = finetune(equal, five_classes, tmp_path / "explicit", sgd)
    folded = finetune(equal, five_classes, tmp_path / "folded", replace(sgd, train_as="folded"))
    plain = finetune(custom, five_classes, tmp_path / "plain", sgd)
    assert (explicit.train_as, folded.train_as, plain.train_as) == ("explicit", "folded", None)
    assert explicit.losses[0] == pytest.approx(folded.losses[0], rel=1e-5)
    weights = {each: trained_weights(tmp_path / each) for each in ("explicit", "folded", "plain")}
    assert weights["explicit"].keys() == weights["plain"].keys()
    assert same(weights["folded"], weights["plain"])  # the same training twice
    assert not torch.allclose(weights["explicit"]["fuse.weight"], weights["plain"]["fuse.weight"], rtol=1e-3)
    receipt = json.loads((tmp_path / "explicit/equalize.json").read_text())
    assert receipt["strategy"] == "preserve"
    assert receipt["finetuned"]["train_as"] == "explicit"
    assert not (tmp_path / "plain/equalize.json").exists()


def test_calibrate_first_is_calibrating_before(custom, equal, five_classes, tmp_path):
    config = replace(QUICK, max_steps=2)
    finetune(equal, five_classes, tmp_path / "two", config)
    done = finetune(custom, five_classes, tmp_path / "one", replace(config, calibrate="preserve"))
    assert done.strategy == "preserve"
    assert done.train_as == "explicit"
    # the same passes and steps on the same batches
    assert same(trained_weights(tmp_path / "one"), trained_weights(tmp_path / "two"))


def measure_and_rescale(task):
    from equalize import calibrate

    return calibrate(task.checkpoint.model, [torch.randn(2, 3, 48, 64)], strategy="rescale")


@pytest.mark.parametrize("strategy", ["migrate", "rescale", "auto"])
def test_training_is_explicit_wherever_a_plan_is_in_effect(custom, five_classes, tmp_path, strategy, monkeypatch):
    monkeypatch.setattr(indicator, "NOTHING", -math.inf)  # noise has nothing to be told
    said = []
    config = replace(QUICK, max_steps=1, calibrate=strategy, scale="paper")
    done = finetune(custom, five_classes, tmp_path / "out", config, notify=said.append)
    assert done.train_as == "explicit"
    assert any(line.startswith("equalization: the optimizer trains the equalized weights of") for line in said)
    plan = Plan.read(tmp_path / "out")
    assert plan.scale == "paper"
    assert {site.tau for site in plan.sites if site.strategy != "migrate"} <= {1.0}


def test_what_auto_leaves_alone_trains_as_it_is(custom, five_classes, tmp_path, monkeypatch):
    monkeypatch.setattr(indicator, "NOTHING", math.inf)
    monkeypatch.setattr(indicator, "GAIN", math.inf)
    config, said = replace(QUICK, max_steps=1), []
    done = finetune(custom, five_classes, tmp_path / "auto", replace(config, calibrate="auto"), notify=said.append)
    finetune(custom, five_classes, tmp_path / "plain", config)
    assert (done.strategy, done.train_as) == ("none", None)
    assert "nothing is to be gained from equalizing (--optimizer adamw): the network trains as it is" in said
    assert Plan.read(tmp_path / "auto").strategy == "none"
    assert same(trained_weights(tmp_path / "auto"), trained_weights(tmp_path / "plain"))  # the same training twice


def test_prepare_gives_the_plan(custom, five_classes, tmp_path):
    config = replace(QUICK, max_steps=1, train_as="explicit")
    done = finetune(custom, five_classes, tmp_path / "out", config, prepare=measure_and_rescale)
    assert (done.strategy, done.train_as) == ("rescale", "explicit")
    with pytest.raises(InputError, match="no equalization to train through"):
        finetune(custom, five_classes, tmp_path / "no", config)


# classes


def test_other_classes_draw_the_classifier_and_nothing_else(segformer_dir, tmp_path):
    from transformers import SegformerForSemanticSegmentation

    root = write_scenes(tmp_path / "data", 3, counts={"train": 4, "val": 2})
    (root / "classes.txt").write_text("sky\nroad\ncar\n")
    said = []
    config = replace(QUICK, max_steps=1, lr=1e-9)
    done = finetune(named(segformer_dir), root, tmp_path / "out", config, notify=said.append)
    assert done.newly_initialized == ("decode_head.classifier.weight", "decode_head.classifier.bias")
    assert any("drawn anew" in line and "decode_head.classifier.weight" in line for line in said)
    model = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "sky", 1: "road", 2: "car"}
    old = SegformerForSemanticSegmentation.from_pretrained(segformer_dir).state_dict()
    for key, value in model.state_dict().items():
        if "classifier" not in key and "running" not in key and "num_batches" not in key:
            assert torch.allclose(value, old[key], atol=1e-6), key


def test_a_decoder_is_drawn_only_if_asked(segformer_encoder_dir, five_classes, tmp_path):
    config = replace(QUICK, max_steps=1, num_classes=5)
    with pytest.raises(CheckpointError, match="--init-missing"):
        finetune(named(segformer_encoder_dir), five_classes, tmp_path / "out", config)
    done = finetune(named(segformer_encoder_dir, init_missing=True), five_classes, tmp_path / "out", config)
    assert "decode_head.linear_fuse.weight" in done.newly_initialized


# what is refused


def test_bad_input_is_refused_before_the_first_step(custom, five_classes, tmp_path, segformer_dir):
    def refuses(error, message, config=QUICK, data=five_classes, name=custom):
        with pytest.raises(error, match=message):
            finetune(name, data, tmp_path / "never", config)
        assert not (tmp_path / "never/last").exists()

    refuses(InputError, "--class-weights: is not one a class, got 2, expected 5", replace(QUICK, class_weights=(1, 2)))
    refuses(InputError, "--report-to: nowhere is not supported", replace(QUICK, report_to=("nowhere",)))
    refuses(DataError, "no split 'training2'", replace(QUICK, train_split="training2"))
    refuses(ResourceError, "fp16 cannot be trained on a CPU", replace(QUICK, precision="fp16"))
    refuses(CheckpointError, "no such file", name=named(tmp_path / "missing.pth"))
    refuses(DataError, "without masks", data=five_classes / "images")
    flat = write_scenes(tmp_path / "flat", 5, counts={None: 3})
    refuses(InputError, "--patience: needs a validation split", replace(QUICK, patience=1), data=flat)
    many = write_scenes(tmp_path / "many", 9, counts={"train": 4, "val": 1}, seed=3)
    refuses(DataError, "has label .* expected 0 to 4", data=many)
    (tmp_path / "bare.py").write_text("from torch import nn\ndef Net(): return nn.Conv2d(3, 5, 1)\n")
    torch.save(torch.nn.Conv2d(3, 5, 1).state_dict(), tmp_path / "bare.pth")
    bare = named(tmp_path / "bare.pth", arch=f"{tmp_path / 'bare.py'}:Net")
    refuses(InputError, "--head-lr-mult: the network has no part", replace(QUICK, head_lr_mult=10.0), name=bare)
    with pytest.raises(OutputError, match=r"lies in .*, which is read"):
        finetune(named(segformer_dir), five_classes, segformer_dir / "out", QUICK)


def test_a_label_that_the_sample_missed_names_its_file(custom, tmp_path):
    root = write_scenes(tmp_path / "data", 5, counts={"train": 70})
    from PIL import Image

    seen = set()
    config = replace(QUICK, batch_size=10, workers=0)
    import equalize.data.label_check as check

    read = check._read_pair
    mask = root / "masks/train/033.png"
    Image.fromarray(np.full((48, 64), 6, np.uint8)).save(mask)
    try:
        check._read_pair = lambda image, path, *how: {0} if path == mask else seen.add(path) or read(image, path, *how)
        with pytest.raises(DataError, match=r"033\.png: has label 6"):
            finetune(custom, root, tmp_path / "out", config)
    finally:
        check._read_pair = read


def test_what_was_trained_trains_on(custom, five_classes, tmp_path):
    """OUT is a MODEL: its state for resuming is not copied along."""
    finetune(custom, five_classes, tmp_path / "one", replace(QUICK, max_steps=2))
    name = replace(custom, source=str(tmp_path / "one"))
    finetune(name, five_classes, tmp_path / "two", replace(QUICK, max_steps=1))
    assert len(metrics(tmp_path / "two")) == 2
    assert [path.name for path in (tmp_path / "two/last").glob("checkpoint-*")] == ["checkpoint-1"]
