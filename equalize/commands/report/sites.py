"""Figures of a measured fusion layer: how its branches come to it, and how they compare.

Positions are inches from the upper left corner, so that rows keep their height whatever their number is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile, zip_longest
from typing import TYPE_CHECKING, Any

from torch import Tensor

from equalize.commands.report.distributions import Distribution, draw_rows
from equalize.commands.report.style import COLORS, Picture, draw_picture
from equalize.moments.measured import MeasuredSite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TIMES, _SIGMA = "\N{MULTIPLICATION SIGN}", "\N{GREEK SMALL LETTER SIGMA}"
_WIDTH = 8.7
_ROW = 0.46  # inches
_SMALL = 7.5
_BARS = 0.64  # of the width of a column; behind them stand the numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnSite:
    """A measured site and what there is to draw of it.

    Attributes:
        number: of its pictures, from 1.
        after: sigma of each branch afterwards.
        histograms_BK: of the branches' values, see `moments.histograms`; empty (0, K) where there are none.
        strategy: that was planned; empty where nothing was, and `after` is what equalizing would bring.
    """

    number: int
    site: MeasuredSite
    after: tuple[float, ...]
    histograms_BK: Tensor
    strategy: str = ""

    @property
    def shares(self) -> list[float]:
        """Of a step of the layer's output that go through each branch afterwards."""
        energies = [
            (each.stop - each.start) * sigma**2 for each, sigma in zip(self.site.branches, self.after, strict=True)
        ]
        return [energy / (sum(energies) or 1.0) for energy in energies]

    @property
    def centers(self) -> bool:
        """Whether the means are taken out too."""
        return self.strategy in ("", "preserve", "reinit", "rescale") and self.site.shift is not None

    @property
    def colors(self) -> list[str]:
        """One a branch."""
        return [COLORS[index % len(COLORS)] for index in range(len(self.site.branches))]


def draw_layer(drawn: DrawnSite) -> Picture:
    """The branches with their resampling, the concat, the fusion layer and the normalization behind it."""
    height = _ROW * len(drawn.site.branches) + 0.34
    alt = f"{len(drawn.site.branches)} branches enter {drawn.site.layer}"
    draw = partial(_draw_layer, drawn, height)
    return draw_picture(f"layer-{drawn.number}", alt, draw, size=(_WIDTH, max(height, 1.3)))


def draw_branches(drawn: DrawnSite) -> Picture:
    """A row for each branch: its values before and after, sigma and the share of a step."""
    alt = f"Values, sigmas and shares of a step of the branches of {drawn.site.layer}"
    size = (_WIDTH, _ROW * len(drawn.site.branches) + 0.78)
    return draw_picture(f"branches-{drawn.number}", alt, partial(_draw_branches, drawn), size=size)


def short_names(names: Sequence[str], most: int) -> list[str]:
    """Module paths of `most` characters at most: by their ends, or from where they differ if the ends are alike."""
    full = [(name or "input").encode(errors="replace").decode() for name in names]  # of untrusted files
    ends = [_ending(name, most) for name in full]
    if len(set(ends)) == len(set(full)):
        return ends
    alike = [name.split(".") for name, end in zip(full, ends, strict=True) if ends.count(end) > 1]
    prefix = "".join(
        f"{modules[0]}." for modules in takewhile(lambda each: len(set(each)) == 1, zip(*alike, strict=False))
    )
    rests = [f"…{name.removeprefix(prefix)}" if prefix and name.startswith(prefix) else name for name in full]
    return [rest if len(rest) <= most else f"{rest[: most - 1]}…" for rest in rests]


def _ending(name: str, most: int) -> str:
    """The end of a module path, cut between modules where that leaves enough."""
    if len(name) <= most:
        return name
    end = name[1 - most :]
    _, dot, modules = end.partition(".")
    return f"…{modules if dot and len(modules) > most // 2 else end}"


def _canvas(figure: "Figure") -> "Axes":
    """Axes over the whole figure, in inches."""
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    width, height = figure.get_size_inches()
    axes.set(xlim=(0, width), ylim=(height, 0))
    return axes


def _draw_layer(drawn: DrawnSite, height: float, figure: "Figure") -> None:
    site, axes = drawn.site, _canvas(figure)
    middle = figure.get_size_inches()[1] / 2
    top = middle - _ROW * len(site.branches) / 2
    largest = max(branch.std for branch in site.branches) or 1.0
    sources = short_names([branch.source for branch in site.branches], 38)
    for row, (branch, source, color) in enumerate(zip(site.branches, sources, drawn.colors, strict=True)):
        y = top + _ROW * (row + 0.5)
        _box(axes, (0.06, y - 0.17, 2.7, 0.34), color)
        axes.text(0.16, y, source, va="center", fontsize=_SMALL)
        thickness = 0.8 + 4.2 * branch.std / largest
        axes.plot([2.76, 5.46], [y, y], color=color, linewidth=thickness, solid_capstyle="butt", zorder=1)
        if name := branch.resampled:
            _box(axes, (2.98, y - 0.13, 1.5, 0.26), color, opaque=True)
            axes.text(3.73, y, name, ha="center", va="center", fontsize=_SMALL * min(1, 21 / len(name)), zorder=4)
        label = f"{_SIGMA} {branch.std:.3g}"
        axes.text(5.36, y - 0.05 - thickness / 144, label, ha="right", va="bottom", fontsize=_SMALL)
        _box(axes, (5.46, y - _ROW / 2, 0.44, _ROW), color, alpha=0.55, corner=0)
        axes.text(5.68, y, f"{branch.stop - branch.start}", ha="center", va="center", fontsize=_SMALL)
    kernel = " " + _TIMES.join(map(str, site.kernel)) if site.kernel else ""
    groups = f", {site.groups} groups" if site.groups > 1 else ""
    lines = [f"{site.op.replace('_', ' ')}{kernel}", f"{site.branches[-1].stop} channels{groups}"]
    end = 7.3
    _arrow(axes, (5.9, 6.1), middle)
    _module(axes, (6.1, 1.2), middle, lines, site.layer)
    if site.norm is not None:
        _arrow(axes, (end, 7.5), middle)
        _module(axes, (7.5, 0.95), middle, ["normalization"], site.norm)
        end = 8.45
    _arrow(axes, (end, end + 0.2), middle)


def _module(axes: "Axes", across: tuple[float, float], y: float, lines: Sequence[str], name: str) -> None:
    left, width = across
    _box(axes, (left, y - 0.24, width, 0.48))
    size = (_SMALL + 0.5) * min(1, width / (0.074 * max(map(len, lines))))
    axes.text(left + width / 2, y, "\n".join(lines), ha="center", va="center", fontsize=size)
    (label,) = short_names([name], int((width + 0.15) / 0.066))
    axes.text(left + width / 2, y + 0.29, label, ha="center", va="top", fontsize=_SMALL - 0.5, alpha=0.75)


def _arrow(axes: "Axes", across: tuple[float, float], y: float) -> None:
    style = {"arrowstyle": "-|>,head_length=0.35,head_width=0.18", "shrinkA": 0, "shrinkB": 0}
    style |= {"color": axes.xaxis.label.get_color(), "linewidth": 1.2}
    axes.annotate("", xy=(across[1], y), xytext=(across[0], y), arrowprops=style)


def _box(
    axes: "Axes",
    at: tuple[float, float, float, float],
    color: str | None = None,
    *,
    alpha: float = 0.14,
    corner: float = 0.06,
    opaque: bool = False,
) -> None:
    """A rounded box at (x, y, width, height); over whatever lies below where it is opaque."""
    from matplotlib.colors import to_rgba
    from matplotlib.patches import FancyBboxPatch

    x, y, width, height = at
    color = color or axes.xaxis.label.get_color()
    shape = f"round,pad=0,rounding_size={corner}" if corner else "square,pad=0"
    fill = axes.get_facecolor() if opaque else to_rgba(color, alpha)
    patch = FancyBboxPatch(
        (x, y), width, height, boxstyle=shape, facecolor=fill, edgecolor=color, linewidth=1, zorder=3
    )
    axes.add_patch(patch)


def _draw_branches(drawn: DrawnSite, figure: "Figure") -> None:
    site = drawn.site
    seen = len(drawn.histograms_BK) > 0
    canvas = _canvas(figure)
    sources = short_names([branch.source for branch in site.branches], 31 if seen else 38)
    for row, (branch, source, color) in enumerate(zip(site.branches, sources, drawn.colors, strict=True)):
        y = 0.42 + _ROW * (row + 0.5)
        canvas.plot([0.05, 0.05], [y - 0.17, y + 0.17], color=color, linewidth=3, solid_capstyle="butt")
        canvas.text(0.13, y - 0.08, source, va="center", fontsize=_SMALL)
        below = f"{branch.start}..{branch.stop}  {branch.resampled}"
        canvas.text(0.13, y + 0.1, below, va="center", fontsize=_SMALL - 1, alpha=0.7)
    if seen:
        before = [Distribution.of(counts_K) for counts_K in drawn.histograms_BK]
        means = [branch.mean if drawn.centers else 0.0 for branch in site.branches]
        factors = [sigma / (branch.std or 1.0) for sigma, branch in zip(drawn.after, site.branches, strict=True)]
        after = [each.scaled(*change) for each, *change in zip(before, factors, means, strict=True)]
        draw_rows(_column(figure, drawn, (2.34, 1.72), "values as they are"), before, drawn.colors)
        draw_rows(
            _column(figure, drawn, (4.26, 1.72), "values afterwards" if drawn.strategy else "values once equalized"),
            after,
            drawn.colors,
        )
    left = 6.25 if seen else 3.0
    wide = (_WIDTH - left - 0.25) / 2
    sigmas = [branch.std for branch in site.branches]
    errors = [branch.std * (branch.ci95 or 0.0) for branch in site.branches]
    _draw_bars(_column(figure, drawn, (left, wide), f"{_SIGMA} ± 95 %"), drawn, sigmas, drawn.after, ".3g", errors)
    shares = [branch.step_share or 0.0 for branch in site.branches]
    axes = _column(figure, drawn, (left + wide + 0.2, wide), "share of a step")
    _draw_bars(axes, drawn, shares, drawn.shares, ".1%")
    axes.set(xticks=[0, 1], xticklabels=["0", "100 %"], xlim=(0, 1 / _BARS))


def _column(figure: "Figure", drawn: DrawnSite, across: tuple[float, float], title: str) -> "Axes":
    """Axes of one column, a unit a row, from the top."""
    width, height = figure.get_size_inches()
    rows = len(drawn.site.branches)
    at = (across[0] / width, 1 - (0.42 + _ROW * rows) / height, across[1] / width, _ROW * rows / height)
    axes = figure.add_axes(at)
    axes.set_title(title, fontsize=8, loc="left", pad=7)
    axes.set(ylim=(rows - 0.46, -0.46), yticks=[])
    axes.spines["left"].set_visible(False)
    axes.tick_params(labelsize=_SMALL - 0.5, length=2)
    axes.grid(axis="y", visible=False)
    return axes


def _draw_bars(
    axes: Any, drawn: DrawnSite, values: Sequence[float], after: Sequence[float], how: str, errors: Sequence[float] = ()
) -> None:
    """A bar a row, its number to the right of all, and a dashed line where it comes to."""
    ink = axes.xaxis.label.get_color()
    ends = [value + error for value, error in zip_longest(values, errors, fillvalue=0.0)]
    whiskers = {"xerr": errors, "error_kw": {"ecolor": ink, "elinewidth": 1, "capsize": 2.5}} if any(errors) else {}
    axes.barh(range(len(values)), values, height=0.5, color=drawn.colors, alpha=0.75, **whiskers)
    for row, (value, target) in enumerate(zip(values, after, strict=True)):
        where = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center", "fontsize": _SMALL}
        axes.text(1, row, format(value, how), **where)
        axes.plot([target, target], [row - 0.36, row + 0.36], color=ink, linewidth=1.2, linestyle=(0, (2, 1.5)))
    axes.locator_params(axis="x", nbins=3)
    axes.set_xlim(0, (max([*ends, *after]) or 1.0) / _BARS)
