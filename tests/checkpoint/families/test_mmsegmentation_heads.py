"""mmsegmentation from end to end: the five heads of the paper, held against mmsegmentation's own loader."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from equalize.checkpoint.loading import ModelName, load
from equalize.commands.calibrate import calibrate_checkpoint
from equalize.commands.calibration_config import CalibrationConfig
from equalize.commands.evaluate import EvalConfig, evaluate
from equalize.commands.finetune.config import TrainConfig
from equalize.commands.finetune.finetune import finetune
from equalize.commands.forward import Forward, ForwardConfig
from equalize.commands.scan import select_sites
from equalize.commands.verify import verify_checkpoint
from tests.support.mmseg_networks import CLASSES, saved, stock
from tests.support.scenes import write_scenes
from tests.support.tolerance import TIE, assert_same_outputs
from tests.support.tracers import exported_ops, record_fake, said_by

CONFIG = CalibrationConfig(samples=4, size=(64, 64), batch_size=4)
ROWS = {  # head: (backbone, resampled fusion layers and what they fuse, plain ones likewise)
    "UPerHead": ("SwinTransformer", {"bottleneck.conv": [8, 4, 4, 4, 4], "fpn_bottleneck.conv": [4, 4]}, {}),
    "PSPHead": ("ResNetV1c", {"bottleneck.conv": [8, 4, 4, 4, 4]}, {}),
    "ASPPHead": ("ResNetV1c", {"bottleneck.conv": [4, 4, 4, 4]}, {}),
    "DepthwiseSeparableASPPHead": (
        "ResNetV1c",
        {"bottleneck.conv": [4, 4, 4, 4], "sep_bottleneck.0.depthwise_conv.conv": [4, 2]},
        {},
    ),
    "FCNHead": ("ResNetV1c", {}, {"conv_cat.conv": [8, 4]}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The checkpoint of each head. Read only."""
    folder = tmp_path_factory.mktemp("mmseg")
    return {head: saved(folder, head, row[0]) for head, row in ROWS.items()}


def logits(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("head", ROWS)
def test_the_fusion_layers_of_each_head(head, checkpoints):
    checkpoint = load(checkpoints[head], weights=False)
    _, resampled, plain = ROWS[head]
    found = select_sites(checkpoint.model, (2, 3, 64, 64), "decode_head.*" if plain else None)
    widths = {site.layer: [b.stop - b.start for b in site.branches] for site in found.sites}
    assert widths == {f"decode_head.{layer}": parts for layer, parts in {**resampled, **plain}.items()}
    assert {site.kind for site in found.sites} == ({"plain"} if plain else {"resampled"})
    assert checkpoint.family == "mmsegmentation"


@pytest.mark.slow
@pytest.mark.parametrize("head", ROWS)
def test_a_recording_says_the_same_as_export(head, checkpoints):
    model, example = load(checkpoints[head], weights=False).model, (torch.empty(2, 3, 64, 64, device="meta"),)
    assert said_by(record_fake, model, example) == said_by(exported_ops, model, example)


@pytest.mark.parametrize(
    ("head", "strategy"), [*((head, "migrate") for head in ROWS), ("UPerHead", "preserve"), ("UPerHead", "rescale")]
)
def test_the_stock_loader_takes_what_is_written(head, strategy, checkpoints, photos, tmp_path):
    source, out = checkpoints[head], tmp_path / "out"
    name, pattern = ModelName(source=str(source)), "decode_head.*" if head == "FCNHead" else None
    plan = calibrate_checkpoint(name, photos, out, strategy=strategy, pattern=pattern, config=CONFIG)
    assert len(plan.sites) == len(ROWS[head][1] or ROWS[head][2])
    before, after = stock(source.with_suffix(".py"), source), stock(out / "config.py", out / "model.pth")
    first, second = before.state_dict(), after.state_dict()
    assert list(first) == list(second)
    assert {key for key in first if not torch.equal(first[key], second[key])} <= set(plan.changed)
    assert bool(plan.changed) == (strategy != "preserve")
    x = torch.randn(2, 3, 64, 64)
    here, there = logits(before, x), logits(after, x)
    assert_same_outputs(load(out).logits(x), there)
    kept = strategy in {"migrate", "preserve"}
    assert {site.strategy for site in plan.sites} == {strategy}
    assert ((here - there).abs().max() <= 1e-5 * (here.max() - here.min())) == kept
    if strategy == "migrate":  # the auxiliary head is no part of its forward
        with torch.no_grad():
            heads = [model.auxiliary_head(model.extract_feat(x)) for model in (before, after)]
        torch.testing.assert_close(*heads, rtol=1e-4, atol=1e-5)
        assert_same_outputs(logits(stock(source.with_suffix(".py"), out / "model.pth"), x), there)
        verify_checkpoint(out, name, None, CONFIG)
    old, new = (torch.load(path, weights_only=True) for path in (source, out / "model.pth"))
    assert {key: value for key, value in old.items() if key != "state_dict"} == {
        key: value for key, value in new.items() if key != "state_dict"
    }


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), 3, counts={"train": 4, "val": 2}, size=(64, 64))


QUICK = TrainConfig(max_steps=2, batch_size=2, lr=1e-3, warmup=0.0, size=(64, 64), device="cpu", samples=2)


@pytest.mark.parametrize("head", ["UPerHead", "FCNHead"])  # with resampled branches and without
def test_fine_tuning(head, checkpoints, scenes, tmp_path):
    source, out = checkpoints[head], tmp_path / "out"
    done = finetune(ModelName(source=str(source)), scenes, out, QUICK)
    assert done.steps == 2
    before, after = stock(source.with_suffix(".py"), source), stock(source.with_suffix(".py"), out / "model.pth")
    first, second = before.state_dict(), after.state_dict()
    assert list(first) == list(second)
    for part in ("decode_head.conv_seg.weight", "auxiliary_head.conv_seg.weight", "auxiliary_head.convs.0.conv.weight"):
        assert not torch.equal(first[part], second[part])  # the auxiliary head is trained as well
    assert after.dataset_meta["classes"] == CLASSES
    score = evaluate(ModelName(source=str(out)), scenes, EvalConfig(size=(64, 64), split="val"))
    assert score.mIoU == pytest.approx(done.best["mIoU"], abs=TIE)  # in batches of another size


def test_a_cascade_trains_all_its_heads(tmp_path, scenes):
    """OCRNet: the features it pools meet those they came from in one plain fusion layer."""
    strides = "strides=(1, 1), dilations=(1, 1)"
    source = saved(tmp_path, "OCRHead", changes={"strides=(1, 2), dilations=(1, 1)": strides})
    out = tmp_path / "out"
    assert finetune(ModelName(source=str(source)), scenes, out, QUICK).steps == 2
    before, after = stock(source.with_suffix(".py"), source), stock(out / "config.py", out / "model.pth")
    for part in ("decode_head.0.conv_seg.weight", "decode_head.1.conv_seg.weight", "auxiliary_head.conv_seg.weight"):
        assert not torch.equal(before.state_dict()[part], after.state_dict()[part])
    checkpoint = load(out)
    assert checkpoint.architecture == "CascadeEncoderDecoder (ResNetV1c, OCRHead)"
    assert checkpoint.classes == CLASSES
    x = torch.randn(2, 3, 64, 64)
    assert_same_outputs(logits(checkpoint.model, x), logits(after, x))


@pytest.mark.parametrize("threshold", [None, 0.6])
def test_a_single_output_is_class_1_where_mmsegmentation_says_so(threshold, tmp_path):
    given = "" if threshold is None else f", threshold={threshold}"
    changes = {
        "num_classes=3": f"num_classes=2, ignore_index=0, out_channels=1{given}",
        "Loss'": "Loss', use_sigmoid=True",
    }
    source = saved(tmp_path, "FCNHead", changes=changes)
    theirs, checkpoint, x = stock(source.with_suffix(".py"), source), load(source), 10 * torch.randn(2, 3, 64, 64)
    shift = 1.0 if threshold else -0.5  # logits around that of the threshold: log(0.6 / 0.4) or log(0.3 / 0.7)
    for network in (theirs, checkpoint.model):
        network.decode_head.conv_seg.weight.data *= 20
        network.decode_head.conv_seg.bias.data.fill_(shift)
    expected = torch.stack([each.pred_sem_seg.data[0] for each in theirs.postprocess_result(logits(theirs, x))])
    ours = checkpoint.with_output(x).logits(x)[:, 0]
    told = ours.abs() > 1e-4  # a sigmoid's rounding may decide what lies closer to the threshold
    assert told.float().mean() > 0.99
    assert torch.equal((ours > 0).long()[told], expected[told])
    assert not torch.equal(ours > 0, logits(theirs, x)[:, 0] > 0)  # which is not that of one half
    assert any(f"above {threshold or 0.3} is class 1" in note for note in checkpoint.notes)
    assert any("training ignored label 0" in note for note in checkpoint.notes)


def test_a_config_that_tests_in_windows_is_said_to(tmp_path):
    sliding = "test_cfg=dict(mode='slide', crop_size=(48, 64), stride=(32, 42))"
    source = saved(tmp_path, "FCNHead", changes={"test_cfg=dict(mode='whole')": sliding})
    said = [note for note in load(source).notes if "--size 48x64 --sliding-window" in note]
    assert len(said) == 1
    assert not any("--sliding-window" in note for note in load(saved(tmp_path, "PSPHead")).notes)


@pytest.mark.parametrize(("stride", "known"), [((32, 40), True), ((10, 64), True), ((32, 42), False)])
def test_windows_lie_where_mmsegmentation_places_them(stride, known, tmp_path):
    sliding = f"test_cfg=dict(mode='slide', crop_size=(48, 64), stride={stride})"
    source = saved(tmp_path, "FCNHead", changes={"test_cfg=dict(mode='whole')": sliding})
    theirs, checkpoint = stock(source.with_suffix(".py"), source), load(source)
    if not known:  # two thirds of the window, as most configs have it
        checkpoint = replace(checkpoint, preprocess=replace(checkpoint.preprocess, windows=None))
    pixels = np.random.default_rng(0).integers(0, 255, (101, 150, 3)).astype(np.uint8)
    x = theirs.data_preprocessor({"inputs": [torch.from_numpy(pixels[..., ::-1].copy()).permute(2, 0, 1)]})["inputs"]
    with torch.no_grad():
        expected = theirs.slide_inference(x.float(), [{}])[0]
    config = ForwardConfig(device="cpu", sliding_window=True, size=(48, 64), batch_size=3)
    forward = Forward(checkpoint=checkpoint, config=config, device=torch.device("cpu"))
    strips = forward.in_windows("picture", Image.fromarray(pixels))
    assert_same_outputs(torch.cat([strip for _, strip in strips], dim=1), expected)
