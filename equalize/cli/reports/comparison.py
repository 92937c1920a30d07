"""A comparison for people: a table and the answers, on a terminal and as Markdown."""

from collections.abc import Sequence
from statistics import stdev

from rich.console import ConsoleRenderable
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from equalize.commands.compare.compare import Comparison
from equalize.commands.compare.statistics import Difference
from equalize.commands.compare.verdict import Row

__all__ = ["comparison_report", "markdown"]

_HEADINGS = ("arm", "lr", "sigmas", "mIoU", "difference", "95 % seeds", "95 % images", "early", "early difference")


def comparison_report(found: Comparison) -> list[ConsoleRenderable]:
    """What ran, a row for each arm and rate, and three lines for each arm."""
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 2), header_style="dim")
    table.add_column()  # indents
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=True)
    for cells in _table(found):
        table.add_row(*map(Text, ("", *cells)))
    parts: list[ConsoleRenderable] = [Text(), table, Text()]
    parts += [Text(line) for line in _legend(found)]
    for verdict in found.verdicts:
        parts += [Text(), Text(f"{verdict.arm} against {verdict.baseline}", style="bold")]
        for question, answer in verdict.answers.items():
            parts.append(Padding(Text(f"{question}: {answer.sentence}"), (0, 0, 0, 2)))
    return parts


def markdown(found: Comparison, curves: str | None = None) -> str:
    """The same as a Markdown file.

    Args:
        found: the comparison.
        curves: the picture's file name, if there is one.
    """
    setup = found.setup
    lines = [f"# Comparison of {', '.join(arm.name for arm in setup.arms)}", ""]
    lines += [f"Model `{setup.name.source}`, data `{setup.data}`.", ""]
    lines += [_row(_HEADINGS), _row(["---", *["---:"] * (len(_HEADINGS) - 1)])]
    lines += [_row(cells) for cells in _table(found)]
    lines += ["", *_legend(found)]
    for verdict in found.verdicts:
        lines += ["", f"## {verdict.arm} against {verdict.baseline}", ""]
        lines += [f"- **{question}**: {answer.sentence}" for question, answer in verdict.answers.items()]
    if curves:
        lines += ["", f"![Learning curves]({curves})"]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(found: Comparison) -> list[list[str]]:
    """A row for each arm and rate; an arm with two baselines has a second one."""
    table: list[list[str]] = []
    for arm in found.setup.arms:
        for rate in found.setup.rates:
            cell = found.cells[arm.name, rate]
            rows = [row for row in found.rows if (row.arm, row.rate) == (arm.name, rate)]
            begin = [arm.name, f"{rate:g}", _ratios(found, arm.name, rate), _spread(cell.final)]
            final, early = _differences(rows[0]) if rows else (["", "", ""], [""])
            table.append([*begin, *final, _spread(cell.early), *early])
            for row in rows[1:]:
                final, early = _differences(row)
                table.append([f"- against {row.baseline}", "", "", "", *final, "", *early])
    return table


def _spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{sum(values) / len(values):.2f}"
    return f"{mean} ± {stdev(values):.2f}" if len(values) > 1 else mean


def _ratios(found: Comparison, arm: str, rate: float) -> str:
    """Largest sigma over smallest, of the site where they are furthest apart: as found and as trained."""
    sites = [site for result in found.results_of(arm, rate) for site in result["sites"]]
    if not sites:
        return "-"
    before, after = (max(site[key] for site in sites) for key in ("ratio", "ratio_after"))
    return f"{before:.2f}" if before == after else f"{before:.2f} -> {after:.2f}"


def _differences(row: Row) -> tuple[list[str], list[str]]:
    return [f"{row.final.mean:+.2f}", _interval(row.final), _images(row.final)], [f"{row.early.mean:+.2f}"]


def _interval(found: Difference) -> str:
    return "-" if found.low is None else f"{found.low:+.2f} to {found.high:+.2f}"


def _images(found: Difference) -> str:
    return "-" if found.images is None else f"{found.images[0]:+.2f} to {found.images[1]:+.2f}"


def _legend(found: Comparison) -> list[str]:
    setup = found.setup
    seeds = "1 seed" if len(setup.seeds) == 1 else f"{len(setup.seeds)} seeds (± their standard deviation)"
    images = next(iter(found.cells.values())).counts_S2NK.shape[2]
    recipe = setup.recipe
    return [
        f"mIoU in percent on {images} images after {recipe.max_steps} steps, early after {recipe.eval_first}; means "
        f"over {seeds}. sigmas: largest over smallest in the fusion layer where they are furthest apart, as measured "
        "and as trained. Differences to the baseline are paired by seed; intervals are not corrected for their number, "
        "and those over images take them as independent, which frames of a video are not."
    ]
