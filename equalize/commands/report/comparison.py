"""A comparison of trainings as pictures. Scores are in percent, differences in percentage points."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from equalize.commands.report.style import COLORS, Picture, draw_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Curve = Sequence[Sequence[float]]
"""(step, score), by step."""

_GRAY = COLORS[-1]
_DASHES = ("-", "--", ":", "-.")
_COLUMNS = 3  # panels beside each other
_MOST_CLASSES = 40
_ARMS_A_ROW = 5  # of a legend
_TICKS = 10  # numbers on an axis of rates
_CHARACTERS = 15  # of a title, an inch


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over seeds."""

    values: tuple[float, ...]
    """A value a seed."""
    low: float | None = None
    high: float | None = None
    """95 % interval of the mean; None for too few seeds."""

    @property
    def mean(self) -> float:
        """Over seeds."""
        return fmean(self.values)


def draw_rates(
    scores: Mapping[str, Mapping[float, Sequence[float]]], *, split: str, title: Sequence[str] = ()
) -> Picture:
    """mIoU against the learning rate: an arm a line, the baseline's first, with a band over its seeds.

    Scores are by arm and rate, one a seed, of a split; the lines of the title stand above the picture, wrapped.
    """
    rates = sorted({rate for each in scores.values() for rate in each})

    def draw(figure: "Figure") -> None:
        _set_title(figure, title)
        axes = figure.subplots()
        for (arm, found), style in zip(scores.items(), _styles(len(scores)), strict=True):
            mine = sorted(found)
            _draw_band(axes, mine, [found[rate] for rate in mine], arm, style)
        axes.set(xscale="log", xlabel="learning rate", ylabel=f"mIoU on {split}, %")
        ticks = _apart(rates)
        axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
        axes.minorticks_off()
        _legend_below(figure, axes)

    alt = f"mIoU on {split} against the learning rate for {', '.join(scores)}"
    size = (7.4, 4 + _title_height(title, 7.4) + _legend_height(len(scores)))
    return draw_picture("rates", alt, draw, size=size)


def draw_learning_curves(
    curves: Mapping[str, Mapping[str, Sequence[_Curve]]], *, split: str, title: Sequence[str] = ()
) -> Picture:
    """mIoU against the step, a panel for each heading: an arm a line, the baseline's first, with a band over its seeds.

    Curves are by heading and arm, one a seed, all of the same steps; `split` and `title` as of `draw_rates`.
    """
    columns = 2 if len(curves) in (2, 4) else min(_COLUMNS, len(curves))
    rows = math.ceil(len(curves) / columns)
    arms = list(dict.fromkeys(arm for each in curves.values() for arm in each))
    wide = {1: 7.4, 2: 8.0, 3: 9.6}[columns]
    tall = (3.4 if columns == 1 else 2.4) * rows + 0.2 + _title_height(title, wide) + _legend_height(len(arms))

    def draw(figure: "Figure") -> None:
        _set_title(figure, title)
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(curves) :]:
            axes.set_axis_off()
        for place, (axes, (heading, found)) in enumerate(zip(grid.flat, curves.items(), strict=False)):
            for (arm, seeds), style in zip(found.items(), _styles(len(found)), strict=True):
                steps = [point[0] for point in seeds[0]]
                scores = [[curve[number][1] for curve in seeds] for number in range(len(steps))]
                _draw_band(axes, steps, scores, arm, style)
            axes.set(title=heading, xlim=(0, None))
            if place >= len(curves) - columns:  # nothing below it
                axes.set_xlabel("step")
                axes.xaxis.get_major_locator().set_params(integer=True)
                axes.tick_params(labelbottom=True)
        for axes in grid[:, 0]:
            axes.set_ylabel(f"mIoU on {split}, %")
        _legend_below(figure, grid.flat[0])

    alt = f"learning curves of {', '.join(arms)} on {split}"
    return draw_picture("compare", alt, draw, size=(wide, tall))


def draw_class_differences(differences: Mapping[str, Mapping[str, Estimate]]) -> Picture:
    """By how much the IoU of each class differs: an arm a color; with the seeds as points where they are few.

    Differences are by what is compared, such as "auto against none", and class; by those of the first one the classes
    are chosen, where they are too many.
    """
    first = next(iter(differences.values()))
    classes = sorted(first, key=lambda name: -abs(first[name].mean))[:_MOST_CLASSES]
    classes = [name for name in first if name in classes]
    number = len(differences)

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        axes.axvline(0, color=_GRAY, linewidth=1)
        styles = _styles(number + 1)[1:]
        for place, ((name, found), style) in enumerate(zip(differences.items(), styles, strict=True)):
            offset = 0.6 * ((place + 0.5) / number - 0.5)
            rows = [(row + offset, found[each]) for row, each in enumerate(classes) if each in found]
            _draw_estimates(axes, rows, style["color"], name)
        axes.set_yticks(range(len(classes)), classes)
        axes.invert_yaxis()
        axes.set_xlabel("difference of the IoU, percentage points")
        if number > 1:
            figure.legend(loc="outside upper center", ncols=min(3, number))
        else:
            axes.set_title(next(iter(differences)))

    alt = f"difference of the IoU of each class: {', '.join(differences)}"
    tall = 1.2 + max(0.26, 0.16 * number) * len(classes)
    return draw_picture("classes", alt, draw, size=(7.4, tall))


def draw_confirmed(scores: Mapping[str, Estimate], *, split: str, title: Sequence[str] = ()) -> Picture:
    """mIoU of each arm, the baseline first: its seeds as points, their mean with its interval; see `draw_rates`."""

    def draw(figure: "Figure") -> None:
        _set_title(figure, title)
        axes = figure.subplots()
        for row, ((_, found), style) in enumerate(zip(scores.items(), _styles(len(scores)), strict=True)):
            _draw_estimates(axes, [(row, found)], style["color"], "")
            axes.plot(found.values, [row + 0.22] * len(found.values), ".", color=style["color"], alpha=0.6)
        axes.axvline(next(iter(scores.values())).mean, color=_GRAY, linewidth=1, linestyle=":")
        axes.set_yticks(range(len(scores)), list(scores))
        axes.set_ylim(len(scores) - 0.5, -0.5)
        axes.set_xlabel(f"mIoU on {split}, %: mean over seeds with its 95 % interval; points are seeds")

    alt = f"mIoU on {split} of {', '.join(f'{arm} {found.mean:.2f}' for arm, found in scores.items())}"
    size = (7.4, 0.9 + 0.5 * len(scores) + _title_height(title, 7.4))
    return draw_picture("confirmed", alt, draw, size=size)


def _apart(rates: Sequence[float]) -> list[float]:
    """Those of the rates, in order, whose numbers can stand beside each other."""
    far = (rates[-1] / rates[0]) ** (1 / _TICKS)
    shown = [rates[0]]
    for rate in rates[1:]:
        shown += [rate] if rate > far * shown[-1] else []
    return shown


def _styles(number: int) -> list[dict[str, Any]]:
    """Of the baseline, which is gray, and of number - 1 arms."""
    others = len(COLORS) - 1
    arms = [{"color": COLORS[k % others], "linestyle": _DASHES[k // others % len(_DASHES)]} for k in range(number - 1)]
    return [{"color": _GRAY, "linestyle": "-"}, *arms][:number]


def _draw_band(
    axes: "Axes", places: Sequence[float], values: Sequence[Sequence[float]], label: str, style: Mapping[str, Any]
) -> None:
    """The mean of the values at each place, over a band from their lowest to their highest."""
    axes.fill_between(
        places, [min(each) for each in values], [max(each) for each in values], color=style["color"], alpha=0.15, lw=0
    )
    axes.plot(places, [fmean(each) for each in values], marker="o", markersize=3, linewidth=1.6, label=label, **style)


def _draw_estimates(axes: "Axes", rows: Sequence[tuple[float, Estimate]], color: str, label: str) -> None:
    """Means, with their intervals; without, the single values as small points."""
    axes.plot([each.mean for _, each in rows], [row for row, _ in rows], "D", color=color, markersize=5, label=label)
    for row, each in rows:
        if each.low is not None and each.high is not None:
            axes.plot([each.low, each.high], [row, row], color=color, linewidth=1.6)
        elif len(each.values) > 1:
            axes.plot(each.values, [row] * len(each.values), "|", color=color, markersize=7)


def _legend_below(figure: "Figure", axes: "Axes") -> None:
    handles, names = axes.get_legend_handles_labels()
    where = {"loc": "outside lower center", "ncols": min(_ARMS_A_ROW, len(names))}
    figure.legend(handles, names, **where, title="bands reach from the lowest to the highest seed", title_fontsize=8)


def _legend_height(arms: int) -> float:
    return 0.3 + 0.2 * math.ceil(arms / _ARMS_A_ROW)


def _wrapped(title: Sequence[str], inches: float) -> list[str]:
    return [part for line in title for part in textwrap.wrap(line, round(_CHARACTERS * inches))]


def _title_height(title: Sequence[str], inches: float) -> float:
    return 0.17 * len(_wrapped(title, inches))


def _set_title(figure: "Figure", title: Sequence[str]) -> None:
    if title:
        lines = "\n".join(_wrapped(title, figure.get_figwidth()))
        figure.suptitle(lines, fontsize=9, x=0.01, horizontalalignment="left")
