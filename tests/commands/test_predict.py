"""Masks against an independent confusion matrix, and against a network whose classes are known by formula."""

import json
import os
import shutil
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from equalize.checkpoint.loading import ModelName
from equalize.checkpoint.preprocess import Override
from equalize.commands import images, windows
from equalize.commands.evaluate import EvalConfig, evaluate
from equalize.commands.overlays import class_colors, distinct_colors, draw_legend, draw_overlay
from equalize.commands.predict.predict import PredictConfig, predict
from equalize.data.colors import read_colors
from equalize.errors import DataError, InputError, NumericsError, OutputError
from tests.support.scenes import write_scenes
from tests.support.tolerance import TIE

CPU = PredictConfig(device="cpu")
LEVELS = textwrap.dedent("""
    import torch

    class Net(torch.nn.Module):
        '''Class k where the mean of red, green and blue is nearest to 255 k / (K - 1).'''

        def __init__(self, num_classes=6):
            super().__init__()
            self.classify = torch.nn.Conv2d(3, num_classes, 1)

        def forward(self, x):
            if x.shape[2] * x.shape[3] > 150 * 160:
                raise MemoryError("a large picture in one piece")
            return self.classify(x)
""")


def levels(folder: Path, classes: int = 6) -> ModelName:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "levels.py").write_text(LEVELS)
    at_K = 255 * torch.arange(classes) / (classes - 1)
    weight = (2 * at_K / 3)[:, None, None, None].expand(-1, 3, 1, 1).contiguous()
    torch.save({"classify.weight": weight, "classify.bias": -(at_K**2)}, folder / "levels.pth")
    return ModelName(
        source=str(folder / "levels.pth"),
        arch=f"{folder}/levels.py:Net",
        arch_args={"num_classes": classes},
        preprocess=Override(mean=(0.0,), std=(1.0,), rescale=1.0),
    )


def by_formula(gray_HW, classes: int = 6):
    return np.rint(gray_HW.astype(np.float64) * (classes - 1) / 255).astype(int)


def noise(height: int, width: int, seed: int = 0):
    return np.random.default_rng(seed).integers(0, 256, (height, width)).astype(np.uint8)


def masks_in(out: Path) -> dict[str, np.ndarray]:
    return {
        path.relative_to(out / "masks").with_suffix("").as_posix(): np.asarray(Image.open(path))
        for path in sorted((out / "masks").rglob("*.png"))
    }


def mean_iou(masks, labels: Path, *, ignored: int = 255, classes: int) -> float:
    """From a confusion matrix of its own."""
    counts = np.zeros((classes, classes), int)
    for name, mask in masks.items():
        label = np.asarray(Image.open(labels / f"{name}.png"))
        assert mask.shape == label.shape
        np.add.at(counts, (label[label != ignored], mask[label != ignored]), 1)
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return float(100 * np.mean(counts.diagonal()[union > 0] / union[union > 0]))


def test_masks_score_as_evaluate_does(segformer_dir, tmp_path):
    """Pictures of two sizes."""
    root = write_scenes(tmp_path / "data", 4, counts={"val": 3})
    other = write_scenes(tmp_path / "other", 4, counts={"val": 2}, size=(40, 56), seed=1)
    for kind in ("images", "masks"):
        for path in (other / kind / "val").iterdir():
            path.rename(root / kind / "val" / f"other{path.name}")
    name = ModelName(source=str(segformer_dir))
    done = predict(name, [root / "images/val"], tmp_path / "out", CPU)
    found = mean_iou(masks_in(tmp_path / "out"), root / "masks/val", classes=5)
    assert found == pytest.approx(evaluate(name, root, EvalConfig(device="cpu")).mIoU, abs=TIE)
    assert [file.size for file in done.files] == [(48, 64)] * 3 + [(40, 56)] * 2
    slid = PredictConfig(device="cpu", sliding_window=True, size=(32, 32))
    predict(name, [root / "images/val"], tmp_path / "slid", slid)
    expected = evaluate(name, root, EvalConfig(device="cpu", sliding_window=True, size=(32, 32)))
    found = mean_iou(masks_in(tmp_path / "slid"), root / "masks/val", classes=5)
    assert found == pytest.approx(expected.mIoU, abs=TIE)


def test_a_network_of_reduced_labels_gives_classes_from_0_on(segformer_dir, tmp_path):
    from transformers import SegformerForSemanticSegmentation, SegformerImageProcessor

    SegformerForSemanticSegmentation.from_pretrained(segformer_dir).save_pretrained(tmp_path / "reduced")
    SegformerImageProcessor(size={"height": 48, "width": 64}, do_reduce_labels=True).save_pretrained(
        tmp_path / "reduced"
    )
    root = write_scenes(tmp_path / "data", 4, counts={"val": 2})
    said = []
    name = ModelName(source=str(tmp_path / "reduced"))
    predict(name, [root / "images"], tmp_path / "out", CPU, notify=said.append)
    assert (
        "masks: classes from 0 on; the network was trained on reduced labels, its class 0 was stored as label 1" in said
    )
    masks = masks_in(tmp_path / "out")
    found = mean_iou({key.removeprefix("val/"): mask for key, mask in masks.items()}, root / "masks/val", classes=5)
    for path in (root / "masks/val").iterdir():  # as ADE20K stores them
        labels = np.asarray(Image.open(path))
        Image.fromarray(np.where(labels == 255, 0, labels + 1).astype(np.uint8)).save(path)
    assert found == pytest.approx(evaluate(name, root, EvalConfig(device="cpu")).mIoU, abs=TIE)


def test_pictures_are_brought_to_the_size_of_the_training(segformer_dir, photos, tmp_path):
    trained = shutil.copytree(segformer_dir, tmp_path / "trained")
    (trained / "finetune.yaml").write_text("size: [32, 40]\n")
    said = []
    predict(ModelName(source=str(trained)), [photos], tmp_path / "as_trained", CPU, notify=said.append)
    assert "as it was trained (finetune.yaml): --size 32x40" in said
    config = PredictConfig(device="cpu", size=(32, 40))
    predict(ModelName(source=str(segformer_dir)), [photos], tmp_path / "as_said", config)
    predict(ModelName(source=str(segformer_dir)), [photos], tmp_path / "otherwise", CPU)
    as_trained, as_said, otherwise = (masks_in(tmp_path / each) for each in ("as_trained", "as_said", "otherwise"))
    differ = [np.mean(as_trained[name] != as_said[name]) for name in as_trained]
    assert max(differ) < TIE / 100
    assert max(np.mean(otherwise[name] != as_said[name]) for name in as_said) > TIE / 100


def test_a_single_probability_is_class_1_above_one_half(tmp_path):
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    model = smp.Unet(
        "resnet18", encoder_weights=None, decoder_channels=(16, 8, 8, 8, 8), classes=1, activation="sigmoid"
    )
    model.save_pretrained(tmp_path / "binary")
    root = write_scenes(tmp_path / "data", 2, counts={"val": 2}, size=(64, 64))
    name = ModelName(source=str(tmp_path / "binary"))
    done = predict(name, [root / "images/val"], tmp_path / "out", CPU)
    assert 0 < done.classes[1].share < 1, "both classes must occur"
    found = mean_iou(masks_in(tmp_path / "out"), root / "masks/val", classes=2)
    assert found == pytest.approx(evaluate(name, root, EvalConfig(device="cpu")).mIoU, abs=TIE)


def test_every_kind_of_picture_at_its_own_size(tmp_path):
    """Gray, alpha, 16 bits, turned by EXIF, in subfolders: masks are upright, of the picture's size, by formula."""
    folder, gray = tmp_path / "pictures", noise(20, 33)
    (folder / "sub").mkdir(parents=True)
    Image.fromarray(gray).save(folder / "gray.png")
    Image.fromarray(np.dstack([gray] * 3 + [255 - gray])).save(folder / "alpha.png")
    Image.fromarray(gray.astype(np.uint16) << 8).save(folder / "deep.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(gray).save(folder / "sub/turned.png", exif=turned)
    done = predict(levels(tmp_path), [folder], tmp_path / "out", CPU)
    masks = masks_in(tmp_path / "out")
    assert [*masks] == ["alpha", "deep", "gray", "sub/turned"]
    assert all(mask.dtype == np.uint8 for mask in masks.values())
    for name in ("gray", "alpha", "deep"):
        assert (masks[name] == by_formula(gray)).all(), name
    assert (masks["sub/turned"] == np.rot90(by_formula(gray), -1)).all()
    assert np.asarray(Image.open(tmp_path / "out/overlays/sub/turned.jpg")).shape == (33, 20, 3)
    assert done.files[3].size == (33, 20)
    shares = np.bincount(by_formula(gray).ravel(), minlength=6) / gray.size
    assert [row.share for row in done.classes] == pytest.approx(shares)
    assert done.files[0].shares == pytest.approx(dict(enumerate(shares)))
    assert json.loads((tmp_path / "out/predictions.json").read_text()) == json.loads(json.dumps(done.to_json()))


def test_more_than_256_classes_are_16_bits_and_large_pictures_are_tiled(tmp_path, monkeypatch):
    gray = noise(150, 200)
    Image.fromarray(gray).save(tmp_path / "x.png")
    monkeypatch.setattr(windows, "_LARGE", 150 * 200 - 1)
    monkeypatch.setattr(images, "_DEFAULT_SIZE", (64, 64))
    said = []
    predict(levels(tmp_path / "model", 300), [tmp_path / "x.png"], tmp_path / "out", CPU, notify=said.append)
    (mask,) = masks_in(tmp_path / "out").values()
    assert mask.dtype == np.uint16
    assert mask.max() > 255
    assert (mask == by_formula(gray, 300)).all()
    assert said[-1] == "large images (1) are taken in windows of 64x64, see --size"


def test_windows_of_a_network_of_one_size(tmp_path):
    """A window that is cut to a small picture is padded."""
    gray = noise(20, 70)
    Image.fromarray(gray).save(tmp_path / "x.png")
    name = levels(tmp_path / "model")
    one_size = LEVELS.replace("x.shape[2] * x.shape[3] > 150 * 160", "x.shape[2:] != (32, 32)").replace(
        "Memory", "Value"
    )
    (tmp_path / "model/levels.py").write_text(one_size)
    config = PredictConfig(device="cpu", sliding_window=True, size=(32, 32), overlays=False)
    predict(name, [tmp_path / "x.png"], tmp_path / "out", config)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out/masks/x.png")), by_formula(gray))


def test_a_bad_picture_is_an_error_or_skipped(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in (1, 2, 3):
        Image.fromarray(noise(8, 8, number)).save(folder / f"{number}.png")
    (folder / "1.png").write_bytes(b"broken")
    name, out = levels(tmp_path), tmp_path / "out"
    with pytest.raises(DataError, match=r"1\.png: is not an image"):
        predict(name, [folder], out, CPU)
    assert not out.exists()
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:40])
    with pytest.raises(DataError, match=r"3\.png: is bad image number 2 of 3"):
        predict(name, [folder], out, PredictConfig(device="cpu", skip_bad=0.3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["levels.pth", "levels.py", "pictures"]
    warned = []
    done = predict(name, [folder], out, PredictConfig(device="cpu", skip_bad=0.5), warn=warned.append)
    assert [*masks_in(out)] == ["2"]
    assert [Path(path).name for path, _ in done.skipped] == ["1.png", "3.png"]
    assert [line.startswith("skipped") for line in warned] == [True, True]


def test_logits_that_are_not_finite_leave_nothing(tmp_path):
    Image.fromarray(noise(8, 8)).save(tmp_path / "x.png")
    name = levels(tmp_path)
    state = torch.load(tmp_path / "levels.pth")
    torch.save({**state, "classify.bias": state["classify.bias"] * 1e38}, tmp_path / "levels.pth")
    with pytest.raises(NumericsError, match=r"NaN or Inf"):
        predict(name, [tmp_path / "x.png"], tmp_path / "out", CPU)
    assert not (tmp_path / "out").exists()


def test_pictures_are_never_written_over(tmp_path):
    (tmp_path / "pictures").mkdir()
    picture = tmp_path / "pictures/x.png"
    Image.fromarray(noise(8, 8)).save(picture)
    name, before = levels(tmp_path / "model"), picture.read_bytes()
    for place, out, what in (
        (picture, picture.parent, "holds .*x.png, which is read"),
        (picture, tmp_path, "holds"),
        (picture.parent, picture.parent / "out", "lies in .*, which is read"),
        (picture, tmp_path / "model", "holds .*, which is read"),
    ):
        with pytest.raises(OutputError, match=what):
            predict(name, [place], out, CPU, overwrite=True)
    assert picture.read_bytes() == before
    predict(name, [picture], tmp_path / "out", CPU)
    with pytest.raises(OutputError, match="--overwrite"):
        predict(name, [picture], tmp_path / "out", CPU)
    predict(name, [picture], tmp_path / "out", PredictConfig(device="cpu", overlays=False), overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["legend.png", "masks", "predictions.json"]


def test_names_that_are_no_utf8(tmp_path):
    picture = tmp_path / os.fsdecode(b"caf\xe9.png")
    Image.fromarray(noise(8, 8)).save(picture)
    predict(levels(tmp_path / "model"), [picture], tmp_path / "out", CPU)
    (file,) = json.loads((tmp_path / "out/predictions.json").read_text(encoding="utf-8"))["files"]
    assert file["image"] == str(picture)
    assert (tmp_path / "out" / file["mask"]).exists()


def test_overlays_have_the_colors_of_the_user(tmp_path):
    gray = noise(16, 16)
    Image.fromarray(gray).save(tmp_path / "x.png")
    lines = [f"class{k}: {40 * k} {255 - 40 * k} 7" for k in range(6)]
    (tmp_path / "colors.txt").write_text("\n".join(lines))
    done = predict(
        levels(tmp_path),
        [tmp_path / "x.png"],
        tmp_path / "out",
        PredictConfig(device="cpu", colors=tmp_path / "colors.txt"),
    )
    assert [row.color for row in done.classes] == [f"#{40 * k:02x}{255 - 40 * k:02x}07" for k in range(6)]
    overlay = np.asarray(Image.open(tmp_path / "out/overlays/x.jpg")).astype(int)
    k = by_formula(gray)
    expected = 0.45 * np.dstack([gray] * 3) + 0.55 * np.dstack([40 * k, 255 - 40 * k, np.full_like(k, 7)])
    assert np.abs(overlay - expected).mean() < 12  # JPEG of noise; other colors are some 60 off
    (tmp_path / "colors.txt").write_text("\n".join(lines[:4]))
    with pytest.raises(DataError, match=r"colors\.txt: has the colors of other classes.*got 4 classes"):
        predict(
            levels(tmp_path),
            [tmp_path / "x.png"],
            tmp_path / "no",
            PredictConfig(device="cpu", colors=tmp_path / "colors.txt"),
        )


def test_colors_are_distinct_and_do_not_depend_on_their_number(tmp_path):
    few, many = distinct_colors(3), distinct_colors(256)
    assert (many[:3] == few).all()
    assert len(np.unique(many, axis=0)) == 256
    first = many[:20].astype(int)
    apart = np.abs(first[:, None] - first[None]).sum(axis=2)[~np.eye(20, dtype=bool)]
    assert apart.min() > 60
    assert class_colors(2, own=[(1, 2, 3), (4, 5, 6)]).tolist() == [[1, 2, 3], [4, 5, 6]]
    (tmp_path / "c.txt").write_text("a 1 1 1\nvoid 0 0 0\nb 2 2 2\n")
    assert class_colors(2, read_colors(tmp_path / "c.txt")).tolist() == [[1, 1, 1], [2, 2, 2]]


def test_legends_take_any_names():
    rows = [(f"{k}  name\nof {k} " * 20, (k, 0, 0)) for k in range(90)]
    assert np.asarray(draw_legend(rows)).shape[0] < 41 * 24
    assert draw_legend(rows[:1]).getpixel((20, 15)) == (0, 0, 0)


@pytest.mark.parametrize("bands", [1, 2, 5])
def test_bands_are_shown_from_their_smallest_to_their_largest_value(bands):
    picture = torch.arange(bands * 6, dtype=torch.float32).view(bands, 2, 3) * 1000
    shown = np.asarray(draw_overlay(picture, np.zeros((2, 3), int), np.zeros((1, 3), np.uint8)))
    assert shown.shape == (2, 3, 3)
    assert shown[0, 0].tolist() == [0] * 3
    assert shown[1, 2] == pytest.approx([0.45 * 255] * 3, abs=1)


def test_the_palette_of_an_mmsegmentation_checkpoint(tmp_path):
    pytest.importorskip("mmseg")
    from equalize.checkpoint.families.mmsegmentation.facts import palette
    from tests.support.mmseg_networks import saved

    assert ModelName(source=str(saved(tmp_path, "FCNHead"))).load().palette == ((1, 2, 3), (4, 5, 6), (7, 8, 9))
    assert palette({"PALETTE": [[1, 2, 3]]}) == ((1, 2, 3),)
    assert [palette({"PALETTE": each}) for each in (None, [], [[1, 2]], [[1, 2, 300]], [3], "red")] == [None] * 6


def test_command(run_cli, segformer_dir, photos, tmp_path):
    ran = run_cli("predict", segformer_dir, photos / "0.png", photos / "1.png", "-o", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    done = json.loads(ran.out)
    assert [file["mask"] for file in done["files"]] == ["masks/0.png", "masks/1.png"]
    assert sum(row["pixels"] for row in done["classes"]) == 2 * 64 * 48
    ran = run_cli("predict", segformer_dir, f"{photos}/*.png", "-o", tmp_path / "out", "--overwrite")
    assert ran.code == 0, ran.err
    assert f"wrote {tmp_path / 'out'}: 4 masks, overlays, legend.png, predictions.json" in ran.text
    assert np.asarray(Image.open(tmp_path / "out/legend.png")).shape[1] > 50
    ran = run_cli("predict", segformer_dir, tmp_path / "none.png", "-o", tmp_path / "none")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "none.png: no such picture or folder" in ran.err


def test_one_process(run_cli, segformer_dir, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    ran = run_cli("predict", segformer_dir, photos, "-o", tmp_path / "out")
    assert ran.code == InputError.exit_code
    assert "torchrun" in ran.err
