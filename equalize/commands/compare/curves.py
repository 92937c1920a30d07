"""Learning curves as a picture, drawn with matplotlib, which the extra `plot` installs."""

import importlib.util
from pathlib import Path

import numpy as np

from equalize.commands.compare.compare import Comparison


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_curves(found: Comparison, path: str | Path) -> None:
    """A panel for each rate, a color for each arm: thin lines are seeds, the thick one their mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    setup = found.setup
    figure = Figure(figsize=(3 + 4 * len(setup.rates), 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(setup.rates), sharey=True, squeeze=False)[0]
    for panel, rate in zip(panels, setup.rates, strict=True):
        for number, arm in enumerate(setup.arms):
            curves = [result["curve"] for result in found.results_of(arm.name, rate)]
            steps = [step for step, _ in curves[0]]
            color = f"C{number % 10}"
            for curve in curves:
                panel.plot(steps, [score for _, score in curve], color=color, linewidth=0.6, alpha=0.5)
            means_T = np.mean([[score for _, score in curve] for curve in curves], axis=0)
            panel.plot(steps, means_T, color=color, linewidth=2, marker=".", label=arm.name)
        panel.set(title=f"lr {rate:g}", xlabel="step", xlim=(0, None))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("mIoU of the validation split, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=120, metadata={"Software": None})
