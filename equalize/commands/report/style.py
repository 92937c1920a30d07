"""The look of every figure, and pictures of it on light and on dark ground."""

import importlib.util
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#B8A900", "#7F7F7F")
"""Okabe and Ito's palette, to be told apart by color-blind readers, with a yellow that is seen on white."""

_INK = {"light": "#24292f", "dark": "#d1d7de"}
_GROUND = {"light": "#ffffff", "dark": "#0d1117"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A PNG, and one for dark ground where it differs."""

    name: str
    """Of its file, without `.png`."""
    alt: str
    """What it shows, for those who do not see it."""
    light: bytes
    dark: bytes | None = None


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_picture(name: str, alt: str, draw: Callable[["Figure"], None], *, size: tuple[float, float]) -> Picture:
    """Has `draw` fill an empty figure of a size in inches, of 110 pixels each, on light and on dark ground."""
    light, dark = (_render(draw, size, theme) for theme in ("light", "dark"))
    return Picture(name=name, alt=alt, light=light, dark=dark)


def _render(draw: Callable[["Figure"], None], size: tuple[float, float], theme: str) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    file = io.BytesIO()
    with matplotlib.rc_context(_settings(theme)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a character that the font lacks is a box
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _settings(theme: str) -> dict[str, Any]:
    from cycler import cycler

    ink = _INK[theme]
    return {
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), _GROUND[theme]),
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink),
        "axes.prop_cycle": cycler(color=COLORS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.titlesize": "medium",
        "grid.color": ink,
        "grid.alpha": 0.15,
        "legend.frameon": False,
        "figure.dpi": 110,
        "savefig.dpi": 110,
        "font.size": 9,
        "text.parse_math": False,  # names of classes and files may hold a $
    }
