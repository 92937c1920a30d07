"""What the pictures of a comparison are drawn from."""

import numpy as np

from equalize.commands.report.comparison import Estimate, draw_class_differences, draw_learning_curves, draw_rates


def test_means_over_the_rates_with_bands_over_the_seeds(drawn):
    draw_rates({"none": {1e-2: [4.0, 8.0], 1e-3: [1.0, 2.0]}, "auto": {1e-2: [9.0]}}, split="val", title=["long " * 40])
    (axes,) = drawn.axes
    assert axes.lines[0].get_xydata().tolist() == [[1e-3, 1.5], [1e-2, 6.0]]
    corners = {tuple(corner) for corner in axes.collections[0].get_paths()[0].vertices.tolist()}
    assert corners == {(1e-3, 1.0), (1e-3, 2.0), (1e-2, 4.0), (1e-2, 8.0)}
    assert [line.get_label() for line in axes.lines] == ["none", "auto"]
    assert drawn.get_suptitle().split() == ["long"] * 40
    assert "\n" in drawn.get_suptitle()


def test_a_panel_of_curves_for_each_rate(drawn):
    seeds = [[[1, 10.0], [2, 20.0]], [[1, 14.0], [2, 30.0]]]
    draw_learning_curves({"lr 1": {"none": seeds}, "lr 2": {"none": seeds[:1]}}, split="val")
    first, second = drawn.axes
    assert first.lines[0].get_xydata().tolist() == [[1, 12.0], [2, 25.0]]
    assert second.lines[0].get_xydata().tolist() == seeds[0]


def test_classes_with_intervals_or_seeds(drawn):
    found = {"road": Estimate(values=(1.0, 2.0, 3.0), low=0.5, high=3.5), "sky": Estimate(values=(-1.0, -3.0))}
    draw_class_differences({"auto against none": found})
    (axes,) = drawn.axes
    means, interval, seeds = axes.lines[1:]
    assert list(means.get_xdata()) == [2.0, -2.0]
    assert list(interval.get_xdata()) == [0.5, 3.5]
    assert np.array_equal(seeds.get_xdata(), [-1.0, -3.0])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["road", "sky"]
