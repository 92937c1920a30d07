"""What the pictures of a training are drawn from."""

import numpy as np

from equalize.commands.report import training
from equalize.commands.report.training import Panel, draw_curves, draw_panels

COLORS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)


def test_curves_hold_every_line_of_all_sittings(drawn):
    lines = [{"step": step, "epoch": 0.0, "loss": 9.0 / step, "lr": step * 1e-3} for step in (1, 2, 3, 4, 5)]
    lines[3:3] = [{"step": 3, "epoch": 0.0, "mIoU": 40.0}]
    lines += [{"step": 5, "epoch": 0.0, "mIoU": 30.0}, {"step": 6, "epoch": 0.0, "mIoU": None}]
    draw_curves(lines, best_step=3)
    loss, score, rate = drawn.axes
    assert [axes.get_ylabel() for axes in drawn.axes] == ["loss", "mIoU, %", "learning rate"]
    assert loss.lines[0].get_xydata().tolist() == [[step, 9.0 / step] for step in (1, 2, 3, 4, 5)]
    assert rate.lines[0].get_xydata().tolist() == [[step, step * 1e-3] for step in (1, 2, 3, 4, 5)]
    assert score.lines[0].get_xydata().tolist() == [[3, 40.0], [5, 30.0]]
    assert all(3 in axes.lines[1].get_xdata() for axes in drawn.axes)
    assert score.get_title(loc="right") == "best mIoU 40.00 at step 3"


def test_mistakes_are_where_a_label_that_counts_is_missed(drawn):
    label, prediction = np.array([[0, 1, 2], [255, 255, 1]]), np.array([[0, 2, 2], [0, 1, 0]])
    panel = Panel(
        name="caf\udce9.png",  # as a name that is no UTF-8 is read
        picture_HW3=np.full((2, 3, 3), 100, np.uint8),
        label_HW=label,
        prediction_HW=prediction,
        ignore_index=255,
        wrong=0.5,
    )
    wrong = [[False, True, False], [False, False, True]]
    assert panel.mistakes.tolist() == wrong
    draw_panels([panel], COLORS, ("_red_", "green", "blue"))
    assert drawn.axes[0].get_ylabel() == "caf?.png"
    picture, labels, predicted, mistakes = (axes.images[0].get_array() for axes in drawn.axes)
    assert (picture == 100).all()
    assert (labels[label != 255] == COLORS[label[label != 255]]).all()
    void = labels[label == 255]
    assert (void == void[:, :1]).all()  # gray, as no class is here
    assert (predicted == COLORS[prediction]).all()
    assert (mistakes == training._WRONG).all(axis=-1).tolist() == wrong
    said = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert said == [" _red_", "green", "blue", "no label (not scored)", "mistake"]
