"""A training as pictures: its curves, and what the network makes of a few images. H x W pixels, K classes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from equalize.commands.report.style import Picture, draw_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Pixels = NDArray[np.uint8]

_COLUMNS = ("picture", "labels", "prediction", "mistakes")
_WIDTH = 2.4  # inches of a column
_TALLEST = 3.2  # inches of a row
_IN_LEGEND = 30  # classes
_LONGEST_NAME = 26
_WRONG = (213, 94, 0)
_STRIPES = (150, 205)  # gray levels of what has no class
_BROAD = 32  # stripes that fit into the longer side


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One image, its labels and what was predicted."""

    name: str
    picture_HW3: _Pixels
    label_HW: NDArray[np.int64]
    prediction_HW: NDArray[np.int64]
    ignore_index: int
    """The label of pixels that do not count."""
    wrong: float | None
    """Share of the pixels that count, of the whole image where this one is reduced; None if none counts."""

    @property
    def counted(self) -> NDArray[np.bool_]:
        """(H, W), true where there is a label that counts."""
        return np.not_equal(self.label_HW, self.ignore_index)

    @property
    def mistakes(self) -> NDArray[np.bool_]:
        """(H, W), true where it counts and is another class than predicted."""
        return self.counted & np.not_equal(self.label_HW, self.prediction_HW)


def draw_curves(lines: Sequence[Mapping[str, Any]], best_step: int | None) -> Picture:
    """Loss, mIoU and learning rate against the step, by the lines of metrics.jsonl, with the step that is kept."""
    logged = [line for line in lines if "loss" in line]
    scored = [line for line in lines if line.get("mIoU") is not None]
    rows = [("loss", logged), ("mIoU", scored), ("lr", logged)]
    rows = [(name, points) for name, points in rows if points]

    def draw(figure: "Figure") -> None:
        heights = [1 if name == "lr" else 2 for name, _ in rows]
        panels = figure.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for number, (axes, (name, points)) in enumerate(zip(panels, rows, strict=True)):
            _draw_curve(axes, name, points, f"C{number}", best_step)
        panels[-1].set_xlabel("step")
        panels[-1].xaxis.get_major_locator().set_params(integer=True)

    what = " and ".join([", ".join(name for name, _ in rows[:-1]), rows[-1][0]]) if rows[1:] else "nothing"
    return draw_picture("curves", f"{what} against the step", draw, size=(7.4, 1 + 1.6 * len(rows)))


def _draw_curve(axes: "Axes", name: str, points: Sequence[Mapping[str, Any]], color: str, best: int | None) -> None:
    steps, values = [line["step"] for line in points], [line[name] for line in points]
    marker = "o" if name == "mIoU" or len(points) == 1 else ""
    axes.plot(steps, values, color=color, marker=marker, markersize=4, linewidth=1.4)
    axes.set_ylabel({"mIoU": "mIoU, %", "lr": "learning rate"}.get(name, name))
    if best is not None:
        axes.axvline(best, color="C3", linewidth=1, linestyle=":")
    if name == "lr":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes.set_ylim(bottom=0)
    top = next((line for line in points if line["step"] == best), None)
    if name == "mIoU" and top is not None:
        axes.plot([top["step"]], [top["mIoU"]], color="C3", marker="*", markersize=12, linestyle="")
        axes.set_title(f"best mIoU {top['mIoU']:.2f} at step {best}", loc="right", color="C3")


def draw_panels(panels: Sequence[Panel], colors_K3: _Pixels, names: Sequence[str]) -> Picture:
    """A row for each small image: picture, labels, prediction, mistakes; below them the classes that are seen."""
    seen = _classes_seen(panels, len(names))
    shown = seen[:_IN_LEGEND]
    columns = max(1, min(6, 80 // (6 + max((len(names[k]) for k in shown), default=1))))
    heights = [min(_TALLEST, _WIDTH * np.divide(*panel.label_HW.shape)) + 0.15 for panel in panels]
    tall = sum(heights) + 0.5 + 0.19 * math.ceil((len(shown) + 2) / columns)

    def draw(figure: "Figure") -> None:
        grid = figure.subplots(len(panels), len(_COLUMNS), squeeze=False, height_ratios=heights)
        for row, panel in zip(grid, panels, strict=True):
            for axes, pixels_HW3 in zip(row, _pixels_of(panel, colors_K3), strict=True):
                axes.imshow(pixels_HW3)
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
            row[0].set_ylabel(_short(panel.name), fontsize="small")
            row[-1].set_xlabel("" if panel.wrong is None else f"{panel.wrong:.1%} wrong", fontsize="small")
        for axes, title in zip(grid[0], _COLUMNS, strict=True):
            axes.set_title(title)
        entries = list(_legend(panels, colors_K3, names, shown, more=len(seen) - len(shown)))
        figure.legend(handles=entries, loc="outside lower center", ncols=columns, handlelength=1.2, handleheight=1.0)

    said = ", ".join(f"{panel.name} ({panel.wrong:.1%} wrong)" for panel in panels if panel.wrong is not None)
    alt = f"pictures, labels, predictions and mistakes of {said or 'images without labels'}"
    return draw_picture("panels", alt, draw, size=(0.3 + _WIDTH * len(_COLUMNS), tall))


def _classes_seen(panels: Sequence[Panel], num_classes: int) -> list[int]:
    """Those that are labeled or predicted; if there are more than the legend takes, the larger ones first."""
    pixels_K = np.zeros(num_classes, np.int64)
    for panel in panels:
        for classes in (panel.label_HW[panel.counted], panel.prediction_HW.ravel()):
            pixels_K += np.bincount(classes, minlength=num_classes)[:num_classes]
    seen = [int(k) for k in np.flatnonzero(pixels_K)]
    return seen if len(seen) <= _IN_LEGEND else sorted(seen, key=lambda k: -pixels_K[k])


def _pixels_of(panel: Panel, colors_K3: _Pixels) -> Iterator[_Pixels]:
    """The four pictures, (H, W, 3) each."""
    void_HW3 = np.repeat(_stripes(panel.label_HW.shape)[..., None], 3, axis=2)
    counts_HW1 = panel.counted[..., None]
    yield panel.picture_HW3
    yield np.where(counts_HW1, colors_K3[np.where(panel.counted, panel.label_HW, 0)], void_HW3)
    yield colors_K3[panel.prediction_HW]
    gray_HW = panel.picture_HW3.mean(axis=2) * 0.5 + 96
    pale_HW3 = np.repeat(gray_HW[..., None], 3, axis=2).astype(np.uint8)
    yield np.where(panel.mistakes[..., None], np.array(_WRONG, np.uint8), np.where(counts_HW1, pale_HW3, void_HW3))


def _stripes(shape: Sequence[int]) -> _Pixels:
    rows_HW, columns_HW = np.indices(shape)
    broad = max(2, max(shape) // _BROAD)
    dark, bright = _STRIPES
    return np.where((rows_HW + columns_HW) // max(1, broad // 2) % 2, bright, dark).astype(np.uint8)


def _legend(
    panels: Sequence[Panel], colors_K3: _Pixels, names: Sequence[str], shown: Sequence[int], *, more: int
) -> Iterator[Any]:
    from matplotlib.patches import Patch

    for k in shown:
        name = f" {names[k]}" if names[k].startswith("_") else names[k]  # legends leave out what starts with _
        yield Patch(facecolor=colors_K3[k] / 255, label=name)
    if more:
        yield Patch(facecolor="none", label=f"and {more} more classes")
    if not all(panel.counted.all() for panel in panels):
        dark, bright = (str(level / 255) for level in _STRIPES)
        yield Patch(facecolor=bright, edgecolor=dark, hatch="//////", linewidth=0, label="no label (not scored)")
    yield Patch(facecolor=np.array(_WRONG) / 255, label="mistake")


def _short(name: str) -> str:
    name = name.encode(errors="replace").decode()  # names of files may be no text
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"
