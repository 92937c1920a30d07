"""The report in OUT: drawn from what was trained, again after a resume, and from a few images alone."""

import html
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import equalize
from equalize.commands.finetune import report
from equalize.commands.finetune.finetune import finetune
from equalize.commands.finetune.report import panel_of, spread
from equalize.commands.labels import check_split
from equalize.commands.overlays import colors_of_masks
from equalize.data.colors import read_colors
from equalize.data.dataset import open_data
from equalize.data.label_check import LabelSettings
from tests.support.browser import check_page
from tests.support.training import QUICK, metrics

CONFIG = replace(QUICK, max_steps=3, eval_every=1, calibrate="preserve")


@pytest.fixture(autouse=True)
def _without_report():
    """Here there is one."""


@pytest.fixture(scope="module")
def trained(calm, five_classes, tmp_path_factory):
    """OUT, and what its pictures were drawn from."""
    out, given = tmp_path_factory.mktemp("report") / "out", {}

    def seen(name, draw):
        def call(*arguments):
            given[name] = arguments
            return draw(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_curves", "draw_panels"):
            patch.setattr(report, name, seen(name, getattr(report, name)))
        finetune(calm, five_classes, out, CONFIG, command="equalize finetune net.pth")
    return out, given


def test_the_pictures_are_those_of_the_run_and_of_the_best_model(trained, calm, five_classes):
    out, given = trained
    lines, best = given["draw_curves"]
    assert lines == metrics(out)
    assert best == max((line for line in lines if "mIoU" in line), key=lambda line: line["mIoU"])["step"]
    panels, colors, names = given["draw_panels"]
    assert [panel.name for panel in panels] == ["000.png", "001.png", "002.png"]
    assert (len(colors), names) == (5, ("0", "1", "2", "3", "4"))
    model = equalize.load(out, arch=calm.arch).model  # OUT loads with the pictures in it, and holds the best weights
    for panel in panels:
        label = np.array(Image.open(five_classes / "masks/val" / panel.name))
        pixels = np.array(Image.open(five_classes / "images/val" / panel.name))
        assert np.array_equal(panel.label_HW, label)
        assert np.array_equal(panel.picture_HW3, pixels)
        x = equalize.load(out, arch=calm.arch).preprocess(Image.fromarray(pixels), (48, 64))
        with torch.no_grad():
            logits = F.interpolate(model(x[None])["out"], size=(48, 64), mode="bilinear")[0]
        top = logits.topk(2, dim=0).values
        clear = (top[0] - top[1] > 1e-4).numpy()  # ties may fall either way
        assert np.array_equal(panel.prediction_HW[clear], logits.argmax(0).numpy()[clear])
        assert panel.wrong == pytest.approx((panel.prediction_HW != label)[label != 255].mean())


def test_the_page_holds_both_pictures_scores_scales_and_settings(trained):
    out, _ = trained
    check_page(out / "report.html", pictures=2)
    page = html.unescape((out / "report.html").read_text())
    assert page.count("<img ") == 2
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ("curves.png", "panels.png"))
    best = max((line for line in metrics(out) if "mIoU" in line), key=lambda line: line["mIoU"])
    assert f"mIoU {best['mIoU']:.2f} % on 3 images of" in page
    assert (out / "finetune.yaml").read_text().strip() in page
    assert "fuse: channels 0 to 7" in page
    assert re.search(rf"equalize evaluate {re.escape(str(out))} --data \S+ --arch \S+:Net\n", page)
    assert (out / "last/commands.txt").read_text() == "equalize finetune net.pth\n"


def test_what_is_resumed_is_drawn_whole_and_a_comparison_draws_nothing(calm, five_classes, tmp_path):
    out = tmp_path / "out"
    config = replace(CONFIG, max_steps=1, calibrate=None)
    finetune(calm, five_classes, out, config, models=False)
    assert not (out / "report.html").exists()
    finetune(calm, five_classes, out, config, resume=True, command="equalize finetune --resume")
    assert all((out / name).exists() for name in ("report.html", "curves.png", "panels.png"))
    assert (out / "last/commands.txt").read_text() == "equalize finetune --resume\n"


def test_without_matplotlib_one_note_and_a_page_without_pictures(calm, five_classes, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "can_draw", lambda: False)
    notes = []
    out = tmp_path / "out"
    finetune(calm, five_classes, out, replace(CONFIG, max_steps=1, calibrate=None), notify=notes.append)
    assert len([note for note in notes if "pip install 'equalize[plot]'" in note]) == 1
    assert "<img " not in (out / "report.html").read_text()
    assert not (out / "curves.png").exists()


def test_images_are_spread_and_the_same_each_time():
    assert spread(range(101)) == [12, 37, 63, 88]
    assert [spread(range(number)) for number in range(6)] == [[], [0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 3, 4]]


def test_a_large_image_is_shown_reduced_and_scored_whole(trained, calm, tmp_path):
    out, _ = trained
    label = np.zeros((40, 1000), np.uint8)
    label[:, 500:] = np.arange(500) % 5
    for kind, pixels in (("images", np.stack([label * 50] * 3, axis=-1)), ("masks", label)):
        (tmp_path / kind).mkdir()
        Image.fromarray(pixels).save(tmp_path / kind / "a.png")
    checkpoint = equalize.load(out, arch=calm.arch)
    split = check_split(open_data(tmp_path, labels=True), 5, None, LabelSettings())
    ((image, mask),) = split.dataset.with_masks()
    panel = panel_of(checkpoint, split, image, mask, QUICK.scoring(), torch.device("cpu"))
    assert panel.picture_HW3.shape == (19, 480, 3)
    assert panel.label_HW.shape == panel.prediction_HW.shape == (19, 480)
    assert not panel.label_HW[:, :240].any()
    x = checkpoint.preprocess(Image.open(image), (48, 64))
    with torch.no_grad():
        found = F.interpolate(checkpoint.model(x[None])["out"], size=label.shape, mode="bilinear")[0].argmax(0).numpy()
    assert panel.wrong == pytest.approx((found != label).mean(), abs=1e-3)


def test_classes_have_the_colors_of_the_masks(five_classes, tmp_path):
    split = check_split(open_data(five_classes, labels=True), 5, None, LabelSettings())
    gray = colors_of_masks(5, split.rule, split.dataset.masks[0])
    assert len(np.unique(gray, axis=0)) == 5
    mask = Image.fromarray(np.zeros((4, 4), np.uint8), "P")
    palette = np.arange(15, dtype=np.uint8).reshape(5, 3)
    mask.putpalette(palette.tobytes())
    mask.save(tmp_path / "mask.png")
    assert np.array_equal(colors_of_masks(5, split.rule, tmp_path / "mask.png"), palette)
    assert np.array_equal(colors_of_masks(4, replace(split.rule, reduce=True), tmp_path / "mask.png"), palette[1:])
    (tmp_path / "colors.txt").write_text("1 2 3 road\n0 0 0 void\n4 5 6 sky\n")
    colors = read_colors(tmp_path / "colors.txt").for_classes(2)
    assert colors_of_masks(2, replace(split.rule, colors=colors), tmp_path / "mask.png").tolist() == [
        [1, 2, 3],
        [4, 5, 6],
    ]
